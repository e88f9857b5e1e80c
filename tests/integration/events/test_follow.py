"""Replay, then live: every event once, in order, from wherever a follower joins."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import pytest

from app.domain.errors import NotFound
from app.domain.events import LOST_TAIL_LEAP, START, Event, EventId, EventKind, number, to_line
from app.domain.turns import TurnStatus
from app.events.follow import EVENTS_AT_ONCE, Relay
from app.events.log import EventLog, channel
from app.local.valkey import Valkey
from tests.integration.events.conftest import listening
from tests.integration.events.feeds import Follower, MemoryRecords, made, new_turn, subscriptions, terminal, until


@pytest.fixture
def turn_id(records: MemoryRecords) -> str:
    return records.accept(new_turn())


async def subscribed(relay: Relay, *turn_ids: str) -> None:
    await until(
        lambda: all(
            channel(one) in relay._channels and relay._channels[channel(one)].subscribed.is_set() for one in turn_ids
        )
    )


async def appended(log: EventLog, turn_id: str, events: list[Event], **more: Any) -> None:
    assert await log.append(turn_id, events[-1].id.fence, events, **more) == "ok"


async def stored(log: EventLog, turn_id: str, events: list[Event]) -> None:
    """Appends to the log in Redis, and publishes nothing."""
    for event in events:
        fields: dict[Any, Any] = {"a": str(event.after), "k": event.kind.value, "d": event.data}
        await log.redis.xadd(f"{channel(turn_id)}:tail", fields, str(event.id))
    last: dict[Any, Any] = {"lf": str(events[-1].id.fence), "ln": str(events[-1].id.n)}
    await log.redis.hset(f"{channel(turn_id)}:log", mapping=last)


async def published(log: EventLog, turn_id: str, events: list[Event]) -> None:
    """Publishes one message, and appends nothing."""
    await log.redis.publish(channel(turn_id), "\n".join(map(to_line, events)))


async def test_events_arrive_live_and_the_stream_ends_with_the_turn(
    log: EventLog, patient_relay: Relay, turn_id: str
) -> None:
    """A follower that was there before the first event gets each as it is published."""
    await log.raise_fence(turn_id, 1, START)
    follower, events = Follower(patient_relay, turn_id), made(5)
    await subscribed(patient_relay, turn_id)
    for index, event in enumerate(events, 1):
        await appended(log, turn_id, [event])
        await follower.has(events[:index])
    end = terminal(events[-1].id)
    await appended(log, turn_id, [end])
    assert await follower.ended() == [*events, end]
    assert patient_relay.streams == 0


@pytest.mark.parametrize("join", range(8))
async def test_a_late_joiner_gets_all_after_its_cursor(
    log: EventLog, patient_relay: Relay, records: MemoryRecords, turn_id: str, join: int
) -> None:
    """From segments, the tail and what is live, wherever the cursor is."""
    events = [*made(7), terminal(made(7)[-1].id)]
    await log.raise_fence(turn_id, 1, START)
    await appended(log, turn_id, events[:5])
    records.record(turn_id, events[:2])
    records.record(turn_id, events[2:4])
    await appended(log, turn_id, events[5:6], trim=events[3].id)
    cursor = events[join - 1].id if join else START
    follower = Follower(patient_relay, turn_id, cursor)
    if join < 6:
        await follower.has(events[join:6])
    await subscribed(patient_relay, turn_id)
    await appended(log, turn_id, events[6:])
    assert await follower.ended() == events[join:]


@pytest.mark.parametrize("where", ["Redis", "Postgres"])
async def test_an_ended_turn_is_replayed_and_the_stream_ends(
    log: EventLog, patient_relay: Relay, records: MemoryRecords, turn_id: str, where: str
) -> None:
    """Whether Redis still has it or not; one who has everything gets an end at once."""
    events = [*made(4), terminal(made(4)[-1].id)]
    records.record(turn_id, events[:3])
    records.record(turn_id, events[3:])
    if where == "Redis":
        await log.raise_fence(turn_id, 1, START)
        await appended(log, turn_id, events)
    assert await Follower(patient_relay, turn_id).ended() == events
    assert await Follower(patient_relay, turn_id, events[2].id).ended() == events[3:]
    assert await Follower(patient_relay, turn_id, events[-1].id).ended() == []


async def test_replay_equals_live_byte_for_byte(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """What goes on the wire is the same live, from the tail, and from Postgres."""
    odd = ['{"text":"line\\u2028end"}', '{"text":"\\ud83d\\udc2b"}', '{"text":"a b  c"}', '{"text":"\\\\n"}']
    events = number(START, 1, [*((EventKind.STEP_PROGRESS, data) for data in odd), (EventKind.TURN_COMPLETE, "{}")], 1)
    await log.raise_fence(turn_id, 1, START)
    live = Follower(relay, turn_id)
    await subscribed(relay, turn_id)
    for event in events:
        await appended(log, turn_id, [event])
    records.record(turn_id, events)
    streams = [await live.ended(), await Follower(relay, turn_id).ended()]
    await log.redis.flushall()
    streams.append(await Follower(relay, turn_id).ended())
    wire = [b"".join(event.sse() for event in stream) for stream in streams]
    assert wire[0] == wire[1] == wire[2] == b"".join(event.sse() for event in events)


async def test_a_stream_ends_with_its_leg(
    log: EventLog, patient_relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """A later leg is not its business, even if it is there already; from that cursor on it is."""
    first = [*made(2), made(1, made(2)[-1].id, kind=EventKind.TURN_AWAITING_INPUT)[0]]
    second = [*made(2, first[-1].id, 2), terminal(EventId(2, 5), 2)]
    await log.raise_fence(turn_id, 1, START)
    await appended(log, turn_id, first)
    records.record(turn_id, first)
    await log.raise_fence(turn_id, 2, first[-1].id)
    await appended(log, turn_id, second)
    records.record(turn_id, second)
    assert await Follower(patient_relay, turn_id).ended() == first
    assert await Follower(patient_relay, turn_id, first[-1].id).ended() == second
    assert await Follower(patient_relay, turn_id, through_legs=True).ended() == [*first, *second]


async def test_a_stream_through_legs_ends_when_input_is_awaited(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """It goes on only if the turn was resumed meanwhile."""
    first = [*made(2), made(1, made(2)[-1].id, kind=EventKind.TURN_AWAITING_INPUT)[0]]
    records.record(turn_id, first)
    assert await Follower(relay, turn_id, through_legs=True).ended() == first
    records.status[turn_id] = TurnStatus.QUEUED
    resumed = Follower(relay, turn_id, through_legs=True)
    await resumed.has(first)
    end = terminal(first[-1].id, 2)
    await log.raise_fence(turn_id, 2, first[-1].id)
    await appended(log, turn_id, [end])
    assert await resumed.ended() == [*first, end]


async def test_a_jump_in_what_is_published_sends_the_follower_to_the_log(
    log: EventLog, patient_relay: Relay, turn_id: str
) -> None:
    """A message was lost on the way: nothing is missing, nothing comes twice."""
    events = made(6)
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(patient_relay, turn_id)
    await subscribed(patient_relay, turn_id)
    await appended(log, turn_id, events[:2])
    await follower.has(events[:2])
    await stored(log, turn_id, events[2:4])  # a lost message is in the log only
    await appended(log, turn_id, events[4:])
    await follower.has(events)
    await follower.close()


@pytest.mark.parametrize("seed", range(20))
async def test_messages_may_be_lost_doubled_and_reordered(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str, seed: int
) -> None:
    """Whatever becomes of the messages, late ones of a dead attempt among them: every event comes once, in order.

    Postgres has some of the log or none; in some runs Redis loses all of it at the end.
    """
    chance = random.Random(seed)
    dead = made(20)
    alive = [*made(40, dead[11].id, 3), terminal(EventId(3, 52), 3)]
    whole, late = [*dead[:12], *alive], dead[13:]
    await log.raise_fence(turn_id, 1, START)
    followers = [Follower(relay, turn_id), Follower(relay, turn_id, whole[5].id)]
    await subscribed(relay, turn_id)
    messages = []
    for at in range(0, len(whole), 4):
        batch = whole[at : at + 4]
        await stored(log, turn_id, batch)
        messages += [batch] * chance.choice([0, 1, 1, 2])
        if chance.random() < 0.3:
            records.segments[turn_id] = [whole[: at + len(batch)]]
        if at >= 16 and chance.random() < 0.5:
            messages.append(chance.sample(late, 1))
        if chance.random() < 0.5:
            chance.shuffle(messages)
            for message in messages:
                await published(log, turn_id, message)
            messages = []
    if chance.random() < 0.5:
        records.segments[turn_id] = [whole]
        records.status[turn_id] = TurnStatus.COMPLETED
        await log.redis.flushall()
    assert await followers[0].ended() == whole
    assert await followers[1].ended() == whole[6:]


async def test_a_full_buffer_sends_the_follower_to_the_log(log: EventLog, records: MemoryRecords, turn_id: str) -> None:
    """A slow client costs a bounded amount of memory, and loses nothing."""
    events = [*made(200), terminal(made(200)[-1].id)]
    await log.raise_fence(turn_id, 1, START)
    async with Relay(log, records, silence_seconds=1000, buffer_bytes=500) as relay:
        await listening(log)
        stream = relay.follow(turn_id, START, through_legs=False)
        first = asyncio.ensure_future(anext(stream))
        await subscribed(relay, turn_id)
        await appended(log, turn_id, events[:1])
        got = await first
        for event in events[1:]:
            await appended(log, turn_id, [event])
        await until(lambda: next(iter(relay._channels[channel(turn_id)].inboxes))._nudged)
        async for batch in stream:
            got += batch
    assert got == events


async def test_many_followers_of_a_turn_share_one_subscription(
    log: EventLog, patient_relay: Relay, turn_id: str
) -> None:
    """Each gets everything from its own cursor; the last to leave ends the subscription."""
    events = made(20)
    await log.raise_fence(turn_id, 1, START)
    await appended(log, turn_id, events[:10])
    followers = [Follower(patient_relay, turn_id, events[index % 10].id) for index in range(50)]
    await subscribed(patient_relay, turn_id)
    await until(lambda: patient_relay.streams == 50)
    assert await subscriptions(log, channel(turn_id)) == 1
    await appended(log, turn_id, events[10:])
    for index, follower in enumerate(followers):
        await follower.has(events[index % 10 + 1 :])
        await follower.close()
    assert patient_relay.streams == 0

    async def unsubscribed() -> bool:
        return await subscriptions(log, channel(turn_id)) == 0

    await until(unsubscribed)


async def test_followers_that_come_while_redis_is_being_connected_are_all_live(
    log: EventLog, records: MemoryRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection carries them all, however many ask for it before it stands."""
    connect: Any = log.subscriber.connection_pool.get_connection
    gate, waiting = asyncio.Event(), list[bool]()

    async def slow(*args: Any, **kwargs: Any) -> Any:
        waiting.append(True)
        await gate.wait()
        return await connect(*args, **kwargs)

    monkeypatch.setattr(log.subscriber.connection_pool, "get_connection", slow)
    turn_ids = [records.accept(new_turn()) for _ in range(3)]
    for one in turn_ids:
        await log.raise_fence(one, 1, START)
    async with Relay(log, records, silence_seconds=1000, buffer_bytes=100_000) as relay:
        early = Follower(relay, turn_ids[0])
        await until(lambda: waiting)
        followers = [early, *(Follower(relay, one) for one in turn_ids[1:])]
        await until(lambda: relay.streams == 3)
        gate.set()
        for one, follower in zip(turn_ids, followers, strict=True):
            await appended(log, one, made(1))
            await follower.has(made(1))
            await follower.close()


async def test_events_of_a_dead_attempt_never_follow_those_of_its_successor(
    log: EventLog, patient_relay: Relay, turn_id: str
) -> None:
    """A stopped-and-continued worker publishes late: its events are dropped, by the log and by the follower."""
    await log.raise_fence(turn_id, 1, START)
    follower, old = Follower(patient_relay, turn_id), made(4)
    await subscribed(patient_relay, turn_id)
    await appended(log, turn_id, old[:2])
    await log.raise_fence(turn_id, 3, START)
    new = made(2, old[1].id, 3)
    await appended(log, turn_id, new[:1])
    await follower.has([*old[:2], new[0]])
    assert await log.append(turn_id, 1, old[2:]) == "stale"
    await published(log, turn_id, old[2:])
    await appended(log, turn_id, new[1:])
    await follower.has([*old[:2], *new])
    await follower.close()


async def test_a_leap_over_a_lost_tail_is_followed(
    log: EventLog, patient_relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """One who saw the lost events and one who did not get the same from there on."""
    old = made(5)
    await log.raise_fence(turn_id, 1, START)
    watcher = Follower(patient_relay, turn_id)
    await subscribed(patient_relay, turn_id)
    await appended(log, turn_id, old)
    await watcher.has(old)
    records.record(turn_id, old[:3])
    await log.redis.flushall()
    assert await log.raise_fence(turn_id, 3, old[2].id) is None
    leapt = number(old[2].id, 3, [(EventKind.TURN_COMPLETE, "{}")], old[2].id.n + 1 + LOST_TAIL_LEAP)
    await appended(log, turn_id, leapt)
    assert await watcher.ended() == [*old, *leapt]
    records.record(turn_id, leapt)
    assert await Follower(patient_relay, turn_id).ended() == [*old[:3], *leapt]
    assert await Follower(patient_relay, turn_id, old[4].id).ended() == leapt


async def test_what_was_recorded_but_never_published_is_not_left_out(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """A worker died between its commit and the publishing; its successor's events stand behind the hole in Redis."""
    events = made(4)
    await log.raise_fence(turn_id, 1, START)
    await appended(log, turn_id, events[:3])
    records.record(turn_id, events)
    await log.raise_fence(turn_id, 3, events[3].id)
    end = terminal(events[3].id, 3)
    await appended(log, turn_id, [end])
    records.record(turn_id, [end])
    for seen in range(4):
        cursor = events[seen - 1].id if seen else START
        assert await Follower(relay, turn_id, cursor).ended() == [*events[seen:], end]


async def test_an_end_that_was_recorded_but_never_published_ends_the_stream(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """A worker died between the commit of the turn's end and the publishing: nobody will publish it any more."""
    events = made(3)
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(relay, turn_id)
    await subscribed(relay, turn_id)
    await appended(log, turn_id, events)
    await follower.has(events)
    end = terminal(events[-1].id)
    records.record(turn_id, [*events, end])
    assert await follower.ended() == [*events, end]
    assert await Follower(relay, turn_id).ended() == [*events, end]


async def test_a_missed_event_is_found_after_some_silence(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """It was published while nobody was subscribed, or Redis had lost the turn: the log or Postgres has it."""
    follower = Follower(relay, turn_id)
    await subscribed(relay, turn_id)
    first = made(2)
    records.record(turn_id, first)
    await follower.has(first)
    end = terminal(first[-1].id)
    records.record(turn_id, [end])
    assert await follower.ended() == [*first, end]


async def test_a_stream_outlives_outages_of_redis_and_postgres(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str, redis: Valkey
) -> None:
    """While Redis is down it gets what is recorded; afterwards it is live again."""
    events = made(5)
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(relay, turn_id)
    await appended(log, turn_id, events[:1])
    await follower.has(events[:1])
    redis.kill()
    records.available = False
    records.record(turn_id, events[:3])
    asked = records.asked
    await until(lambda: records.asked > asked)
    records.available = True
    await follower.has(events[:3])
    redis.start()  # in this thread: with the one that starts it, it ends
    await subscribed(relay, turn_id)
    again = EventLog(redis.url)
    await again.raise_fence(turn_id, 1, events[2].id)
    await appended(again, turn_id, events[3:])
    await again.close()
    await follower.has(events)
    await follower.close()


async def test_a_follower_that_joins_while_redis_is_down_gets_what_is_recorded(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str, redis: Valkey
) -> None:
    """A finished turn is served whole."""
    events = [*made(3), terminal(made(3)[-1].id)]
    records.record(turn_id, events)
    redis.kill()
    assert await Follower(relay, turn_id).ended() == events


@pytest.mark.parametrize("seen", [0, 2])
async def test_a_turn_that_is_deleted_cuts_its_streams(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str, seen: int
) -> None:
    """NotFound, so that the stream is not ended as if it were complete."""
    events = made(2)
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(relay, turn_id)
    await subscribed(relay, turn_id)
    if seen:
        await appended(log, turn_id, events)
        await follower.has(events)
    records.delete(turn_id)
    with pytest.raises(NotFound):
        await follower.ended()


async def test_a_turn_that_is_deleted_while_it_awaits_input_cuts_its_streams(
    log: EventLog, relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """Its end was recorded and is gone: a stream through legs must not end as if nothing came after the leg."""
    leg = [*made(2), made(1, made(2)[-1].id, kind=EventKind.TURN_AWAITING_INPUT)[0]]
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(relay, turn_id, through_legs=True)
    await subscribed(relay, turn_id)
    records.delete(turn_id)
    await appended(log, turn_id, leg)
    with pytest.raises(NotFound):
        await follower.ended()


async def test_a_slow_follower_holds_a_page_of_the_log(
    log: EventLog, patient_relay: Relay, records: MemoryRecords, turn_id: str
) -> None:
    """However long the log is, in Redis or in Postgres: what it has not taken is not read."""
    events = [*made(3 * EVENTS_AT_ONCE), terminal(made(3 * EVENTS_AT_ONCE)[-1].id)]
    await log.raise_fence(turn_id, 1, START)
    await appended(log, turn_id, events)
    for _ in range(2):
        got = []
        async for batch in patient_relay.follow(turn_id, START, through_legs=False):
            assert len(batch) <= EVENTS_AT_ONCE
            got += batch
        assert got == events
        records.record(turn_id, events)
        await log.redis.flushall()


async def test_a_subscription_that_is_cut_is_made_anew_at_once(
    log: EventLog, patient_relay: Relay, turn_id: str, redis: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """What was published meanwhile is read from the log, although nothing else comes."""
    events = made(4)
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(patient_relay, turn_id)
    await subscribed(patient_relay, turn_id)
    await appended(log, turn_id, events[:2])
    await follower.has(events[:2])
    redis.ask("CLIENT KILL TYPE pubsub")
    await appended(log, turn_id, events[2:])
    await follower.has(events)
    await follower.close()
    assert "Redis is not available (REDIS_URL), streams go on from Postgres" in caplog.text


async def test_a_connection_that_hangs_is_given_up(
    log: EventLog, relay: Relay, turn_id: str, redis: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis is stopped, and answers nothing: the log says so; afterwards followers are live again."""
    caplog.set_level("INFO")
    await log.raise_fence(turn_id, 1, START)
    follower = Follower(relay, turn_id)
    await subscribed(relay, turn_id)
    assert redis.pid
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        await until(lambda: "it does not answer" in caplog.text)
        await until(lambda: not relay._channels[channel(turn_id)].subscribed.is_set())
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    await subscribed(relay, turn_id)
    await appended(log, turn_id, made(2))
    await follower.has(made(2))
    await follower.close()
    assert "Redis is available again" in caplog.text
