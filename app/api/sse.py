"""A turn's events as Server-Sent Events, safe for every SDK (docs/api.md says which breaks on what).

LF line ends; ids; comments without a blank line, because one with it, after an `id:`, breaks every Python SDK.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from sse_starlette import EventSourceResponse
from sse_starlette.event import ServerSentEvent

from app.domain.events import Event

PING = b": ping\n"


class TurnStream(EventSourceResponse):
    """Sends batches of events; a comment after `ping_seconds`; cuts off a client that does not take them."""

    def __init__(
        self,
        batches: AsyncIterator[list[Event]],
        *,
        ping_seconds: float,
        send_timeout_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            _encoded(batches),
            ping=ping_seconds,
            sep="\n",
            ping_message_factory=_ping,
            send_timeout=send_timeout_seconds,
            headers={"Cache-Control": "no-cache", **(headers or {})},
        )


async def _encoded(batches: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    async for batch in batches:
        yield b"".join([event.sse() for event in batch])


class _Ping(ServerSentEvent):
    """sse-starlette ends every event with a blank line; this one has none."""

    def encode(self) -> bytes:
        return PING


def _ping() -> Any:
    return _Ping()
