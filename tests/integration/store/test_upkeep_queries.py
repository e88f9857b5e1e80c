"""Leases, lost workers, limits and purging, as upkeep asks for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from threading import Barrier

import pytest
from sqlalchemy import Connection, text

from app.domain.errors import NotFound, TurnFailure
from app.domain.events import LOST_TAIL_LEAP, EventId, EventKind
from app.domain.turns import TurnStatus, isolated_from
from app.store import agents, claims, turns, workers
from app.store.workers import Renewal
from tests.integration.store.seeds import OWNER, Seeds, inference_step, next_event, next_events, no_redis, unhurried
from tests.support import wait_until


def test_a_lease_that_ran_out_is_found_dead_once_and_never_renewed(seeds: Seeds) -> None:
    """Found dead by one of many reapers; renewing then says so. One that is merely expired may be renewed."""
    expired, renewed, alive = seeds.worker(0), seeds.worker(0), seeds.worker(60)
    assert seeds.store.transact(workers.renew, renewed, 60) is not None

    def dead(worker_id: str) -> bool:
        return bool(seeds.scalar("SELECT dead_at IS NOT NULL FROM workers WHERE worker_id = :id", id=worker_id))

    # Nobody reaps within one lease of Postgres's start.
    wait_until(lambda: seeds.store.transact(workers.mark_dead, 0.05) or dead(expired))
    assert [dead(worker_id) for worker_id in (expired, renewed, alive)] == [True, False, False]
    assert seeds.store.transact(workers.renew, expired, 60) is None
    assert seeds.store.transact(workers.mark_dead, 0.05) == 0


def test_a_worker_stopped_in_mid_renewal_holds_no_reaper_up(seeds: Seeds) -> None:
    """Its row is locked: it is left for later, and the others are found dead."""
    stopped, expired = seeds.worker(0), seeds.worker(0)

    def found_dead(worker_id: str) -> bool:
        seeds.store.transact(workers.mark_dead, 0.01)
        return bool(seeds.scalar("SELECT dead_at IS NOT NULL FROM workers WHERE worker_id = :id", id=worker_id))

    with unhurried(seeds.store) as renewing:
        workers.renew(renewing, stopped, 0)
        wait_until(lambda: found_dead(expired))
        assert not found_dead(stopped)
    wait_until(lambda: found_dead(stopped))


def test_nobody_reaps_within_one_lease_of_postgres_start(seeds: Seeds) -> None:
    """After an outage of Postgres no worker had a chance to renew."""
    expired = seeds.worker(0)
    assert seeds.store.transact(workers.mark_dead, 1e6) == 0
    assert seeds.store.transact(workers.renew, expired, 60) is not None


def test_a_retired_worker_can_be_reaped_at_once(seeds: Seeds) -> None:
    """Who stops in order does not make others wait for his lease."""
    worker_id = seeds.worker(600)
    assert worker_id in {row.worker_id for row in seeds.store.transact(workers.live_workers)}
    seeds.store.transact(workers.retire, worker_id)
    assert worker_id not in {row.worker_id for row in seeds.store.transact(workers.live_workers)}
    wait_until(lambda: seeds.store.transact(workers.mark_dead, 0.01) >= 0)
    assert seeds.store.transact(workers.renew, worker_id, 60) is None


def test_a_renewal_brings_the_turns_to_cancel(seeds: Seeds) -> None:
    """Those asked to be cancelled and those past their deadline; only the worker's own running ones."""
    worker_id = seeds.worker()
    asked, late, fine = (seeds.claimed(worker_id=worker_id).turn_id for _ in range(3))
    other = seeds.claimed().turn_id
    for turn_id in (asked, other):
        assert seeds.cancel(turn_id) == TurnStatus.RUNNING
    seeds.age(late, "deadline_at", 100)
    expected = Renewal(owned={asked, late, fine}, cancelled={asked}, overdue={late})
    assert seeds.store.transact(workers.renew, worker_id, 60) == expected
    assert seeds.row(fine).status == TurnStatus.RUNNING


def test_live_workers_tells_how_many_turns_each_runs(seeds: Seeds) -> None:
    """Only running turns count."""
    worker_id = seeds.worker()
    seeds.complete(seeds.claimed(worker_id=worker_id))
    seeds.claimed(worker_id=worker_id)
    [row] = [row for row in seeds.store.transact(workers.live_workers) if row.worker_id == worker_id]
    assert row.running == 1


def test_a_turn_of_a_dead_worker_is_queued_again_by_one_of_many(seeds: Seeds) -> None:
    """It is an orphan until one reaper takes it: fence raised, one failure, its tail in doubt."""
    claim = seeds.claimed()
    seeds.kill(claim.worker_id)
    assert claim.turn_id in seeds.store.transact(workers.orphans)
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda _: seeds.lose_worker(claim), range(6)))
    assert sorted(taken, key=str) == sorted([(claim.turn_id, None)] + [(None, None)] * 5, key=str)
    assert claim.turn_id not in seeds.store.transact(workers.orphans)
    row = seeds.row(claim.turn_id)
    assert (row.status, row.fence) == (TurnStatus.QUEUED, claim.fence + 1)
    assert (seeds.column(claim.turn_id, "failures"), seeds.column(claim.turn_id, "tail_lost")) == (1, True)


def test_a_turn_of_a_live_worker_is_not_taken(seeds: Seeds) -> None:
    """A lease that is merely expired does not count as dead."""
    claim = seeds.claimed(worker_id=seeds.worker())
    assert claim.turn_id not in seeds.store.transact(workers.orphans)
    assert seeds.store.transact(workers.take_from_dead, claim.turn_id, 3, no_redis) == (None, None)
    assert seeds.store.transact(claims.still_owned, claim)


def test_losses_count_only_while_no_step_is_recorded(seeds: Seeds) -> None:
    """Two losses, a step, two losses: the turn lives with a limit of three."""
    turn_id = seeds.turn()
    assert seeds.lose_worker(seeds.claimed(turn_id)) == (turn_id, None)
    assert seeds.lose_worker(seeds.claimed(turn_id)) == (None, None)
    seeds.suspect_no_longer(turn_id)
    assert seeds.column(turn_id, "failures") == 2
    claim = seeds.claimed(turn_id)
    claim = seeds.record(claim, [next_event(claim)], step=inference_step(turn_id))
    assert seeds.column(turn_id, "failures") == 0
    assert seeds.lose_worker(claim) == (turn_id, None)
    assert seeds.lose_worker(seeds.claimed(turn_id)) == (None, None)
    assert seeds.row(turn_id).status == TurnStatus.QUEUED


def test_a_suspected_turn_waits_before_its_next_try(seeds: Seeds) -> None:
    """After two losses in a row nobody can claim it for about 2 s, and its doorbell rings when they are over."""
    turn_id = seeds.turn()
    for _ in range(2):
        seeds.lose_worker(seeds.claimed(turn_id))
    left = seeds.scalar("SELECT extract(epoch FROM claimable_at - now()) FROM turns WHERE turn_id = :id", id=turn_id)
    assert 0 < left <= 3
    assert seeds.claim(turn_id) is None
    assert turn_id not in seeds.store.transact(workers.to_ring, backing_off=True)
    seeds.suspect_no_longer(turn_id)
    assert turn_id in seeds.store.transact(workers.to_ring, backing_off=True)
    assert seeds.claim(turn_id) is not None


def test_a_last_try_is_for_a_process_of_its_own(seeds: Seeds) -> None:
    """A common claim leaves it, and can tell why it got nothing; a wait comes before."""
    turn_id, worker_id = seeds.turn(), seeds.worker()
    limit = {"fewer_failures_than": isolated_from(3)}
    assert not seeds.store.transact(claims.wants_process, turn_id, isolated_from(3))
    for _ in range(2):
        seeds.lose_worker(seeds.claimed(turn_id))
    assert not seeds.store.transact(claims.wants_process, turn_id, isolated_from(3))
    seeds.suspect_no_longer(turn_id)
    assert seeds.store.transact(claims.claim, turn_id, worker_id, 60.0, **limit) is None
    assert seeds.store.transact(claims.wants_process, turn_id, isolated_from(3))
    assert seeds.store.transact(claims.claim, turn_id, worker_id, 60.0) is not None
    assert not seeds.store.transact(claims.wants_process, turn_id, isolated_from(3))


def test_a_claim_whose_reply_was_lost_costs_nothing(seeds: Seeds) -> None:
    """Its worker finds that it owns the turn and puts it back; what it could not run by its own fault costs one."""
    claim = seeds.claimed()
    for broken, failures in ((False, 0), (True, 1)):
        given = seeds.store.transact(workers.disown, claim.turn_id, claim.worker_id, 3, no_redis, broken=broken)
        assert given == (claim.turn_id, None)
        assert seeds.column(claim.turn_id, "failures") == failures
        claim = seeds.claimed(claim.turn_id)


def test_a_suspected_turn_may_wait_until_its_deadline(seeds: Seeds) -> None:
    """Processes of their own are few: no queue wait ends it while workers live; the end of its time does."""
    turn_id, worker_id = seeds.turn(), seeds.worker()
    for _ in range(2):
        seeds.lose_worker(seeds.claimed(turn_id))
    seeds.age(turn_id, "queued_at", 1000)
    assert overdue(seeds, turn_id) is None
    seeds.age(turn_id, "deadline_at", 1000)
    failure = overdue(seeds, turn_id)
    assert failure is not None
    assert failure.code == "turn_timeout"
    ended = seeds.store.transact(workers.end_overdue, turn_id, 300.0, no_redis)
    assert ended is not None
    assert ended.status == TurnStatus.FAILED
    seeds.kill(worker_id)


def test_a_turn_that_was_taken_meanwhile_is_not_ended_as_overdue(seeds: Seeds) -> None:
    """Upkeep looks again before it ends what it found a moment ago."""
    turn_id = seeds.turn()
    seeds.age(turn_id, "queued_at", 301)
    assert overdue(seeds, turn_id) is not None
    claim = seeds.claimed(turn_id)
    assert seeds.store.transact(workers.end_overdue, turn_id, 300.0, no_redis) is None
    seeds.store.transact(claims.hand_over, claim, [])
    assert seeds.store.transact(workers.end_overdue, turn_id, 300.0, no_redis) is None
    assert seeds.row(turn_id).status == TurnStatus.QUEUED


def test_events_without_a_step_do_not_forgive_a_loss(seeds: Seeds) -> None:
    """A worker that dies in every inference gets nowhere, however much it streams."""
    claim = seeds.claimed()
    seeds.lose_worker(claim)
    claim = seeds.claimed(claim.turn_id)
    seeds.record(claim, [next_event(claim)])
    assert seeds.column(claim.turn_id, "failures") == 1


def test_too_many_losses_fail_the_turn_with_a_terminal_event(seeds: Seeds) -> None:
    """Error `worker_lost`, an event of a new fence, its number leaping over what clients may have seen."""
    turn_id = seeds.turn()
    claim = seeds.claimed(turn_id)
    claim = seeds.record(claim, [next_event(claim)])
    queued, ended = seeds.lose_worker(claim, max_losses=1)
    assert queued is None
    assert ended is not None
    [terminal] = ended.events
    assert (terminal.kind, terminal.after) == (EventKind.ERROR, claim.last)
    assert terminal.id == EventId(claim.fence + 1, claim.last.n + 1 + LOST_TAIL_LEAP)
    row = seeds.row(turn_id)
    assert (row.status, (row.error or {})["code"], row.last) == (TurnStatus.FAILED, "worker_lost", terminal.id)
    assert seeds.events(turn_id)[-1] == terminal


def test_a_dead_attempts_tail_is_stored_before_the_terminal_event(seeds: Seeds) -> None:
    """What clients saw is replayed; no leap is needed then."""
    claim = seeds.claimed()
    tail = next_events(claim, EventKind.STEP_START, EventKind.STEP_PROGRESS)
    asked = []

    def redis(turn_id: str, fence: int, last: EventId) -> list[object]:
        asked.append((turn_id, fence, last))
        return list(tail)

    seeds.kill(claim.worker_id)
    failure = TurnFailure("cancelled", "Cancelled.")
    ended = seeds.store.transact(turns.end, claim.turn_id, failure, redis, running=True)  # type: ignore[arg-type]
    assert asked == [(claim.turn_id, claim.fence + 1, claim.last)]
    assert ended is not None
    assert ended.events[0].id == EventId(claim.fence + 1, tail[-1].id.n + 1)
    assert seeds.events(claim.turn_id) == [*tail, *ended.events]


@pytest.mark.parametrize("why", ["cancel", "deadline"])
def test_a_dead_workers_turn_that_was_to_end_ends(seeds: Seeds, why: str) -> None:
    """A cancel request and a deadline outlive the worker that should have honoured them."""
    claim = seeds.claimed()
    if why == "cancel":
        seeds.cancel(claim.turn_id)
    else:
        seeds.age(claim.turn_id, "deadline_at", 100)
    _, ended = seeds.lose_worker(claim)
    assert ended is not None
    expected = (TurnStatus.CANCELLED, "cancelled") if why == "cancel" else (TurnStatus.FAILED, "turn_timeout")
    row = seeds.row(claim.turn_id)
    assert (row.status, (row.error or {})["code"]) == expected


@pytest.mark.parametrize("state", ["running", "completed"])
def test_end_leaves_a_running_or_ended_turn_alone(seeds: Seeds, state: str) -> None:
    """Whoever owns a turn ends it; an end is final."""
    claim = seeds.claimed()
    if state == "completed":
        seeds.complete(claim)
    before = seeds.row(claim.turn_id)
    assert seeds.store.transact(turns.end, claim.turn_id, TurnFailure("cancelled", "no"), no_redis) is None
    assert seeds.row(claim.turn_id) == before


def test_a_cancel_ends_what_nobody_runs_and_asks_for_the_rest(seeds: Seeds) -> None:
    """It tells how the turn stands then; asking twice changes nothing."""
    queued, awaiting = seeds.turn(), seeds.await_input(seeds.claimed()).turn_id
    for turn_id in (queued, awaiting, queued, awaiting):
        assert seeds.cancel(turn_id) == TurnStatus.CANCELLED
    assert seeds.cancel("00000000-0000-0000-0000-000000000000") is None
    claim = seeds.claimed()
    assert seeds.cancel(claim.turn_id) == TurnStatus.RUNNING
    first = seeds.column(claim.turn_id, "cancel_requested_at")
    assert seeds.cancel(claim.turn_id) == TurnStatus.RUNNING
    assert seeds.column(claim.turn_id, "cancel_requested_at") == first
    seeds.complete(claim)
    assert seeds.cancel(claim.turn_id) == TurnStatus.COMPLETED


def test_claimable_turns_are_rung_again_with_backoff(seeds: Seeds) -> None:
    """After 4 s, 8 s, 16 s and so on up to a minute; running turns and those behind others never."""
    session_id = seeds.session()
    first, behind, running = seeds.turn(session_id), seeds.turn(session_id), seeds.claimed().turn_id
    for turn_id in (behind, running):
        seeds.age(turn_id, "rung_at", 1000)
    for wait in (4, 8, 16, 32, 60, 60):
        seeds.age(first, "rung_at", wait - 1)
        assert first not in seeds.store.transact(workers.to_ring, backing_off=True)
        seeds.age(first, "rung_at", 1.5)
        rung = seeds.store.transact(workers.to_ring, backing_off=True)
        assert first in rung
        assert not {behind, running} & set(rung)


def test_without_backoff_a_claimable_turn_is_rung_every_4_s(seeds: Seeds) -> None:
    """However often it was rung before; and no more turns are taken than were asked for."""
    turn_ids = {seeds.turn() for _ in range(3)}
    for _ in range(4):
        for turn_id in turn_ids:
            seeds.age(turn_id, "rung_at", 5)
        few = seeds.store.transact(workers.to_ring, backing_off=False, at_most=2)
        assert len(few) == 2
        assert turn_ids <= {*few, *seeds.store.transact(workers.to_ring, backing_off=False)}
    assert not turn_ids & set(seeds.store.transact(workers.to_ring, backing_off=False))


def test_concurrent_upkeep_rings_a_turn_once(seeds: Seeds) -> None:
    """Each due turn is taken by one of many processes."""
    due = {seeds.turn() for _ in range(10)}
    for turn_id in due:
        seeds.age(turn_id, "rung_at", 100)
    with ThreadPoolExecutor(6) as pool:
        rung = [
            turn_id
            for found in pool.map(lambda _: seeds.store.transact(workers.to_ring, backing_off=True), range(6))
            for turn_id in found
        ]
    mine = [turn_id for turn_id in rung if turn_id in due]
    assert sorted(mine) == sorted(due)


def overdue(seeds: Seeds, turn_id: str) -> TurnFailure | None:
    return dict(seeds.store.transact(workers.overdue, 300.0)).get(turn_id)


def test_a_turn_that_waited_too_long_for_a_worker_is_overdue(seeds: Seeds) -> None:
    """The error says whether no worker runs or all are busy."""
    turn_id = seeds.turn()
    assert overdue(seeds, turn_id) is None
    seeds.age(turn_id, "queued_at", 301)
    worker_id = seeds.worker()
    failure = overdue(seeds, turn_id)
    assert failure is not None
    assert failure.code == "queue_wait_exceeded"
    assert "none had room" in failure.message
    seeds.scalar("UPDATE workers SET lease_until = now() WHERE dead_at IS NULL RETURNING 1")
    failure = overdue(seeds, turn_id)
    assert failure is not None
    assert "no worker is running" in failure.message
    seeds.store.transact(workers.renew, worker_id, 60)


def test_a_turn_behind_another_is_not_overdue(seeds: Seeds) -> None:
    """Queue wait counts from when a turn became claimable."""
    session_id = seeds.session()
    seeds.claimed(seeds.turn(session_id))
    behind = seeds.turn(session_id)
    seeds.age(behind, "queued_at", 1000)
    assert overdue(seeds, behind) is None


def test_a_turn_whose_predecessor_just_ended_is_not_overdue(seeds: Seeds) -> None:
    """Its wait begins with that end, even before whoever ended it has rung the session's next turn."""
    session_id = seeds.session()
    running = seeds.claimed(seeds.turn(session_id))
    behind = seeds.turn(session_id)
    seeds.age(behind, "queued_at", 1000)
    seeds.record(running, [next_event(running)], end=claims.LegEnd(TurnStatus.COMPLETED, completed_at=now(seeds)))
    assert overdue(seeds, behind) is None


def test_ending_a_later_turn_leaves_the_wait_of_an_earlier_one_alone(seeds: Seeds) -> None:
    """It was claimable before, so neither its queue wait nor its doorbells begin anew."""
    session_id = seeds.session()
    first, second = seeds.turn(session_id), seeds.turn(session_id)
    seeds.age(first, "queued_at", 1000)
    assert seeds.store.transact(turns.end, second, TurnFailure("cancelled", "no"), no_redis) is not None
    assert overdue(seeds, first) is not None


def test_turns_of_one_session_can_be_ended_at_once(seeds: Seeds) -> None:
    """Two requests, or a request and upkeep: neither waits for a row that the other holds."""
    session_id = seeds.session()
    both, met = [seeds.turn(session_id), seeds.turn(session_id)], Barrier(2)

    def raise_fence(turn_id: str, fence: int, last: EventId) -> None:
        met.wait(60)  # each holds its own turn's row now

    def end(turn_id: str) -> object:
        return seeds.store.transact(turns.end, turn_id, TurnFailure("cancelled", "no"), raise_fence)

    with ThreadPoolExecutor(2) as pool:
        assert None not in list(pool.map(end, both))
    assert {seeds.row(turn_id).status for turn_id in both} == {TurnStatus.CANCELLED}


def test_a_session_is_deleted_while_a_turn_of_it_ends(seeds: Seeds) -> None:
    """Both take the rows of its turns in their order, whatever plan Postgres makes: neither waits for the other for
    ever."""
    agent_id = seeds.agent()
    session_id = seeds.session(agent_id)
    first, second = seeds.turn(session_id), seeds.turn(session_id)
    seeds.age(first, "queued_at", 1)  # its row is behind the second one's now
    ending = Barrier(2)

    def delete(connection: Connection) -> list[str]:
        ending.wait(60)
        for index in ("indexscan", "bitmapscan"):
            connection.execute(text(f"SET LOCAL enable_{index} = off"))
        return agents.mark_session_deleted(connection, OWNER, agent_id, session_id)

    def raise_fence(turn_id: str, fence: int, last: EventId) -> None:
        ending.wait(60)
        wait_until(lambda: seeds.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    with ThreadPoolExecutor(1) as thread:
        deleting = thread.submit(seeds.store.transact, delete)
        failure = TurnFailure("cancelled", "no")
        assert seeds.store.transact(turns.end, first, failure, raise_fence) is not None
        assert deleting.result(60) == [second]


def now(seeds: Seeds) -> datetime:
    """Postgres's."""
    time = seeds.scalar("SELECT clock_timestamp()")
    assert isinstance(time, datetime)
    return time


def test_a_turn_whose_input_never_came_is_overdue(seeds: Seeds) -> None:
    """It ends at its own deadline."""
    claim = seeds.await_input(seeds.claimed(), wait_seconds=50)
    assert overdue(seeds, claim.turn_id) is None
    seeds.age(claim.turn_id, "deadline_at", 60)
    failure = overdue(seeds, claim.turn_id)
    assert failure is not None
    assert failure.code == "input_wait_exceeded"
    assert seeds.store.transact(turns.end, claim.turn_id, failure, no_redis) is not None
    assert seeds.row(claim.turn_id).status == TurnStatus.FAILED


def test_what_is_deleted_is_hidden_at_once_and_purged_when_idle(seeds: Seeds) -> None:
    """Its rows go after the grace, once nothing there is unfinished; others stay."""
    agent_id, other = seeds.agent(), seeds.session()
    session_id = seeds.session(agent_id)
    running = seeds.claimed(seeds.turn(session_id))
    assert seeds.store.transact(agents.mark_agent_deleted, OWNER, agent_id) == [running.turn_id]
    with pytest.raises(NotFound):
        seeds.store.transact(agents.get_session, OWNER, agent_id, session_id)
    with pytest.raises(NotFound):
        seeds.session(agent_id)
    with pytest.raises(NotFound):
        seeds.store.transact(agents.mark_agent_deleted, OWNER, agent_id)
    seeds.store.transact(agents.purge_deleted, 0, 100)
    assert seeds.row(running.turn_id).status == TurnStatus.RUNNING
    seeds.complete(running)
    seeds.store.transact(agents.purge_deleted, 1000, 100)
    assert seeds.row(running.turn_id).status == TurnStatus.COMPLETED
    seeds.store.transact(agents.purge_deleted, 0, 100)
    with pytest.raises(NotFound):
        seeds.row(running.turn_id)
    assert seeds.scalar("SELECT count(*) FROM agents WHERE agent_id = :id", id=agent_id) == 0
    assert seeds.events(running.turn_id) == []
    assert seeds.scalar("SELECT count(*) FROM sessions WHERE session_id = :id", id=other) == 1


def test_deleting_a_session_names_its_unfinished_turns(seeds: Seeds) -> None:
    """Those are to be ended by the caller."""
    agent_id = seeds.agent()
    session_id = seeds.session(agent_id)
    seeds.complete(seeds.claimed(seeds.turn(session_id)))
    queued = seeds.turn(session_id)
    assert seeds.store.transact(agents.mark_session_deleted, OWNER, agent_id, session_id) == [queued]


def test_long_dead_workers_are_forgotten_unless_a_turn_names_them(seeds: Seeds) -> None:
    """A turn tells which worker ran it last for as long as it exists."""
    idle, used = seeds.worker(), seeds.worker()
    seeds.complete(seeds.claimed(worker_id=used))
    for worker_id in (idle, used):
        seeds.kill(worker_id)
        seeds.scalar(
            "UPDATE workers SET dead_at = now() - interval '2 h' WHERE worker_id = :id RETURNING 1", id=worker_id
        )
    seeds.store.transact(workers.forget_dead_workers)
    left = "SELECT count(*) FROM workers WHERE worker_id = :id"
    assert [seeds.scalar(left, id=worker_id) for worker_id in (idle, used)] == [0, 1]


def test_registry_changes_are_seen_by_the_next_claim(seeds: Seeds) -> None:
    """The version rises with each change."""
    before = seeds.claimed().registry_version
    seeds.store.transact(workers.bump_registry_version)
    assert seeds.claimed().registry_version == before + 1


def test_upkeep_ends_what_a_deletion_left(seeds: Seeds) -> None:
    """The web process died between hiding a session and ending its turns, or a turn slipped into awaiting input."""
    agent_id = seeds.agent()
    session_id = seeds.session(agent_id)
    first, queued = seeds.turn(session_id), seeds.turn(session_id)
    awaiting = seeds.await_input(seeds.claimed(first))
    assert seeds.store.transact(agents.mark_session_deleted, OWNER, agent_id, session_id) == [first, queued]
    assert {awaiting.turn_id, queued} <= set(seeds.store.transact(workers.unwanted))
    for turn_id in seeds.store.transact(workers.unwanted):
        seeds.cancel(turn_id)
    assert seeds.store.transact(workers.unwanted) == []
    assert seeds.row(queued).status == TurnStatus.CANCELLED
