"""Stands before llama.cpp's server: chat completions with tools are constrained (`constrained`), the rest passes.

A client that leaves ends what was asked for it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
from starlette.types import Receive, Scope, Send

from app.local.constrained import Constraint, Reader, constrained, plain

JSON = dict[str, Any]

_COMPLETIONS = ("/v1/chat/completions", "/chat/completions")
_OF_ONE_HOP = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "accept-encoding"}


class Front:
    """The ASGI application. `url`: llama.cpp's own server. `grammar`: of a JSON schema, as that server takes it."""

    def __init__(self, url: str, grammar: Callable[[JSON], str]) -> None:
        self._model = httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)  # noqa: S113  # who asks has a limit
        self._grammar = grammar

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_when_left, receive, group.cancel_scope)
            await self._answer(scope, body, send)
            group.cancel_scope.cancel()

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        asked = _completion(scope, body)
        if isinstance(asked, Constraint):
            await self._constrained(asked, send)
        else:
            await self._forward(scope, body if asked is None else json.dumps(asked).encode(), send)

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name.decode() not in _OF_ONE_HOP]
        path = scope["path"] + (f"?{query}" if (query := scope["query_string"].decode()) else "")
        request = self._model.build_request(scope["method"], path, headers=headers, content=body)
        response = await self._model.send(request, stream=True)
        try:
            await _begin(send, response.status_code, response.headers.get("content-type", "application/json"))
            async for block in response.aiter_raw():
                await _send(send, block)
            await _end(send)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _constrained(self, asked: Constraint, send: Send) -> None:
        streams, usage = asked.request.get("stream"), asked.request.get("stream_options") or {}
        request = {
            **asked.request,
            "grammar": self._grammar(asked.schema),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._model.stream("POST", "/v1/chat/completions", json=request) as response:
            if response.status_code != httpx.codes.OK:
                await _whole(send, response.status_code, await response.aread())
            elif streams:
                await _stream(_told(_chunks(response), bool(usage.get("include_usage"))), send)
            else:
                await _whole(send, 200, json.dumps(await _completion_of(_told(_chunks(response), True))).encode())


def _completion(scope: Scope, body: bytes) -> Constraint | JSON | None:
    """What to ask for in the request's place. None: just that; if it is wrong, the model server says how."""
    if scope["method"] != "POST" or scope["path"] not in _COMPLETIONS:
        return None
    try:
        request = json.loads(body)
        return constrained(request) or plain(request)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


async def _chunks(response: httpx.Response) -> AsyncIterator[JSON]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


async def _told(chunks: AsyncIterator[JSON], with_usage: bool) -> AsyncIterator[JSON]:
    """The chunks of a constrained output as OpenAI's: text as it comes, a call when it is whole."""
    reader = Reader()
    async for chunk in chunks:
        if not chunk.get("choices"):  # its use of tokens, or an error
            if with_usage or "error" in chunk:
                yield chunk
            continue
        choice = chunk["choices"][0]
        delta, reason = choice["delta"], choice.get("finish_reason")
        if delta.get("role"):
            yield _chunk(chunk, {"role": "assistant", "content": None})
        if text := reader.feed(delta.get("content") or ""):
            yield _chunk(chunk, {"content": text})
        if reason:
            for last in _ending(reader):
                yield _chunk(chunk, last)
            yield _chunk(chunk, {}, "tool_calls" if reader.call() and reason == "stop" else reason)


def _ending(reader: Reader) -> list[JSON]:
    if call := reader.call():
        name, arguments = call
        function = {"name": name, "arguments": arguments}
        made = {"index": 0, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return [{"tool_calls": [made]}]
    return [{"content": rest}] if (rest := reader.rest()) else []


def _chunk(chunk: JSON, delta: JSON, reason: str | None = None) -> JSON:
    return {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


async def _completion_of(chunks: AsyncIterator[JSON]) -> JSON:
    """The chunks as one answer."""
    whole: JSON = {"object": "chat.completion"}
    message: JSON = {"role": "assistant", "content": None}
    reason = None
    async for chunk in chunks:
        whole = {**chunk, **whole}
        for choice in chunk.get("choices") or ():
            delta = choice["delta"]
            if text := delta.get("content"):
                message["content"] = (message["content"] or "") + text
            if calls := delta.get("tool_calls"):
                message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
            reason = choice["finish_reason"] or reason
    return {**whole, "choices": [{"index": 0, "message": message, "finish_reason": reason}]}


# --- ASGI -------------------------------------------------------------------------------------------------------------


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _cancel_when_left(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _begin(send: Send, status: int, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send(send: Send, block: bytes) -> None:
    await send({"type": "http.response.body", "body": block, "more_body": True})


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b""})


async def _whole(send: Send, status: int, body: bytes) -> None:
    await _begin(send, status, "application/json")
    await _send(send, body)
    await _end(send)


async def _stream(chunks: AsyncIterator[JSON], send: Send) -> None:
    await _begin(send, 200, "text/event-stream")
    async for chunk in chunks:
        await _send(send, b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")
    await _send(send, b"data: [DONE]\n\n")
    await _end(send)
