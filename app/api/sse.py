"""Server-Sent Events, safe for every SDK (docs/api.md says which breaks on what).

LF line ends; ids; comments without a blank line, because one with it, after an `id:`, breaks every Python SDK.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from sse_starlette import EventSourceResponse
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Message, Receive, Scope, Send

from app.api.shutdown import Cut
from app.domain.errors import NotFound

PING = b": ping\n"
PIECE_BYTES = 32_768
"""What is handed to the connection at once, so that a slow client of a large event is seen to take it."""

# It would end every stream within half a second of a signal. `app.api.shutdown` gives them a grace and cuts them.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # the library has no annotation there


class Sendable(Protocol):
    """An event as it is sent."""

    def sse(self) -> bytes: ...


class EventStream(EventSourceResponse):
    """Sends events as they were written; a comment after `ping_seconds`; cuts off a client that does not take them.

    Raises Cut: the stream cannot be ended as if it were complete.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        ping_seconds: float,
        send_timeout_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            events,
            ping=ping_seconds,
            sep="\n",
            ping_message_factory=_ping,
            headers={"Cache-Control": "no-cache", **(headers or {})},
        )
        self._send_timeout = send_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, _PacedSend(send, self._send_timeout))


class TurnStream(EventStream):
    """Batches of a turn's events."""

    def __init__(self, batches: AsyncIterator[Sequence[Sendable]], **options: Any) -> None:
        super().__init__(_encoded(batches), **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except NotFound as error:
            raise Cut(f"deleted meanwhile: {error}") from error


class _PacedSend:
    """`send` in small pieces, each of which the client must take in time. A comment never comes amid an event."""

    def __init__(self, send: Send, timeout_seconds: float) -> None:
        self._send = send
        self._timeout = timeout_seconds
        self._turn = asyncio.Lock()

    async def __call__(self, message: Message) -> None:
        body = message.get("body", b"")
        if body == PING and self._turn.locked():
            return
        async with self._turn:
            for start in range(0, len(body) or 1, PIECE_BYTES):
                await self._in_time({**message, "body": body[start : start + PIECE_BYTES]} if body else message)
        # Where there is always more to send, nothing else waits: other streams would never have their turn, and
        # anyio would never find a moment to cancel this one, though its client has left.
        await asyncio.sleep(0)

    async def _in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(message)
        except TimeoutError:
            raise Cut(f"the client took nothing for {self._timeout:g} s (STREAM_SEND_TIMEOUT_SECONDS)") from None


async def _encoded(batches: AsyncIterator[Sequence[Sendable]]) -> AsyncIterator[bytes]:
    async with aclosing(batches):  # type: ignore[type-var]  # it is an async generator
        async for batch in batches:
            yield b"".join([event.sse() for event in batch])


class _Ping(ServerSentEvent):
    """sse-starlette ends every event with a blank line; this one has none."""

    def encode(self) -> bytes:
        return PING


def _ping() -> Any:
    return _Ping()
