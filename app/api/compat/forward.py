"""A route that answers with what another route answers to the translated request."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import quote

from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.domain.events import ascii_json

Answer = Callable[[Any], Any]


def stack_of(request: Request) -> ASGIApp:
    """The Llama Stack's own routes, for those that ours stand in front of."""
    return cast(ASGIApp, request.app.state.stack)


def routes_of(request: Request) -> ASGIApp:
    """All routes, ours first."""
    return cast(ASGIApp, request.app.router)


async def fetched(request: Request, app: ASGIApp, path: str) -> Any:
    """The JSON with which `app` answers a GET of the same caller, its errors included."""
    body = b""

    async def collect(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    await Forwarded(app, "GET", path)({**request.scope, "query_string": b""}, request.receive, collect)
    return json.loads(body)


class Chunks(ABC):
    """Translates the stream of one answer: each JSON chunk into any number of others."""

    @abstractmethod
    def of(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What to send for a chunk."""

    @abstractmethod
    def end(self) -> Iterator[dict[str, Any]]:
        """What to send when the stream has properly ended."""


class Forwarded(Response):
    """Answers with what `app` answers to another request of the same caller.

    A 2xx of JSON goes through `answer`, a stream of events through `chunks`; all else, errors above all, as it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        body: Any = None,
        *,
        answer: Answer | None = None,
        chunks: Chunks | None = None,
    ) -> None:
        super().__init__()
        self._app = app
        self._method = method
        self._path = path
        self._body = json.dumps(body).encode() if body is not None else b""
        self._answer = answer
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = MutableHeaders(raw=list(scope["headers"]))
        del headers["transfer-encoding"]
        headers["content-length"] = str(len(self._body))
        headers["content-type"] = "application/json"
        inner = {
            **scope,
            "method": self._method,
            "path": self._path,
            "raw_path": quote(self._path).encode(),
            "headers": headers.raw,
            "path_params": {},
        }
        translating = _Translating(send, self._answer, self._chunks)
        await self._app(inner, self._receive(receive), translating)
        # Only now, outside the other route: what the translation raises is this route's error, and has a status.
        await translating.send_whole()

    def _receive(self, receive: Receive) -> Receive:
        """The translated body, then whatever the client does: leave."""
        body: Message | None = {"type": "http.request", "body": self._body, "more_body": False}

        async def receive_body_first() -> Message:
            nonlocal body
            message, body = body, None
            return message or await receive()

        return receive_body_first


class _Translating:
    """`send` for the other route."""

    def __init__(self, send: Send, answer: Answer | None, chunks: Chunks | None) -> None:
        self._send = send
        self._answer = answer
        self._chunks = chunks
        self._take: Send = send
        self._start: Message | None = None
        self._rest = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        else:
            await self._take(message)

    async def _begin(self, start: Message) -> None:
        kind = Headers(raw=start["headers"]).get("content-type", "")
        good = 200 <= start["status"] < 300
        if good and self._answer and kind.startswith("application/json"):
            self._start, self._take = start, self._collect
            return
        if good and self._chunks and kind.startswith("text/event-stream"):
            self._take = self._streamed
        await self._send(start)

    async def _collect(self, message: Message) -> None:
        self._rest += message.get("body", b"")

    async def send_whole(self) -> None:
        """The translated answer, if it was one to translate as a whole."""
        if self._start is None:
            return
        assert self._answer is not None
        body = ascii_json(self._answer(json.loads(self._rest))).encode()
        headers = MutableHeaders(raw=self._start["headers"])
        headers["content-length"] = str(len(body))
        await self._send({**self._start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})

    async def _streamed(self, message: Message) -> None:
        assert self._chunks is not None
        *lines, self._rest = (self._rest + message.get("body", b"")).split(b"\n")
        sent = b"".join(map(self._line, lines))
        more = message.get("more_body", False)
        if not more:
            sent += b"".join(map(_event, self._chunks.end()))
        await self._send({**message, "body": sent, "more_body": more})

    def _line(self, line: bytes) -> bytes:
        """Comments keep the connection alive, and have no blank line behind them; `[DONE]` is not for old clients."""
        assert self._chunks is not None
        if line.startswith(b":"):
            return line.rstrip() + b"\n"
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return b""
        return b"".join(map(_event, self._chunks.of(json.loads(data))))


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {ascii_json(chunk)}\n\n".encode()
