"""A turn is accepted, waits for its place in its session, and is claimed once."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from app.domain.errors import Conflict, NotFound
from app.domain.events import EventKind
from app.domain.turns import TurnStatus
from app.store import agents, claims, turns
from app.store.claims import Claim
from tests.integration.store.seeds import OWNER, Seeds, inference_step, next_event, next_events

ANSWER = {"call_id": "c1", "tool_name": "ask", "content": "yes", "metadata": None}


def test_turns_of_a_session_are_numbered_in_the_order_of_acceptance(seeds: Seeds) -> None:
    """Numbers count from 1 in each session, whatever happens in another."""
    first, second = seeds.session(), seeds.session()
    made = [seeds.turn(first), seeds.turn(second), seeds.turn(first), seeds.turn(second)]
    assert [seeds.row(turn_id).number for turn_id in made] == [1, 1, 2, 2]


def test_concurrent_acceptance_leaves_no_hole_and_no_double(seeds: Seeds) -> None:
    """Many requests for one session at once get different, consecutive numbers."""
    session_id = seeds.session()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: seeds.turn(session_id), range(24)))
    assert sorted(seeds.row(turn_id).number for turn_id in made) == list(range(1, 25))


def test_only_the_first_unfinished_turn_of_a_session_can_be_claimed(seeds: Seeds) -> None:
    """A later turn waits until the earlier one has ended; other sessions do not wait."""
    session_id = seeds.session()
    first, second, elsewhere = seeds.turn(session_id), seeds.turn(session_id), seeds.turn()
    assert seeds.claim(second) is None
    running = seeds.claimed(first)
    assert seeds.claim(second) is None
    assert seeds.claim(elsewhere) is not None
    seeds.complete(running)
    assert seeds.claim(second) is not None


def test_accepting_in_a_session_that_is_not_the_callers_is_not_found(seeds: Seeds) -> None:
    """An unknown, another's or a deleted session is NotFound, and nothing is stored."""
    agent_id = seeds.agent()
    session_id = seeds.session(agent_id)
    asked = seeds.submission(session_id)
    for owner, session in (("stranger", session_id), (OWNER, str(uuid.uuid4()))):
        with pytest.raises(NotFound):
            seeds.submit(asked, owner=owner, session_id=session)
    seeds.store.transact(agents.mark_session_deleted, OWNER, agent_id, session_id)
    with pytest.raises(NotFound):
        seeds.turn(session_id)
    assert seeds.store.transact(turns.session_turns, session_id) == []


@pytest.mark.parametrize("lease", ["expired", "dead", "never registered"])
def test_a_claim_needs_a_live_lease(seeds: Seeds, lease: str) -> None:
    """A worker whose lease ran out, was found dead or never was gets nothing, and the turn stays queued."""
    worker_id = str(uuid.uuid4()) if lease == "never registered" else seeds.worker(0 if lease == "expired" else 60)
    if lease == "dead":
        seeds.kill(worker_id)
    turn_id = seeds.turn()
    assert seeds.claim(turn_id, worker_id) is None
    assert seeds.row(turn_id).status == TurnStatus.QUEUED


def test_of_concurrent_claims_exactly_one_wins(seeds: Seeds) -> None:
    """Doorbells rung twice lead to one owner."""
    turn_id, workers = seeds.turn(), [seeds.worker() for _ in range(12)]
    barrier = Barrier(len(workers))

    def claim(worker_id: str) -> Claim | None:
        barrier.wait()
        return seeds.claim(turn_id, worker_id)

    with ThreadPoolExecutor(len(workers)) as pool:
        won = [one for one in pool.map(claim, workers) if one is not None]
    assert [one.fence for one in won] == [1]
    assert str(seeds.column(turn_id, "worker_id")) == won[0].worker_id


def test_concurrent_claims_of_two_turns_of_one_session_give_one(seeds: Seeds) -> None:
    """Never two running turns in a session."""
    for _ in range(8):
        session_id = seeds.session()
        pair = [seeds.turn(session_id), seeds.turn(session_id)]
        with ThreadPoolExecutor(4) as pool:
            claimed = list(pool.map(seeds.claim, pair * 2))
        assert sum(one is not None for one in claimed) == 1
        assert [seeds.row(turn_id).status for turn_id in pair] == [TurnStatus.RUNNING, TurnStatus.QUEUED]


def test_a_claim_brings_all_that_is_needed_to_go_on(seeds: Seeds) -> None:
    """Agent, request, journal, ledger, and the session's earlier turns, with steps, in order."""
    session_id = seeds.session(seeds.agent(instructions="Be brief."))
    first = seeds.claimed(seeds.turn(session_id, messages=[{"role": "user", "content": "one"}]))
    step = inference_step(first.turn_id)
    seeds.complete(seeds.record(first, [next_event(first)], step=step))
    second = seeds.claimed(seeds.turn(session_id, messages=[{"role": "user", "content": "two"}]))
    mine = inference_step(second.turn_id)
    seeds.record(second, [next_event(second)], step=mine, started_calls=[(0, 0), (0, 1)], resolved={"context": "c"})
    seeds.record(second, result=(0, 1, {"content": "3"}))
    seeds.lose_worker(second)
    again = seeds.claimed(second.turn_id)
    assert again.agent_config
    assert again.agent_config["instructions"] == "Be brief."
    assert again.request["messages"] == [{"role": "user", "content": "two"}]
    assert again.steps == [mine]
    assert again.resolved == {"context": "c"}
    assert {key: entry.result for key, entry in again.ledger.items()} == {(0, 0): None, (0, 1): {"content": "3"}}
    assert [(past.messages[0]["content"], past.steps) for past in again.past] == [("one", [step])]
    assert (again.fence, again.last, again.tail_lost) == (3, second.last._replace(fence=1, n=1), True)


def test_a_new_turn_supersedes_the_one_that_awaits_input(seeds: Seeds) -> None:
    """It ends as cancelled with a terminal event of a higher fence, in the transaction of the acceptance."""
    session_id = seeds.session()
    awaiting = seeds.await_input(seeds.claimed(seeds.turn(session_id)))
    newer = str(uuid.uuid4())
    [ended] = seeds.accept(session_id, newer)
    assert (ended.turn_id, [event.kind for event in ended.events]) == (awaiting.turn_id, [EventKind.ERROR])
    assert ended.events[0].after == awaiting.last
    assert ended.events[0].id.fence > awaiting.fence
    row = seeds.row(awaiting.turn_id)
    assert (row.status, (row.error or {})["code"], row.last) == (
        TurnStatus.CANCELLED,
        "superseded",
        ended.events[0].id,
    )
    assert seeds.events(awaiting.turn_id)[-1] == ended.events[0]
    assert seeds.claim(newer) is not None


def test_a_turn_queued_behind_one_that_awaits_input_does_not_supersede_it(seeds: Seeds) -> None:
    """Only a turn posted while another one awaits input does; those already there wait."""
    session_id = seeds.session()
    running = seeds.claimed(seeds.turn(session_id))
    behind = seeds.turn(session_id)
    seeds.await_input(running)
    assert seeds.claim(behind) is None
    assert seeds.row(running.turn_id).status == TurnStatus.AWAITING_INPUT
    assert seeds.store.transact(turns.next_in_session, session_id, 1) is None


def test_a_resume_puts_the_turn_back_to_queued_with_the_responses(seeds: Seeds) -> None:
    """The next leg gets them by the ordinal of the step that asked, a new deadline, and the same started_at."""
    session_id = seeds.session()
    awaiting = seeds.await_input(seeds.claimed(seeds.turn(session_id)))
    response = ANSWER
    accepted = seeds.resume(awaiting.turn_id, session_id, [response])
    assert (accepted.after, accepted.is_new) == (awaiting.last, True)
    row = seeds.row(awaiting.turn_id)
    assert (row.status, row.output_message, row.completed_at) == (TurnStatus.QUEUED, None, None)
    again = seeds.claimed(awaiting.turn_id)
    assert again.tool_responses == {"0": [response]}
    assert (again.started_at, again.last) == (awaiting.started_at, awaiting.last)
    assert again.deadline_at > awaiting.deadline_at


def test_only_a_turn_that_awaits_input_can_be_resumed(seeds: Seeds) -> None:
    """Anything else is a conflict, a foreign turn is not found, and of two resumes one wins."""
    session_id = seeds.session()
    running = seeds.claimed(seeds.turn(session_id))
    with pytest.raises(Conflict):
        seeds.resume(running.turn_id, session_id, [])
    awaiting = seeds.await_input(running)
    with pytest.raises(NotFound):
        seeds.resume(awaiting.turn_id, seeds.session(), [])

    def resume(_: int) -> bool:
        try:
            seeds.resume(awaiting.turn_id, session_id, [ANSWER])
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(resume, range(4))) == [False, False, False, True]


def test_next_in_session_gives_the_turn_to_ring_and_starts_its_wait(seeds: Seeds) -> None:
    """The first unfinished one if it is queued; its queue wait and its doorbells count from here."""
    session_id = seeds.session()
    running = seeds.claimed(seeds.turn(session_id))
    behind = seeds.turn(session_id)
    seeds.age(behind, "queued_at", 1000)
    assert seeds.store.transact(turns.next_in_session, session_id, 1) is None
    seeds.complete(running)
    assert seeds.store.transact(turns.next_in_session, session_id, 1) == behind
    assert seeds.scalar("SELECT queued_at > now() - interval '60 s' FROM turns WHERE turn_id = :id", id=behind)
    seeds.complete(seeds.claimed(behind))
    assert seeds.store.transact(turns.next_in_session, session_id, 1) is None


def test_a_cancel_request_survives_a_hand_over(seeds: Seeds) -> None:
    """Cancelling is explicit: a worker that drains before it heard of the request does not undo it."""
    claim = seeds.claimed()
    assert seeds.cancel(claim.turn_id) == TurnStatus.RUNNING
    seeds.store.transact(claims.hand_over, claim, [])
    seeds.claim(claim.turn_id)
    cancelled = seeds.row(claim.turn_id).status == TurnStatus.CANCELLED
    still_asked = seeds.column(claim.turn_id, "cancel_requested_at") is not None
    assert cancelled or still_asked, "the request is forgotten, and the turn runs on"


def test_standings_and_segments_read_what_was_recorded(seeds: Seeds) -> None:
    """A turn's standing is its status and last recorded event; segments give the events after any cursor."""
    claim = seeds.claimed()
    first = next_events(claim, EventKind.STEP_START, EventKind.STEP_PROGRESS, EventKind.STEP_COMPLETE)
    claim = seeds.record(claim, first)
    second = next_events(claim, EventKind.STEP_START, EventKind.TURN_COMPLETE)
    seeds.record(claim, second)
    everything = [*first, *second]
    for index, event in enumerate(everything):
        assert seeds.events(claim.turn_id, event.id) == everything[index + 1 :]
    assert seeds.events(claim.turn_id) == everything
    for limit in range(1, 6):
        found = seeds.store.transact(turns.segments_after, claim.turn_id, first[0].after, limit)
        assert found == everything[:limit]
    standings = seeds.store.transact(turns.standings, [claim.turn_id, str(uuid.uuid4())])
    assert {key: (one.status, one.last) for key, one in standings.items()} == {
        claim.turn_id: (TurnStatus.RUNNING, everything[-1].id)
    }
