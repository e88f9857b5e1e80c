"""What an owner writes: fenced, once, and complete."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg2
import pytest
from llama_stack.apis.inference import ToolCall
from sqlalchemy import text

from app.domain.errors import AttemptLost, TurnFailure, Unavailable
from app.domain.events import EventKind
from app.domain.turns import TurnStatus
from app.store import Store, claims, turns
from app.store.claims import Claim, LegEnd
from tests.integration.store.seeds import Seeds, inference_step, next_event, next_events, tool_step, unhurried
from tests.support import wait_until

ADD = ToolCall(call_id="c1", tool_name="add", arguments='{"a":1}')
COMPLETED = LegEnd(TurnStatus.COMPLETED, {"role": "assistant", "content": "ok"})
FAILED = LegEnd(TurnStatus.FAILED, failure=TurnFailure("model_error", "no", 502))


def every_write(claim: Claim) -> dict[str, dict[str, Any]]:
    """One example of each thing that an owner may record."""
    return {
        "a step": {"recorded": [next_event(claim)], "step": inference_step(claim.turn_id)},
        "events": {"recorded": [next_event(claim)]},
        "resolved": {"resolved": {"context": "late"}},
        "started calls": {"started_calls": [(0, 0)]},
        "a result": {"result": (0, 0, {"content": "late"})},
        "files": {"files": {"late": b"late"}},
        "an end": {"recorded": [next_event(claim)], "end": COMPLETED},
    }


WRITES = ["a step", "events", "resolved", "started calls", "a result", "files", "an end"]
LOSSES = ["claimed by another", "taken from the dead", "ended", "handed over"]


def lose(seeds: Seeds, claim: Claim, how: str) -> None:
    if how == "handed over":
        assert seeds.store.transact(claims.hand_over, claim, [])
    elif how == "ended":
        seeds.lose_worker(claim, max_losses=1)
    else:
        seeds.lose_worker(claim)
        if how == "claimed by another":
            seeds.claimed(claim.turn_id)


def everything_stored(seeds: Seeds, turn_id: str) -> list[Any]:
    """All rows of a turn, and its session's files, as text."""
    files = text("SELECT f::text FROM session_files f JOIN turns USING (session_id) WHERE turn_id = :id ORDER BY 1")
    with seeds.store.engine.begin() as connection:
        return [connection.execute(files, {"id": turn_id}).scalars().all()] + [
            connection.execute(
                text(f"SELECT {table}::text FROM {table} WHERE turn_id = :id ORDER BY 1"), {"id": turn_id}
            )
            .scalars()
            .all()
            for table in ("turns", "journal", "tool_calls", "event_segments")
        ]


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("what", WRITES)
def test_nothing_is_written_by_an_attempt_that_is_over(seeds: Seeds, what: str, how: str) -> None:
    """Whoever lost the turn gets AttemptLost for each kind of write, and changes nothing."""
    claim = seeds.claimed()
    claim = seeds.record(claim, [next_event(claim)], step=inference_step(claim.turn_id, ADD), started_calls=[(0, 0)])
    lose(seeds, claim, how)
    before = everything_stored(seeds, claim.turn_id)
    with pytest.raises(AttemptLost):
        seeds.record(claim, **every_write(claim)[what])
    assert everything_stored(seeds, claim.turn_id) == before


@pytest.mark.parametrize("field", ["fence", "worker_id", "last"])
def test_a_write_needs_fence_owner_and_place_in_the_log(seeds: Seeds, field: str) -> None:
    """A claim that differs from the row in any of them is refused."""
    claim = seeds.claimed()
    wrong: dict[str, Any] = {
        "fence": claim.fence + 1,
        "worker_id": seeds.worker(),
        "last": claim.last._replace(n=7),
    }
    with pytest.raises(AttemptLost):
        seeds.record(replace(claim, **{field: wrong[field]}), [next_event(claim)])


@pytest.mark.parametrize("what", WRITES)
def test_recording_again_after_a_lost_reply_changes_nothing(seeds: Seeds, what: str) -> None:
    """The same call made twice, as after a commit whose reply was lost, gives the same claim and one set of rows."""
    claim = seeds.claimed()
    claim = seeds.record(claim, [next_event(claim)], step=inference_step(claim.turn_id, ADD), started_calls=[(0, 0)])
    write = every_write(claim)[what]
    once = seeds.record(claim, **write)
    if what == "started calls":  # it is noted again with the time of the second note
        assert seeds.record(claim, **write) == once
        return
    before = everything_stored(seeds, claim.turn_id)
    assert seeds.record(claim, **write) == once
    assert everything_stored(seeds, claim.turn_id) == before


def test_steps_are_journalled_by_ordinal_with_their_events(seeds: Seeds) -> None:
    """Each recording adds one step and one segment; the row knows the last event, and failures go back to 0."""
    claim = seeds.claimed()
    steps = [inference_step(claim.turn_id, ADD), tool_step(claim.turn_id, ADD), inference_step(claim.turn_id)]
    recorded = []
    for step in steps:
        batch = next_events(claim, EventKind.STEP_START, EventKind.STEP_PROGRESS, EventKind.STEP_COMPLETE)
        claim = seeds.record(claim, batch, step=step)
        recorded += batch
    row = seeds.row(claim.turn_id)
    assert row.steps == steps == claim.steps
    assert row.last == recorded[-1].id == claim.last
    assert seeds.events(claim.turn_id) == recorded


def test_a_step_keeps_any_text(seeds: Seeds) -> None:
    """U+0000, lone surrogates, emoji and U+2028 come back from the journal as they went in."""
    odd = "nul \0 lone \ud800 pair 🐫 line \u2028 end"
    claim = seeds.claimed()
    step = tool_step(claim.turn_id, ADD, odd)
    seeds.record(claim, [next_event(claim)], step=step)
    assert seeds.row(claim.turn_id).steps[0]["tool_responses"][0]["content"] == odd


def test_the_ledger_keeps_a_result_apart_from_its_step(seeds: Seeds) -> None:
    """A call is noted when it starts, its result when it comes; noting it again keeps the result."""
    claim = seeds.claimed()
    claim = seeds.record(claim, [next_event(claim)], step=inference_step(claim.turn_id, ADD), started_calls=[(0, 0)])
    seeds.record(claim, result=(0, 0, {"content": "3"}))
    seeds.record(claim, started_calls=[(0, 0)])
    assert seeds.scalar("SELECT result ->> 'content' FROM tool_calls WHERE turn_id = :id", id=claim.turn_id) == "3"


def test_a_result_for_a_call_that_was_never_noted_is_refused(seeds: Seeds) -> None:
    """The ledger's row comes first."""
    with pytest.raises(AttemptLost):
        seeds.record(seeds.claimed(), result=(0, 0, {"content": "3"}))


@pytest.mark.parametrize(
    ("end", "status"), [(COMPLETED, TurnStatus.COMPLETED), (FAILED, TurnStatus.FAILED)], ids=["completed", "failed"]
)
def test_an_end_is_one_transaction_with_step_and_events(seeds: Seeds, end: LegEnd, status: TurnStatus) -> None:
    """Status, message or error, last step and terminal event are there together, and the turn is nobody's."""
    claim = seeds.claimed()
    step, at = inference_step(claim.turn_id), datetime.now(UTC)
    last = next_events(claim, EventKind.STEP_COMPLETE, EventKind.TURN_COMPLETE)
    seeds.record(claim, last, step=step, end=replace(end, completed_at=at))
    row = seeds.row(claim.turn_id)
    assert (row.status, row.steps, row.completed_at, row.last) == (status, [step], at, last[-1].id)
    assert row.output_message == end.output_message
    assert row.error == (end.failure.as_dict() if end.failure else None)
    assert not seeds.store.transact(claims.still_owned, claim)


def test_awaiting_input_has_a_deadline_of_its_own(seeds: Seeds) -> None:
    """It replaces the leg's, and goes with the resume."""
    session_id = seeds.session()
    claim = seeds.await_input(seeds.claimed(seeds.turn(session_id)), wait_seconds=5000)
    left = "SELECT extract(epoch FROM deadline_at - now()) FROM turns WHERE turn_id = :id"
    assert 4900 < seeds.scalar(left, id=claim.turn_id) <= 5000
    seeds.resume(claim.turn_id, session_id, [{"call_id": "c1", "tool_name": "ask", "content": "yes"}])
    assert seeds.column(claim.turn_id, "deadline_at") is None


def test_a_hand_over_costs_no_failure_and_keeps_the_deadline(seeds: Seeds) -> None:
    """The turn is queued with a raised fence and all its events, rung as if new."""
    claim = seeds.claimed()
    tail = next_events(claim, EventKind.STEP_START, EventKind.STEP_PROGRESS)
    assert seeds.store.transact(claims.hand_over, claim, tail)
    row = seeds.row(claim.turn_id)
    assert (row.status, row.fence, row.last) == (TurnStatus.QUEUED, claim.fence + 1, tail[-1].id)
    assert seeds.events(claim.turn_id) == tail
    assert seeds.column(claim.turn_id, "failures") == 0
    again = seeds.claimed(claim.turn_id)
    assert (again.deadline_at, again.last, again.tail_lost) == (claim.deadline_at, tail[-1].id, False)
    assert not seeds.store.transact(claims.hand_over, claim, [])


def test_still_owned_waits_for_whoever_is_ending_the_turn(seeds: Seeds) -> None:
    """Its answer is that of after the other transaction."""
    claim = seeds.claimed()
    assert seeds.store.transact(claims.still_owned, claim)
    seeds.kill(claim.worker_id)
    with ThreadPoolExecutor(1) as pool:
        with unhurried(seeds.store) as ending:
            turns.end(ending, claim.turn_id, TurnFailure("cancelled", "no"), lambda *_: [], running=True)
            asked = pool.submit(seeds.store.transact, claims.still_owned, claim)
            wait_for_lock(seeds)
            assert not asked.done()
        assert asked.result() is False


def wait_for_lock(seeds: Seeds) -> None:
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    wait_until(lambda: seeds.scalar(blocked))


def test_a_lost_commit_reply_is_unavailable_and_recording_again_finds_it_made(
    seeds: Seeds, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server commits, the connection dies before the reply; the second try changes nothing."""
    store = Store(store_url.replace("postgresql://", "postgresql+psycopg2://", 1), pool_size=1, name="flaky")

    def commit_and_break(connection: Any) -> None:
        monkeypatch.undo()
        connection.commit()
        raise psycopg2.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(store.engine.dialect, "do_commit", commit_and_break)
    claim = seeds.claimed()
    recorded, step = [next_event(claim)], inference_step(claim.turn_id)
    with pytest.raises(Unavailable):
        store.transact(claims.record, claim, recorded, step=step)
    advanced = store.transact(claims.record, claim, recorded, step=step)
    store.close()
    assert (advanced.last, advanced.steps) == (recorded[0].id, [step])
    assert seeds.row(claim.turn_id).steps == [step]


def test_a_pooled_connection_that_died_unseen_is_replaced(seeds: Seeds, store_url: str) -> None:
    """After Postgres dropped every connection, the next transaction succeeds."""
    store = Store(store_url.replace("postgresql://", "postgresql+psycopg2://", 1), pool_size=2, name="dropped")
    turn_id = seeds.turn()
    assert turn_id in store.transact(turns.standings, [turn_id])
    kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'caravan-dropped'"
    assert seeds.scalar(kill) == 1
    assert turn_id in store.transact(turns.standings, [turn_id])
    store.close()
