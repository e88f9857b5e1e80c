"""Followers: replay, then live, without a gap and without a repeat.

One pub/sub connection per process feeds every follower. A follower reads the tail in Redis, or the segments in
Postgres if the tail does not reach back to its cursor, until what it has is contiguous; then it goes on with what is
published. A jump in ids, a lost connection or a full buffer sends it back to reading. A watcher asks, for all turns
that have been silent for a while, once in Redis and once in Postgres whether there is more, and nudges who missed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from redis.exceptions import RedisError

from app.domain.errors import NotFound, Unavailable
from app.domain.events import LEG_END, TERMINAL, Event, EventId, from_line
from app.domain.turns import ENDED, TurnStatus
from app.events.log import EventLog, channel
from app.events.subscriber import Subscriber

logger = logging.getLogger(__name__)

EVENTS_AT_ONCE = 2000  # of the log, so that a slow reader holds no more than that
RETRY_SECONDS = 0.5


class Records(Protocol):
    """What a follower asks of Postgres."""

    async def segments_after(self, turn_id: str, cursor: EventId, limit: int) -> list[Event]: ...

    async def standings(self, turn_ids: Sequence[str]) -> dict[str, tuple[TurnStatus, EventId]]: ...


class _Inbox:
    """What was published to one follower and not yet taken: bounded; when full, it is emptied and read from the log."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._batches: deque[list[Event]] = deque()
        self._size = 0
        self._ready = asyncio.Event()
        self._nudged = False
        self.last_heard = asyncio.get_running_loop().time()
        self.cursor = EventId(0, 0)

    def put(self, batch: list[Event], size: int) -> None:
        self.last_heard = asyncio.get_running_loop().time()
        if self._size + size > self._limit:
            self.nudge()
            return
        self._batches.append(batch)
        self._size += size
        self._ready.set()

    def forget(self) -> None:
        """Drops what is there: the follower is about to read the log from its cursor."""
        self._batches.clear()
        self._size = 0
        self._nudged = False
        self._ready.clear()

    def nudge(self) -> None:
        """Makes the follower read again, from its cursor."""
        self.forget()
        self._nudged = True
        self._ready.set()

    async def take(self) -> list[Event] | None:
        """All that is there, waiting for the first; None: read again."""
        await self._ready.wait()
        self._ready.clear()
        if self._nudged:
            self._nudged = False
            return None
        batch = [event for published in self._batches for event in published]
        self._batches.clear()
        self._size = 0
        return batch


@dataclass
class _Channel:
    inboxes: set[_Inbox]
    subscribed: asyncio.Event


class Relay:
    """Follows turns for all streams of a process. Use as an async context manager."""

    def __init__(self, log: EventLog, records: Records, *, silence_seconds: float, buffer_bytes: int) -> None:
        self._log = log
        self._records = records
        self._silence = silence_seconds
        self._buffer = buffer_bytes
        self._channels: dict[str, _Channel] = {}
        self._subscriber = Subscriber(
            log.subscriber,
            self._channels.keys,
            on_message=self._dispatch,
            on_lost=self._unsubscribed,
            probe_seconds=silence_seconds,
            meanwhile="streams go on from Postgres",
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._subscriber.run(), name="relay subscriber"),
            asyncio.create_task(self._watch(), name="relay watch"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def streams(self) -> int:
        """How many followers there are."""
        return sum(len(channel.inboxes) for channel in self._channels.values())

    async def follow(
        self, turn_id: str, after: EventId, *, through_legs: bool, just_accepted: bool = False
    ) -> AsyncIterator[list[Event]]:
        """Batches of a turn's events after `after`, in order, once each.

        Ends after the turn's terminal event; before that, with the event that ends a leg, unless `through_legs`: then
        only if no later leg exists. `just_accepted`: nothing can be recorded of the turn yet, so Postgres is not asked.
        Ends at once if the turn has ended and nothing comes after `after`.
        Raises NotFound: the turn was deleted meanwhile; a stream must then be cut, not ended.
        """
        cursor = after
        async with self._listening(turn_id, cursor) as inbox:
            fresh = after.n == 0
            while True:
                inbox.forget()
                async for batch in self._replay(turn_id, cursor, doubtful=not fresh, unknown=fresh and just_accepted):
                    cursor = inbox.cursor = batch[-1].id
                    yield batch
                    if await self._is_over(turn_id, batch[-1], through_legs):
                        return
                if not fresh and await self._ended_at(turn_id, cursor):
                    return
                fresh = False
                while (published := await inbox.take()) is not None:
                    batch = _contiguous(published, cursor)
                    if batch:
                        cursor = inbox.cursor = batch[-1].id
                        yield batch
                        if await self._is_over(turn_id, batch[-1], through_legs):
                            return
                    if published and published[-1].id > cursor:
                        break

    async def _is_over(self, turn_id: str, last: Event, through_legs: bool) -> bool:
        if last.kind in TERMINAL:
            return True
        if last.kind not in LEG_END:
            return False
        if not through_legs:
            return True
        return await self._ended_at(turn_id, last.id)

    async def _ended_at(self, turn_id: str, cursor: EventId) -> bool:
        """Whether nothing comes after what the follower has, unless somebody resumes the turn.

        Raises NotFound: its row is gone.
        """
        standing = (await self._persistently(lambda: self._records.standings([turn_id]))).get(turn_id)
        if standing is None:
            raise NotFound("Turn", turn_id)
        return standing[0] in (*ENDED, TurnStatus.AWAITING_INPUT) and standing[1] <= cursor

    async def _replay(
        self, turn_id: str, cursor: EventId, *, doubtful: bool, unknown: bool
    ) -> AsyncIterator[list[Event]]:
        """The events from the cursor on, from Redis and Postgres, until they reach the end of what is known.

        `doubtful`: Postgres may know more than Redis, whose last events a worker may have failed to publish. `unknown`:
        it is enough to ask Redis, which a worker may not have written to yet.
        """
        while True:
            try:
                tail = await self._log.read(turn_id, cursor, EVENTS_AT_ONCE)
            except (RedisError, OSError, TimeoutError):
                tail = None
            batch = _contiguous(tail.events, cursor) if tail else []
            if batch:
                yield batch
                cursor = batch[-1].id
                continue
            if tail and not doubtful and (unknown if tail.last is None else tail.last <= cursor):
                return
            recorded = await self._persistently(
                lambda at=cursor: self._records.segments_after(turn_id, at, EVENTS_AT_ONCE)  # type: ignore[misc]
            )
            if not recorded:
                return
            cursor = recorded[-1].id
            for leg in _legs(recorded):
                yield leg

    @contextlib.asynccontextmanager
    async def _listening(self, turn_id: str, cursor: EventId) -> AsyncIterator[_Inbox]:
        name = channel(turn_id)
        inbox = _Inbox(self._buffer)
        inbox.cursor = cursor
        entry = self._channels.get(name)
        new = entry is None
        if entry is None:
            entry = self._channels[name] = _Channel(set(), asyncio.Event())
        entry.inboxes.add(inbox)
        try:
            if new:
                await self._subscriber.subscribe(name)
            # While Redis is down the watcher still finds what is recorded, so a stream need not wait for it for long.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(entry.subscribed.wait(), 1.0)
            yield inbox
        finally:
            entry.inboxes.discard(inbox)
            if not entry.inboxes and self._channels.get(name) is entry:
                del self._channels[name]
                await self._subscriber.unsubscribe(name)

    def _unsubscribed(self) -> None:
        for entry in self._channels.values():
            entry.subscribed.clear()

    def _dispatch(self, message: dict[str, Any]) -> None:
        entry = self._channels.get(message["channel"])
        if entry is None:
            return
        if message["type"] == "subscribe":
            if not entry.subscribed.is_set():
                entry.subscribed.set()
                for inbox in entry.inboxes:
                    inbox.nudge()
        elif message["type"] == "message":
            batch = [from_line(line) for line in message["data"].split("\n")]
            for inbox in entry.inboxes:
                inbox.put(batch, len(message["data"]))

    async def _watch(self) -> None:
        """Finds what silent followers missed: one round trip to Redis and one statement for all of them."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._silence / 2)
            silent: dict[str, list[_Inbox]] = defaultdict(list)
            for name, entry in self._channels.items():
                for inbox in entry.inboxes:
                    if loop.time() - inbox.last_heard >= self._silence:
                        silent[name[len("caravan:{") : -1]].append(inbox)
            try:
                if silent:
                    await self._nudge_behind(silent)
            except Exception:
                logger.exception("the relay's watcher failed, and goes on")

    async def _nudge_behind(self, silent: dict[str, list[_Inbox]]) -> None:
        known: dict[str, list[EventId]] = defaultdict(list)
        over: set[str] = set()
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            for turn_id, last in (await self._log.lasts(list(silent))).items():
                known[turn_id].append(last)
        with contextlib.suppress(Unavailable):
            standings = await self._records.standings(list(silent))
            over = {turn_id for turn_id in silent if turn_id not in standings}
            for turn_id, (status, last) in standings.items():
                known[turn_id].append(last)
                if status in (*ENDED, TurnStatus.AWAITING_INPUT):
                    over.add(turn_id)  # even a follower that asked for what comes after the last event is told so
        for turn_id, inboxes in silent.items():
            for inbox in inboxes:
                if turn_id in over or any(last > inbox.cursor for last in known[turn_id]):
                    inbox.nudge()

    async def _persistently[T](self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks Postgres until it answers: a stream outlives an outage."""
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)


def _contiguous(published: Sequence[Event], cursor: EventId) -> list[Event]:
    """The part of what was published that goes on from the cursor: nothing known, nothing after a hole, one leg."""
    batch: list[Event] = []
    for event in published:
        if event.id <= cursor:
            continue
        if event.after > cursor:
            break
        batch.append(event)
        cursor = event.id
        if event.kind in LEG_END:
            break
    return batch


def _legs(events: Sequence[Event]) -> list[list[Event]]:
    """Cuts a list of events behind each that ends a leg, so that a follower can stop there."""
    legs: list[list[Event]] = [[]]
    for event in events:
        legs[-1].append(event)
        if event.kind in LEG_END:
            legs.append([])
    return [leg for leg in legs if leg]
