"""The events of one attempt, through outages and takeovers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.domain.events import START, EventId, EventKind
from app.events.follow import Relay
from app.events.log import ENDED_TTL_SECONDS, AppendOutcome, EventLog, channel
from app.events.writer import SEGMENT_BYTES, EventWriter
from app.local.valkey import Valkey
from tests.integration.events.feeds import (
    DELTA,
    Follower,
    MemoryRecords,
    Owner,
    hearing,
    new_turn,
    tail,
    tail_becomes,
    until,
    writing,
)


def emit(writer: EventWriter, count: int) -> None:
    for index in range(count):
        writer.emit(DELTA, f'"{index}"')


async def test_emitted_events_are_published_and_numbered(log: EventLog, owner: Owner) -> None:
    """They go on from the event that the attempt found, in order, without being recorded."""
    turn_id, last = new_turn(), EventId(1, 41)
    async with writing(log, turn_id, owner, fence=3, last=last) as writer:
        emit(writer, 1200)
        await tail_becomes(log, turn_id, writer.unrecorded())
        ids = [event.id for event in writer.unrecorded()]
        assert ids == [EventId(3, 42 + index) for index in range(1200)]
        assert [event.after for event in writer.unrecorded()] == [last, *ids[:-1]]


async def test_a_staged_event_is_seen_only_when_it_is_recorded(log: EventLog, owner: Owner) -> None:
    """It has its place in the segment before anyone sees it."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer, hearing(log, turn_id) as heard:
        emit(writer, 2)
        writer.stage(EventKind.STEP_COMPLETE, '"done"')
        segment = writer.unrecorded()
        assert len(segment) == 3
        await until(lambda: len(heard) >= 2)
        assert heard == segment[:2]
        writer.recorded(segment)
        assert writer.unrecorded() == []
        await until(lambda: heard == segment)


async def test_a_segment_in_mid_step_leaves_out_what_is_staged(log: EventLog, owner: Owner) -> None:
    """What is staged belongs to a transaction of its own, and is not published by another one's commit."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer, hearing(log, turn_id) as heard:
        emit(writer, 2)
        writer.stage(EventKind.STEP_COMPLETE, '"done"')
        whole, published = writer.unrecorded(), writer.unrecorded(staged=False)
        assert published == whole[:2]
        writer.recorded(published)
        assert writer.unrecorded() == whole[2:]
        await until(lambda: len(heard) >= 2)
        assert heard == published
        writer.recorded(whole[2:])
        await until(lambda: heard == whole)


async def test_a_writer_tells_when_there_is_enough_for_a_segment(log: EventLog, owner: Owner) -> None:
    """By bytes, until it is recorded; what is taken back counts no more."""
    async with writing(log, new_turn(), owner) as writer:
        writer.emit(EventKind.STEP_PROGRESS, "x" * (SEGMENT_BYTES - 10))
        assert not writer.full.is_set()
        writer.stage(EventKind.STEP_COMPLETE, "y" * 10)
        assert writer.full.is_set()
        writer.forget_staged()
        assert (writer.full.is_set(), writer.unrecorded_bytes) == (False, SEGMENT_BYTES - 10)
        writer.emit(EventKind.STEP_PROGRESS, "x" * 10)
        assert writer.full.is_set()
        writer.recorded(writer.unrecorded())
        assert (writer.full.is_set(), writer.unrecorded_bytes) == (False, 0)


async def test_what_is_recorded_is_trimmed_from_redis(log: EventLog, owner: Owner) -> None:
    """After each step's segment, the tail holds no more than that step and what came since: memory stays bounded."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer:
        for _ in range(5):
            emit(writer, 10)
            writer.stage(EventKind.STEP_COMPLETE, '"done"')
            segment = writer.unrecorded()
            writer.recorded(segment)
            emit(writer, 1)
            newest = writer.unrecorded()[-1].id

            async def is_out(wanted: EventId = newest) -> bool:
                return (await log.read(turn_id, START)).last == wanted

            await until(is_out)
        assert len(await tail(log, turn_id)) <= 12


class WatchedLog(EventLog):
    """A log that notes after each append how long its tail is."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.lengths: list[int] = []

    async def append(self, turn_id: str, *args: Any, **more: Any) -> AppendOutcome:
        outcome = await super().append(turn_id, *args, **more)
        self.lengths.append(await self.redis.xlen(f"{channel(turn_id)}:tail"))
        return outcome


async def test_a_burst_that_is_recorded_before_it_is_published_is_trimmed_as_it_goes(
    redis: Valkey, owner: Owner
) -> None:
    """Postgres may be ahead of Redis, which then keeps nothing of it: followers have heard it, or find it there."""
    log, turn_id = WatchedLog(redis.url), new_turn()
    async with writing(log, turn_id, owner) as writer, hearing(log, turn_id) as heard:
        emit(writer, 1200)
        segment = writer.unrecorded()
        writer.recorded(segment)
        await until(lambda: heard == segment)
        await until(lambda: len(log.lengths) == 3)
        assert log.lengths == [0, 0, 0]
    await log.close()


async def test_a_forgotten_stage_gives_its_numbers_back(log: EventLog, owner: Owner) -> None:
    """The terminal event of a turn that was interrupted while it recorded takes their place."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer, hearing(log, turn_id) as heard:
        emit(writer, 2)
        writer.stage(EventKind.STEP_COMPLETE, '"never"')
        writer.stage(EventKind.TURN_COMPLETE, '"never"')
        writer.forget_staged()
        writer.stage(EventKind.ERROR, '"cancelled"')
        segment = writer.unrecorded()
        assert [(event.id, event.data) for event in segment[2:]] == [(EventId(1, 3), '"cancelled"')]
        writer.recorded(segment)
        await until(lambda: heard == segment)


async def test_a_flush_in_mid_turn_loses_nothing(
    log: EventLog, owner: Owner, redis: Valkey, relay: Relay, records: MemoryRecords
) -> None:
    """The log is armed again with all that is not recorded; followers get every event once."""
    turn_id = records.accept(new_turn())
    follower = Follower(relay, turn_id)
    async with writing(log, turn_id, owner) as writer:
        emit(writer, 3)
        writer.stage(EventKind.STEP_COMPLETE, '"one"')
        first = writer.unrecorded()
        records.record(turn_id, first)
        writer.recorded(first)
        emit(writer, 3)
        await follower.has([*first, *writer.unrecorded()])
        redis.flush()
        emit(writer, 3)
        await tail_becomes(log, turn_id, writer.unrecorded())
        writer.stage(EventKind.TURN_COMPLETE, '"over"')
        second = writer.unrecorded()
        redis.flush()
        records.record(turn_id, second)
        writer.recorded(second)
        assert await follower.ended() == [*first, *second]
        assert await Follower(relay, turn_id).ended() == [*first, *second]


async def test_an_outage_of_redis_delays_events_and_loses_none(
    log: EventLog, owner: Owner, redis: Valkey, relay: Relay, records: MemoryRecords
) -> None:
    """The server dies and comes back empty; what was emitted meanwhile arrives."""
    turn_id = records.accept(new_turn())
    follower = Follower(relay, turn_id)
    async with writing(log, turn_id, owner) as writer:
        emit(writer, 2)
        await follower.has(writer.unrecorded())
        redis.kill()
        emit(writer, 2)
        redis.start()
        emit(writer, 1)
        await follower.has(writer.unrecorded())
        assert owner.lost == 0


async def test_an_attempt_that_is_over_learns_it_from_the_log(log: EventLog, owner: Owner) -> None:
    """Another raised the fence: `on_lost` is called once, and nothing more is appended."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer:
        emit(writer, 2)
        await tail_becomes(log, turn_id, writer.unrecorded())
        owner.owned = False
        await log.raise_fence(turn_id, 2, START)
        before = await tail(log, turn_id)
        emit(writer, 2)
        await until(lambda: owner.lost)
        emit(writer, 2)
        await writer.finish()
        assert owner.lost == 1
        assert await tail(log, turn_id) == before


async def test_an_attempt_that_is_over_does_not_arm_a_flushed_log(log: EventLog, owner: Owner, redis: Valkey) -> None:
    """It asks Postgres first."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer:
        redis.flush()
        owner.owned = False
        emit(writer, 1)
        await until(lambda: owner.lost)
        assert (await log.read(turn_id, START)).last is None


async def test_a_fence_raised_in_vain_is_taken_back(log: EventLog, owner: Owner) -> None:
    """Somebody raised it in a transaction that was rolled back: the owner goes on."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer:
        emit(writer, 2)
        await tail_becomes(log, turn_id, writer.unrecorded())
        await log.raise_fence(turn_id, 2, START)
        emit(writer, 2)
        await tail_becomes(log, turn_id, writer.unrecorded())
        assert owner.lost == 0


@pytest.mark.parametrize("stopped_behind", ["the answer", "the look at the lease"])
async def test_a_writer_that_was_stopped_takes_no_fence_from_its_successor(
    log: EventLog, owner: Owner, stopped_behind: str
) -> None:
    """Postgres said that the turn is its own; then it was stopped, and another attempt has the turn when it goes on."""
    turn_id, successor = new_turn(), 3
    async with writing(log, turn_id, owner) as writer:
        emit(writer, 2)
        await tail_becomes(log, turn_id, writer.unrecorded())
        await log.raise_fence(turn_id, 2, START)
        asked = 0

        async def still_owned() -> bool:
            nonlocal asked
            asked += 1
            if asked == 1:
                await log.raise_fence(turn_id, successor, START)
                owner.may_write = stopped_behind == "the look at the lease"
            return asked == 1

        writer._still_owned = still_owned
        emit(writer, 2)
        await until(lambda: asked)
        owner.owned = False
        if stopped_behind == "the look at the lease":
            await until(lambda: owner.lost)
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(writer._idle.wait(), 0.2)
        assert await log.fence(turn_id) == successor
        assert len(await tail(log, turn_id)) == 2


async def test_a_writer_that_is_stopped_while_it_finishes_leaves_no_task(
    log: EventLog, owner: Owner, redis: Valkey
) -> None:
    """Its events cannot be published, as the lease is in doubt; whoever waits for that gives up."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer:
        owner.may_write = False
        emit(writer, 1)
        finishing = asyncio.create_task(writer.finish())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(finishing, 0.1)
        assert not [task for task in asyncio.all_tasks() if turn_id in task.get_name()]


async def test_nothing_is_appended_while_the_lease_is_in_doubt(log: EventLog, owner: Owner) -> None:
    """It goes out once the lease is renewed."""
    turn_id = new_turn()
    owner.may_write = False
    async with writing(log, turn_id, owner) as writer:
        emit(writer, 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer._idle.wait(), 0.1)
        assert await tail(log, turn_id) == []
        owner.may_write = True
        await tail_becomes(log, turn_id, writer.unrecorded())


async def test_finishing_publishes_what_is_left(log: EventLog, owner: Owner) -> None:
    """And an ended turn is soon forgotten by Redis: it is read from Postgres."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer, hearing(log, turn_id) as heard:
        emit(writer, 3)
        writer.stage(EventKind.TURN_COMPLETE, '"over"')
        segment = writer.unrecorded()
        writer.recorded(segment, final=True)
        await writer.finish()
        await until(lambda: heard == segment)
        assert 0 < await log.redis.ttl(f"{channel(turn_id)}:log") <= ENDED_TTL_SECONDS


async def test_a_leg_that_ends_leaves_its_log_alive(log: EventLog, owner: Owner) -> None:
    """A turn that awaits input, or was handed over, goes on."""
    turn_id = new_turn()
    async with writing(log, turn_id, owner) as writer:
        writer.stage(EventKind.TURN_AWAITING_INPUT, '"ask"')
        writer.recorded(writer.unrecorded())
        await writer.finish()
        assert await log.redis.ttl(f"{channel(turn_id)}:log") > ENDED_TTL_SECONDS


async def test_finishing_while_redis_is_down_gives_up(log: EventLog, owner: Owner, redis: Valkey) -> None:
    """A worker does not hang on a turn that is over."""
    async with writing(log, new_turn(), owner) as writer:
        redis.kill()
        emit(writer, 1)
        async with asyncio.timeout(60):
            await writer.finish()
