"""What the tests of the log share: turns to write and follow, and a port to Postgres without Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from app.domain import events
from app.domain.errors import Unavailable
from app.domain.events import LEG_END, START, TERMINAL, Event, EventId, EventKind
from app.domain.turns import TurnStatus
from app.events.follow import Relay
from app.events.log import EventLog, channel
from app.events.writer import EventWriter

SECONDS = 60.0
DELTA = EventKind.STEP_PROGRESS


async def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Returns as soon as the condition holds; it may be a coroutine function."""
    async with asyncio.timeout(seconds):
        while not await _holds(condition):  # noqa: ASYNC110 what is waited for is often in another process
            await asyncio.sleep(0.005)


async def _holds(condition: Callable[[], object]) -> object:
    answer = condition()
    return await answer if isinstance(answer, Awaitable) else answer


async def subscriptions(log: EventLog, name: str) -> int:
    """How many connections listen to a channel."""
    counted = await log.redis.pubsub_numsub(name)
    return int(dict(counted)[name])


def new_turn() -> str:
    return str(uuid.uuid4())


def made(count: int, after: EventId = START, fence: int = 1, kind: EventKind = DELTA) -> list[Event]:
    """So many events behind `after`, each with data of its own."""
    contents = [(kind, events.ascii_json({"of": fence, "n": after.n + 1 + index})) for index in range(count)]
    return events.number(after, fence, contents, after.n + 1)


def terminal(after: EventId, fence: int = 1) -> Event:
    return made(1, after, fence, EventKind.TURN_COMPLETE)[0]


@dataclass
class MemoryRecords:
    """`Records` in memory: what Postgres would know, and whether it can be reached."""

    segments: dict[str, list[list[Event]]] = field(default_factory=dict)
    status: dict[str, TurnStatus] = field(default_factory=dict)
    available: bool = True
    asked: int = 0

    def accept(self, turn_id: str) -> str:
        self.segments[turn_id], self.status[turn_id] = [], TurnStatus.RUNNING
        return turn_id

    def record(self, turn_id: str, recorded: Sequence[Event]) -> None:
        self.segments[turn_id].append(list(recorded))
        if recorded[-1].kind in TERMINAL:
            self.status[turn_id] = TurnStatus.COMPLETED
        elif recorded[-1].kind in LEG_END:
            self.status[turn_id] = TurnStatus.AWAITING_INPUT

    def delete(self, turn_id: str) -> None:
        del self.segments[turn_id], self.status[turn_id]

    async def segments_after(self, turn_id: str, cursor: EventId, limit: int) -> list[Event]:
        self._ask()
        recorded = [event for segment in self.segments.get(turn_id, []) for event in segment]
        return [event for event in recorded if event.id > cursor][:limit]

    async def standings(self, turn_ids: Sequence[str]) -> dict[str, tuple[TurnStatus, EventId]]:
        self._ask()
        return {one: (self.status[one], self.last(one)) for one in turn_ids if one in self.status}

    def last(self, turn_id: str) -> EventId:
        return self.segments[turn_id][-1][-1].id if self.segments[turn_id] else START

    def _ask(self) -> None:
        self.asked += 1
        if not self.available:
            raise Unavailable("Postgres is down")


class Follower:
    """One follower that collects what it gets, until its stream ends or it is closed."""

    def __init__(self, relay: Relay, turn_id: str, after: EventId = START, *, through_legs: bool = False) -> None:
        self.events: list[Event] = []
        self._stream = relay.follow(turn_id, after, through_legs=through_legs)
        self.task = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        async with aclosing(self._stream):  # type: ignore[type-var]
            async for batch in self._stream:
                assert batch, "an empty batch"
                self.events += batch

    async def has(self, expected: Sequence[Event], seconds: float = SECONDS) -> None:
        """Waits for as many events, and compares."""
        with contextlib.suppress(TimeoutError):
            await until(lambda: len(self.events) >= len(expected) or self.task.done(), seconds)
        assert self.events == list(expected)

    async def ended(self, seconds: float = SECONDS) -> list[Event]:
        """Waits for the end of the stream. Raises what it raised, TimeoutError if it goes on."""
        async with asyncio.timeout(seconds):
            await asyncio.shield(self.task)
        return self.events

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class Owner:
    """What a writer asks of its worker."""

    may_write: bool = True
    owned: bool = True
    lost: int = 0

    async def still_owned(self) -> bool:
        return self.owned

    def on_lost(self) -> None:
        self.lost += 1


@asynccontextmanager
async def writing(
    log: EventLog, turn_id: str, owner: Owner, *, fence: int = 1, last: EventId = START
) -> AsyncIterator[EventWriter]:
    """A writer for an attempt that has raised the fence."""
    await log.raise_fence(turn_id, fence, last)
    writer = EventWriter(
        log,
        turn_id,
        fence,
        last,
        last.n + 1,
        may_write=lambda: owner.may_write,
        still_owned=owner.still_owned,
        on_lost=owner.on_lost,
    )
    try:
        yield writer
    finally:
        owner.may_write = True
        await writer.finish()


@asynccontextmanager
async def hearing(log: EventLog, turn_id: str) -> AsyncIterator[list[Event]]:
    """What is published for a turn, as it is published."""
    heard: list[Event] = []

    async def hear() -> None:
        while True:
            message = await listener.get_message(ignore_subscribe_messages=True, timeout=None)
            if message is not None:
                heard.extend(events.from_line(line) for line in message["data"].split("\n"))

    async with log.subscriber.pubsub() as listener:
        await listener.subscribe(channel(turn_id))
        await until(lambda: subscriptions(log, channel(turn_id)))
        task = asyncio.create_task(hear())
        yield heard
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def tail(log: EventLog, turn_id: str, after: EventId = START) -> list[Event]:
    return (await log.read(turn_id, after)).events


async def tail_becomes(log: EventLog, turn_id: str, expected: Sequence[Event]) -> None:
    """Waits until the tail in Redis is as expected."""

    async def as_expected() -> bool:
        return await tail(log, turn_id) == list(expected)

    with contextlib.suppress(TimeoutError):
        await until(as_expected)
    assert await tail(log, turn_id) == list(expected)
