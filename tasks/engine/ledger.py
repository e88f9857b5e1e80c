"""Server tool calls across attempts: a recorded result is reused, one in flight is made again only where that is safe.

A call is known by the ordinal of the step that asked for it and its index there, never by the model's call id, which
may be empty or repeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from app.store.claims import LedgerEntry


@dataclass(frozen=True)
class ServerCall:
    """One call: `make` is given the call's idempotency key and gives its result as JSON; it does not raise.

    `unknown`: the result of one that was in flight when its worker was lost, and is not safe to repeat.
    """

    index: int
    repeatable: bool
    make: Callable[[str], Awaitable[dict[str, Any]]]
    unknown: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A call's result, and when it was made, or looked up."""

    result: dict[str, Any]
    started_at: datetime


class Ledger:
    """Of one attempt. `entries`: the calls that earlier attempts noted, by (ordinal, index).

    `record`: with `started_calls`, notes calls before they are made. `persist`: with `result`, stores one at once.
    """

    def __init__(
        self,
        turn_id: str,
        entries: Mapping[tuple[int, int], LedgerEntry],
        record: Callable[..., Awaitable[Any]],
        persist: Callable[..., Awaitable[Any]],
    ) -> None:
        self._turn_id = turn_id
        self._entries = entries
        self._record = record
        self._persist = persist
        self._started: set[tuple[int, int]] = set()

    def started(self, calls: Iterable[tuple[int, int]]) -> None:
        """These were noted as about to be made, together with the step that asked for them."""
        self._started.update(calls)

    async def run(
        self,
        ordinal: int,
        calls: Sequence[ServerCall],
        record_step: Callable[[int, asyncio.Task[Made]], Awaitable[None]],
    ) -> None:
        """Makes all calls at once, and records their steps in the order that the model asked in.

        `record_step` is given a call's index and the call under way.
        """
        to_start = [(ordinal, call.index) for call in calls if self._to_start(ordinal, call)]
        if to_start:
            await self._record(started_calls=to_start)
        running = {call.index: asyncio.create_task(self._make(ordinal, call)) for call in calls}
        self._next = calls[0].index
        try:
            for call in calls:
                self._next = call.index
                await record_step(call.index, running[call.index])
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    def _to_start(self, ordinal: int, call: ServerCall) -> bool:
        """Whether a call is still to be noted as made by this attempt, which must come before it is made.

        It was never made (the turn was handed over before), or was in flight when its worker died and is repeated.
        """
        if (ordinal, call.index) in self._started:
            return False
        entry = self._entries.get((ordinal, call.index))
        return entry is None or (entry.result is None and call.repeatable)

    async def _make(self, ordinal: int, call: ServerCall) -> Made:
        """The call's result, from the ledger if it is there; stored at once if its step cannot be recorded yet."""
        started_at = datetime.now(UTC)
        entry = self._entries.get((ordinal, call.index))
        if entry is not None and entry.result is not None:
            return Made(entry.result, started_at)
        if entry is not None and not call.repeatable:
            return Made(call.unknown, started_at)
        result = await call.make(f"{self._turn_id}:{ordinal}:{call.index}")
        if call.index != self._next:
            await self._persist([], result=(ordinal, call.index, result))
        return Made(result, started_at)
