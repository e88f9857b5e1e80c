"""Writes the events of one attempt: numbers them, publishes them as they come, keeps them until they are recorded.

No timer: whatever piled up while the last append was in flight goes out in the next one, so that an idle turn has the
lowest latency and a busy one batches by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from app.domain.errors import AttemptLost, Unavailable
from app.domain.events import Event, EventId, EventKind, size
from app.events.log import ENDED_TTL_SECONDS, TTL_SECONDS, EventLog

logger = logging.getLogger(__name__)

BATCH = 500
SEGMENT_BYTES = 262_144
"""So much unrecorded is worth a segment of its own: it bounds what Redis holds of a turn."""

FINISH_SECONDS = 10
BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class EventWriter:
    """Appends the events of the attempt `fence`, the first of which follows `last` and has the number `first_n`.

    `may_write`: False while the worker's lease is in doubt; nothing is appended then. `still_owned`: asks Postgres.
    `on_lost`: called once when the attempt turns out to be over.
    """

    def __init__(
        self,
        log: EventLog,
        turn_id: str,
        fence: int,
        last: EventId,
        first_n: int,
        *,
        may_write: Callable[[], bool],
        still_owned: Callable[[], Awaitable[bool]],
        on_lost: Callable[[], object],
    ) -> None:
        self._log = log
        self._turn_id = turn_id
        self._fence = fence
        self._last = last
        self._next_n = first_n
        self._may_write = may_write
        self._still_owned = still_owned
        self._on_lost = on_lost
        self._recorded = last
        self._trim: EventId | None = None
        self._unrecorded: list[Event] = []
        self._staged: list[Event] = []
        self._pending: list[Event] = []
        self.unrecorded_bytes = 0
        self.full = asyncio.Event()
        """Set while there is enough for a segment."""
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failing = asyncio.Event()
        self._final = False
        self._pump = asyncio.create_task(self._run(), name=f"events {turn_id}")

    def emit(self, kind: EventKind, data: str) -> None:
        """Publishes an event now; it is recorded with the next step."""
        self._pending.append(self._number(kind, data))
        self._idle.clear()
        self._wake.set()

    def stage(self, kind: EventKind, data: str) -> None:
        """Holds an event back until `recorded`: nobody may see it before its transaction is committed."""
        self._staged.append(self._number(kind, data))

    def unrecorded(self, *, staged: bool = True) -> list[Event]:
        """All events since the last recorded one: the next segment, with what is staged or without."""
        return self._unrecorded[: None if staged else len(self._unrecorded) - len(self._staged)]

    def recorded(self, segment: list[Event], *, final: bool = False) -> None:
        """`segment` is committed: publishes what was staged, if it is in there, and lets Redis forget the segment.

        `final`: the turn has ended, so that Redis may soon forget the turn.
        """
        self._final = final
        del self._unrecorded[: len(segment)]
        self._count(-size(segment))
        self._recorded = segment[-1].id
        self._trim = segment[-1].id
        if self._staged and self._staged[-1].id <= segment[-1].id:
            self._pending += self._staged
            self._staged = []
            self._idle.clear()
            self._wake.set()

    def forget_staged(self) -> None:
        """Takes back what was staged: its transaction will not be committed."""
        if self._staged:
            del self._unrecorded[-len(self._staged) :]
            self._count(-size(self._staged))
            self._next_n = self._staged[0].id.n
            self._last = self._staged[0].after
            self._staged = []

    async def finish(self) -> None:
        """Publishes what is left and stops. If Redis is down, it stops at once: followers find it in Postgres."""
        tasks = [self._pump, *(asyncio.ensure_future(event.wait()) for event in (self._idle, self._failing))]
        try:
            await asyncio.wait(tasks, timeout=FINISH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _number(self, kind: EventKind, data: str) -> Event:
        event = Event(EventId(self._fence, self._next_n), self._last, kind, data)
        self._last = event.id
        self._next_n += 1
        self._unrecorded.append(event)
        self._count(len(data))
        return event

    def _count(self, more: int) -> None:
        self.unrecorded_bytes += more
        if self.unrecorded_bytes >= SEGMENT_BYTES:
            self.full.set()
        else:
            self.full.clear()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                batch = self._pending[:BATCH]
                await self._deliver(batch)
                del self._pending[: len(batch)]
            self._idle.set()

    async def _deliver(self, batch: list[Event]) -> None:
        attempt = 0
        while True:
            try:
                if self._may_write() and await self._append(batch):
                    self._failing.clear()
                    return
            except (RedisError, OSError, TimeoutError, Unavailable) as error:
                self._failing.set()
                if attempt == 0:
                    logger.warning("turn %s: events cannot be published, trying again: %s", self._turn_id, error)
            except AttemptLost:
                if not self._final:
                    self._on_lost()
                raise
            except Exception:
                self._failing.set()
                logger.exception("turn %s: events cannot be published, trying again", self._turn_id)
            await asyncio.sleep(BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)])
            attempt += 1

    async def _append(self, batch: list[Event]) -> bool:
        ttl = ENDED_TTL_SECONDS if self._final and len(batch) == len(self._pending) else TTL_SECONDS
        trim = min(self._trim, batch[-1].id) if self._trim else None  # a burst is recorded before it is published
        outcome = await self._log.append(self._turn_id, self._fence, batch, trim=trim, ttl_seconds=ttl)
        if outcome == "ok":
            self._trim = None if trim == self._trim else self._trim
            return True
        if not await self._armed_again():
            return False
        missing = [event for event in self._unrecorded if event.id < batch[0].id]
        return (await self._log.append(self._turn_id, self._fence, missing + batch, ttl_seconds=ttl)) == "ok"

    async def _armed_again(self) -> bool:
        """Redis lost the fence, or somebody raised it without ending the turn. Raises AttemptLost: it is not ours.

        False: the lease is in doubt. A process that was stopped in here, for however long, must not take the fence back
        from its successor: hence the look at the lease behind the answer of Postgres, and the fence that is replaced.
        """
        seen = await self._log.fence(self._turn_id)
        if not await self._still_owned():
            raise AttemptLost(f"turn {self._turn_id}: attempt {self._fence} is over")
        if not self._may_write():
            return False
        logger.warning("turn %s: Redis lost this turn's log; it is written again", self._turn_id)
        await self._log.raise_fence(self._turn_id, self._fence, self._recorded, instead_of=seen)
        return True
