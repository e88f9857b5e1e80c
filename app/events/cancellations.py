"""Hears which running turns are to be cancelled. What it misses, the worker learns with its next renewal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.events.log import CANCEL_CHANNEL, EventLog
from app.events.subscriber import Subscriber

PROBE_SECONDS = 5.0


async def hear_cancellations(log: EventLog, on_cancel: Callable[[str], object]) -> None:
    """Calls `on_cancel` with each turn id, until it is cancelled itself; outlives every outage of Redis."""

    def heard(message: dict[str, Any]) -> None:
        if message["type"] == "message" and message["channel"] == CANCEL_CHANNEL:
            on_cancel(message["data"])

    await Subscriber(
        log.subscriber,
        lambda: [CANCEL_CHANNEL],
        on_message=heard,
        on_lost=lambda: None,
        probe_seconds=PROBE_SECONDS,
        meanwhile="cancellations come with the lease",
    ).run()
