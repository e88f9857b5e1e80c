"""Append, fence, tail: the scripts, one rule each."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from app.domain.events import START, EventId, from_line
from app.events.log import ENDED_TTL_SECONDS, TTL_SECONDS, EventLog, SyncLog, channel
from app.local.valkey import Valkey
from tests.integration.events.feeds import made, new_turn, subscriptions, tail, terminal, until


async def fenced(log: EventLog, fence: int = 1, last: EventId = START) -> str:
    turn_id = new_turn()
    await log.raise_fence(turn_id, fence, last)
    return turn_id


async def test_an_append_without_a_fence_is_missing(log: EventLog) -> None:
    """A flushed Redis is told from an empty turn; nothing is stored."""
    turn_id = new_turn()
    assert await log.append(turn_id, 1, made(1)) == "missing"
    assert await tail(log, turn_id) == []


async def test_appended_events_are_read_back_after_any_cursor(log: EventLog) -> None:
    """With their ids, kinds and data, and the id of the last."""
    turn_id, events = await fenced(log), made(5)
    assert await log.append(turn_id, 1, events) == "ok"
    for index, event in enumerate(events):
        read = await log.read(turn_id, event.id)
        assert (read.last, read.events) == (events[-1].id, events[index + 1 :])


async def test_what_is_there_already_is_skipped(log: EventLog) -> None:
    """An append whose reply was lost is made again without harm, also together with what follows."""
    turn_id, events = await fenced(log), made(4)
    await log.append(turn_id, 1, events[:2])
    assert await log.append(turn_id, 1, events[:2]) == "ok"
    assert await log.append(turn_id, 1, events) == "ok"
    assert await tail(log, turn_id) == events


async def test_a_hole_is_missing(log: EventLog) -> None:
    """Events that do not follow the log's last one are refused as a whole."""
    turn_id, events = await fenced(log), made(4)
    await log.append(turn_id, 1, events[:1])
    assert await log.append(turn_id, 1, events[2:]) == "missing"
    assert await tail(log, turn_id) == events[:1]


async def test_a_lower_fence_is_stale_and_a_higher_one_missing(log: EventLog) -> None:
    """Only the attempt that the fence names appends."""
    turn_id = await fenced(log, fence=2)
    assert await log.append(turn_id, 1, made(1)) == "stale"
    assert await log.append(turn_id, 3, made(1, fence=3)) == "missing"
    assert await log.append(turn_id, 2, made(1, fence=2)) == "ok"


async def test_raising_the_fence_gives_the_dead_attempts_tail(log: EventLog) -> None:
    """What comes after the last recorded event; the dead attempt is stale from then on."""
    turn_id, events = await fenced(log), made(5)
    await log.append(turn_id, 1, events)
    assert await log.raise_fence(turn_id, 2, events[1].id) == events[2:]
    assert await log.append(turn_id, 1, made(1, events[-1].id)) == "stale"
    assert await log.append(turn_id, 2, made(1, events[-1].id, fence=2)) == "ok"


async def test_raising_the_fence_of_an_unknown_turn_gives_none(log: EventLog) -> None:
    """None, that is unknown, not an empty tail; the log then begins behind what is recorded."""
    turn_id, recorded = new_turn(), made(3)
    assert await log.raise_fence(turn_id, 2, recorded[-1].id) is None
    assert await log.raise_fence(turn_id, 2, recorded[-1].id) is None
    assert (await log.read(turn_id, START)).last == recorded[-1].id
    assert await log.append(turn_id, 2, made(1, recorded[-1].id, fence=2)) == "ok"


async def test_a_lost_tail_is_lost_until_something_is_appended(log: EventLog, redis: Valkey) -> None:
    """Redis forgets what clients have seen, and the next attempt dies before it says anything, or the same one does as
    it writes its events again: the attempt after that must not use their numbers for something else."""
    turn_id, events = await fenced(log), made(4)
    await log.append(turn_id, 1, events)
    recorded = events[1].id
    redis.flush()
    assert await log.raise_fence(turn_id, 1, recorded) is None
    assert await log.raise_fence(turn_id, 3, recorded) is None
    sync = SyncLog(redis.url)
    assert sync.raise_fence(turn_id, 4, recorded) is None
    assert await log.raise_fence(turn_id, 5, recorded) is None
    behind = made(2, recorded, fence=5)
    assert await log.append(turn_id, 5, behind) == "ok"
    assert await log.raise_fence(turn_id, 7, recorded) == behind
    sync.close()


async def test_a_fence_is_lowered_only_by_naming_it(log: EventLog) -> None:
    """A late claim learns nothing; whoever asked Postgres may take back the fence that he saw before, and no other."""
    turn_id = await fenced(log, fence=3)
    assert await log.raise_fence(turn_id, 2, START) is None
    assert await log.append(turn_id, 3, made(1, fence=3)) == "ok"
    assert await log.raise_fence(turn_id, 1, START, instead_of=2) is None
    assert await log.fence(turn_id) == 3
    await log.raise_fence(turn_id, 2, START, instead_of=3)
    assert await log.fence(turn_id) == 2
    assert await log.append(turn_id, 3, made(2, fence=3)[1:]) == "missing"


async def test_the_log_goes_on_behind_what_was_recorded_but_never_published(log: EventLog) -> None:
    """A worker may die between its commit and the publishing."""
    turn_id, events = await fenced(log), made(3)
    await log.append(turn_id, 1, events[:2])
    assert await log.raise_fence(turn_id, 2, events[2].id) == []
    assert await log.append(turn_id, 2, made(1, events[2].id, fence=2)) == "ok"


async def test_a_trim_forgets_the_tail_through_an_event(log: EventLog) -> None:
    """What follows stays, and so does the knowledge of the last event."""
    turn_id, events = await fenced(log), made(6)
    await log.append(turn_id, 1, events[:4])
    await log.append(turn_id, 1, events[4:], trim=events[2].id)
    assert await tail(log, turn_id) == events[3:]
    assert (await log.read(turn_id, events[-1].id)).last == events[-1].id


async def test_each_append_refreshes_the_time_to_live(log: EventLog) -> None:
    """Both keys; a heartbeat does so while nothing is appended; the end of a turn shortens it."""
    turn_id = await fenced(log)
    keys = [f"{channel(turn_id)}:log", f"{channel(turn_id)}:tail"]
    await log.append(turn_id, 1, made(1), ttl_seconds=100)
    assert all([90 < await log.redis.ttl(key) <= 100 for key in keys])
    await log.touch([turn_id])
    assert all([100 < await log.redis.ttl(key) <= TTL_SECONDS for key in keys])


async def test_an_append_is_published_once_as_lines(log: EventLog) -> None:
    """One message for a batch, each event a line; nothing for what was there already."""
    turn_id, events = await fenced(log), made(3)
    async with log.subscriber.pubsub() as listener:
        await listener.subscribe(channel(turn_id))
        await until(lambda: subscriptions(log, channel(turn_id)))
        await log.append(turn_id, 1, events[:2])
        await log.append(turn_id, 1, events[:2])
        await log.append(turn_id, 1, events)
        messages: list[str] = []
        async with asyncio.timeout(60):
            while len(messages) < 2:
                message = await listener.get_message(ignore_subscribe_messages=True, timeout=1)
                messages += [message["data"]] if message else []
    assert [[from_line(line) for line in message.split("\n")] for message in messages] == [events[:2], events[2:]]


async def test_appends_of_many_turns_at_once_do_not_mix(log: EventLog) -> None:
    """They share round trips, and each has its own outcome, also when Redis has lost its scripts."""
    turn_ids = [await fenced(log) for _ in range(300)]
    await log.redis.script_flush()
    unknown = new_turn()
    outcomes = await asyncio.gather(
        *(log.append(turn_id, 1, made(2)) for turn_id in turn_ids), log.append(unknown, 1, made(1))
    )
    assert outcomes == ["ok"] * 300 + ["missing"]
    assert all([await tail(log, turn_id) == made(2) for turn_id in turn_ids])
    assert await log.lasts([turn_ids[0], unknown]) == {turn_ids[0]: made(2)[-1].id}


async def test_whoever_ends_a_turn_without_a_loop_publishes_its_end(log: EventLog, redis: Valkey) -> None:
    """The fence is raised, the terminal event follows what is recorded, and the log lives on for late readers."""
    sync, turn_id, events = SyncLog(redis.url), await fenced(log), made(3)
    await log.append(turn_id, 1, events)
    assert sync.raise_fence(turn_id, 2, events[0].id) == events[1:]
    end = terminal(events[-1].id, fence=2)
    assert sync.publish_end(turn_id, [end])
    assert await tail(log, turn_id, events[-1].id) == [end]
    assert 0 < await log.redis.ttl(f"{channel(turn_id)}:log") <= ENDED_TTL_SECONDS
    unknown = new_turn()
    assert sync.publish_end(unknown, [end])
    assert await tail(log, unknown) == [end]
    sync.close()


def test_the_synchronous_log_reports_an_outage_and_goes_on(redis: Valkey) -> None:
    """Whoever ends a turn does not depend on Redis."""
    sync = SyncLog(redis.url)
    redis.kill()
    assert sync.raise_fence(new_turn(), 1, START) is None
    assert sync.publish_end(new_turn(), [terminal(START)]) is False
    redis.start()
    assert sync.publish_end(new_turn(), [terminal(START)]) is True
    sync.close()


async def test_connections_that_died_unseen_cost_nothing(log: EventLog, redis: Valkey) -> None:
    """Nothing fails when Redis is there: an attempt that takes over asks for the dead one's tail just once."""
    turn_id, events = await fenced(log), made(3)
    await log.append(turn_id, 1, events)
    sync = SyncLog(redis.url)
    sync.ping()
    for fence in (2, 3):
        redis.ask("CLIENT KILL TYPE normal")
        assert await log.raise_fence(turn_id, fence, START) == events
        redis.ask("CLIENT KILL TYPE normal")
        assert sync.raise_fence(turn_id, fence, START) == events
    sync.close()


async def test_every_append_is_answered_whatever_goes_wrong(log: EventLog) -> None:
    """What cannot even be sent fails, with all that shares its round trip, and later ones go on."""
    turn_id, [event] = await fenced(log), made(1)
    unsendable = replace(event, data="\ud800")
    async with asyncio.timeout(60):
        failed = await asyncio.gather(
            *(log.append(turn_id, 1, [each]) for each in (unsendable, event)), return_exceptions=True
        )
    assert [type(one) for one in failed] == [UnicodeEncodeError, UnicodeEncodeError]
    assert await log.append(turn_id, 1, [event]) == "ok"
