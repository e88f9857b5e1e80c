"""Whatever happens in whatever order, a turn's life in Postgres is that of the model below.

Hypothesis posts, claims, records, ends, resumes, cancels, hands over and loses workers, and lets attempts that are over
write all the while; after each step every turn is compared with the model, and its recorded events are a chain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text

from app.domain import events
from app.domain.errors import AttemptLost, Conflict
from app.domain.events import START, TERMINAL, EventId, EventKind
from app.domain.turns import ENDED, TRANSITIONS, MultitaskStrategy, TurnStatus
from app.store import claims, turns, workers
from app.store.claims import Claim, LegEnd
from tests.integration.store.seeds import Seeds, inference_step, next_event, next_events, no_redis

MAX_LOSSES = 3
ANSWER = [{"call_id": "c1", "tool_name": "ask", "content": "yes"}]


@dataclass
class Model:
    """What a turn ought to be."""

    turn_id: str
    session: int
    status: TurnStatus = TurnStatus.QUEUED
    steps: int = 0
    failures: int = 0
    cancel_asked: bool = False
    claim: Claim | None = None
    over: list[Claim] = field(default_factory=list)
    last: EventId = START
    has_ended: bool = False
    seen: list[TurnStatus] = field(default_factory=lambda: [TurnStatus.QUEUED])

    def becomes(self, status: TurnStatus) -> None:
        if status != self.status:
            assert status in TRANSITIONS[self.status], f"{self.status} to {status}"
            self.seen.append(status)
        self.status = status
        if status != TurnStatus.RUNNING and self.claim is not None:
            self.over.append(self.claim)
            self.claim = None


class TurnLife(RuleBasedStateMachine):
    """Two sessions, three workers."""

    seeds: Seeds

    def __init__(self) -> None:
        super().__init__()
        self.sessions = [self.seeds.session() for _ in range(2)]
        self.workers = [self.seeds.worker() for _ in range(3)]
        self.turns: list[Model] = []

    # --- what the model says ---

    def unfinished(self, session: int) -> list[Model]:
        return [turn for turn in self.turns if turn.session == session and turn.status not in ENDED]

    def is_first(self, turn: Model) -> bool:
        return self.unfinished(turn.session)[:1] == [turn]

    def of_status(self, *statuses: TurnStatus) -> list[Model]:
        return [turn for turn in self.turns if turn.status in statuses]

    def pick(self, data: Any, *statuses: TurnStatus) -> Model:
        found: Model = data.draw(st.sampled_from(self.of_status(*statuses)))
        return found

    def any_of(self, *statuses: TurnStatus) -> bool:
        return bool(self.of_status(*statuses))

    # --- what may happen ---

    @rule(session=st.sampled_from([0, 1]), strategy=st.sampled_from(list(MultitaskStrategy)))
    def post(self, session: int, strategy: MultitaskStrategy) -> None:
        earlier = self.unfinished(session)
        busy = [turn for turn in earlier if turn.status != TurnStatus.AWAITING_INPUT]
        asked = self.seeds.submission(self.sessions[session])
        if busy and strategy == MultitaskStrategy.REJECT:
            with pytest.raises(Conflict):
                self.seeds.submit(asked, strategy=strategy)
            return
        accepted = self.seeds.submit(asked, strategy=strategy)
        if earlier and earlier[0].status == TurnStatus.AWAITING_INPUT:
            earlier[0].becomes(TurnStatus.CANCELLED)
        elif earlier and strategy == MultitaskStrategy.INTERRUPT:
            self.is_cancelled(earlier[0])
        self.turns.append(Model(accepted.turn_id, session))

    @precondition(lambda self: self.any_of(*TurnStatus))
    @rule(data=st.data(), worker=st.sampled_from([0, 1, 2]))
    def claim(self, data: Any, worker: int) -> None:
        turn = self.pick(data, *TurnStatus)
        may = turn.status == TurnStatus.QUEUED and self.is_first(turn) and not turn.cancel_asked
        claim = self.seeds.claim(turn.turn_id, self.workers[worker])
        assert (claim is not None) == may
        if claim is not None:
            assert len(claim.steps) == turn.steps
            assert all(claim.fence > past.fence for past in turn.over)
            turn.becomes(TurnStatus.RUNNING)
            turn.claim = claim

    @precondition(lambda self: self.any_of(TurnStatus.RUNNING))
    @rule(data=st.data(), count=st.integers(0, 3), with_step=st.booleans())
    def record(self, data: Any, count: int, with_step: bool) -> None:
        turn = self.pick(data, TurnStatus.RUNNING)
        assert turn.claim is not None
        kinds = [EventKind.STEP_PROGRESS] * count + [EventKind.STEP_COMPLETE] * with_step
        step = {"step": inference_step(turn.turn_id)} if with_step else {}
        turn.claim = self.seeds.record(turn.claim, next_events(turn.claim, *kinds), **step)
        if with_step:
            turn.steps, turn.failures = turn.steps + 1, 0

    @precondition(lambda self: self.any_of(TurnStatus.RUNNING))
    @rule(data=st.data(), status=st.sampled_from([TurnStatus.COMPLETED, TurnStatus.FAILED, TurnStatus.CANCELLED]))
    def finish(self, data: Any, status: TurnStatus) -> None:
        turn = self.pick(data, TurnStatus.RUNNING)
        assert turn.claim is not None
        kind = EventKind.TURN_COMPLETE if status == TurnStatus.COMPLETED else EventKind.ERROR
        self.seeds.record(turn.claim, [next_event(turn.claim, kind)], end=LegEnd(status))
        turn.becomes(status)

    @precondition(lambda self: self.any_of(TurnStatus.RUNNING))
    @rule(data=st.data())
    def ask_the_client(self, data: Any) -> None:
        turn = self.pick(data, TurnStatus.RUNNING)
        assert turn.claim is not None
        self.seeds.await_input(turn.claim)
        turn.steps, turn.failures = turn.steps + 1, 0
        turn.becomes(TurnStatus.AWAITING_INPUT)

    @precondition(lambda self: self.any_of(*TurnStatus))
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        turn = self.pick(data, *TurnStatus)
        if turn.status == TurnStatus.AWAITING_INPUT and not turn.cancel_asked:
            self.seeds.resume(turn.turn_id, self.sessions[turn.session], ANSWER)
            turn.becomes(TurnStatus.QUEUED)
        else:
            with pytest.raises(Conflict):
                self.seeds.resume(turn.turn_id, self.sessions[turn.session], ANSWER)

    @precondition(lambda self: self.any_of(*TurnStatus))
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        turn = self.pick(data, *TurnStatus)
        assert self.seeds.cancel(turn.turn_id) == self.is_cancelled(turn)

    def is_cancelled(self, turn: Model) -> TurnStatus:
        """The owner of a running turn is asked; what nobody runs ends."""
        if turn.status == TurnStatus.RUNNING:
            turn.cancel_asked = True
        elif turn.status not in ENDED:
            turn.becomes(TurnStatus.CANCELLED)
        return turn.status

    @precondition(lambda self: self.any_of(TurnStatus.RUNNING))
    @rule(data=st.data(), count=st.integers(0, 2))
    def hand_over(self, data: Any, count: int) -> None:
        turn = self.pick(data, TurnStatus.RUNNING)
        assert turn.claim is not None
        tail = next_events(turn.claim, *[EventKind.STEP_PROGRESS] * count)
        assert self.seeds.store.transact(claims.hand_over, turn.claim, tail)
        turn.becomes(TurnStatus.QUEUED)

    @rule(worker=st.sampled_from([0, 1, 2]))
    def a_worker_dies(self, worker: int) -> None:
        self.lose_a_worker(worker)

    def lose_a_worker(self, worker: int) -> None:
        dead = self.workers[worker]
        self.seeds.kill(dead)
        self.workers[worker] = self.seeds.worker()
        for turn in self.of_status(TurnStatus.RUNNING):
            if turn.claim is not None and turn.claim.worker_id == dead:
                self.seeds.store.transact(workers.take_from_dead, turn.turn_id, MAX_LOSSES, no_redis)
                self.is_lost(turn)

    def is_lost(self, turn: Model) -> None:
        turn.failures += 1
        if turn.cancel_asked:
            turn.becomes(TurnStatus.CANCELLED)
        elif turn.failures >= MAX_LOSSES:
            turn.becomes(TurnStatus.FAILED)
        else:
            turn.becomes(TurnStatus.QUEUED)
            if turn.failures >= workers.SUSPECTED_FROM:
                assert self.seeds.claim(turn.turn_id, self.workers[0]) is None
                self.seeds.suspect_no_longer(turn.turn_id)

    @rule()
    def upkeep(self) -> None:
        """Ends what was to be cancelled while somebody ran it, and is run by nobody now."""
        unwanted = set(self.seeds.store.transact(workers.unwanted))
        for turn in self.of_status(TurnStatus.QUEUED, TurnStatus.AWAITING_INPUT):
            assert (turn.turn_id in unwanted) == turn.cancel_asked
            if turn.cancel_asked:
                self.seeds.cancel(turn.turn_id)
                turn.becomes(TurnStatus.CANCELLED)

    @precondition(lambda self: any(turn.over for turn in self.turns))
    @rule(data=st.data(), how=st.sampled_from(["step", "events", "result", "end", "hand over"]))
    def an_attempt_that_is_over_writes(self, data: Any, how: str) -> None:
        """It is told, whatever it tries; `agrees` sees that nothing has changed."""
        turn: Model = data.draw(st.sampled_from([turn for turn in self.turns if turn.over]))
        self.must_not_write(turn, data.draw(st.sampled_from(turn.over)), how)

    @precondition(lambda self: self.any_of(TurnStatus.RUNNING))
    @rule(data=st.data(), how=st.sampled_from(["step", "events", "result", "end", "hand over"]))
    def a_stopped_worker_wakes_up_beside_its_successor(self, data: Any, how: str) -> None:
        """Nothing was recorded in between, so that only the fence tells the two apart."""
        turn = self.pick(data, TurnStatus.RUNNING)
        stopped = turn.claim
        assert stopped is not None
        self.lose_a_worker(self.workers.index(stopped.worker_id))
        if turn.status == TurnStatus.QUEUED:
            turn.claim = self.seeds.claimed(turn.turn_id, self.workers[0])
            turn.becomes(TurnStatus.RUNNING)
        self.must_not_write(turn, stopped, how)

    def must_not_write(self, turn: Model, claim: Claim, how: str) -> None:
        # Not the very number that it recorded last: that would be its own transaction, made again after a lost reply.
        late = events.number(claim.last, claim.fence, [(EventKind.STEP_PROGRESS, '"late"')], claim.last.n + 1000)
        if how == "hand over":
            assert not self.seeds.store.transact(claims.hand_over, claim, late)
            return
        ways: dict[str, dict[str, Any]] = {
            "step": {"step": inference_step(turn.turn_id)},
            "events": {},
            "result": {"result": (0, 0, {"content": "late"})},
            "end": {"end": LegEnd(TurnStatus.COMPLETED)},
        }
        recorded = [] if how == "result" else late
        with pytest.raises(AttemptLost):
            self.seeds.record(claim, recorded, **ways[how])
        assert not self.seeds.store.transact(claims.still_owned, claim)

    # --- what must hold ---

    @invariant()
    def agrees(self) -> None:
        rows = self.rows()
        for turn in self.turns:
            status, failures, steps, last = rows[turn.turn_id]
            assert (status, steps) == (turn.status, turn.steps), turn.seen
            assert failures == turn.failures or turn.status in ENDED
            self.is_a_chain(turn, last)
        for session in range(2):
            running = [turn for turn in self.of_status(TurnStatus.RUNNING) if turn.session == session]
            assert len(running) <= 1
            assert all(self.is_first(turn) for turn in running)

    def rows(self) -> dict[str, tuple[str, int, int, EventId]]:
        """Of all turns: status, failures, how many steps, last event."""
        query = text(
            """SELECT turn_id::text, status, failures, last_fence, last_n,
                 (SELECT count(*) FROM journal WHERE journal.turn_id = turns.turn_id) AS steps
               FROM turns WHERE turn_id::text = ANY(:ids)"""
        )
        with self.seeds.store.engine.begin() as connection:
            found = connection.execute(query, {"ids": [turn.turn_id for turn in self.turns]})
            return {r.turn_id: (r.status, r.failures, r.steps, EventId(r.last_fence, r.last_n)) for r in found}

    def is_a_chain(self, turn: Model, last: EventId) -> None:
        """Its events follow each other without a gap or a repeat, and the last one, and only that, is terminal."""
        new = self.seeds.events(turn.turn_id, turn.last) if last != turn.last else []
        for event in new:
            assert event.after == turn.last
            assert event.id > turn.last
            assert event.id.n > turn.last.n
            assert not turn.has_ended
            turn.last, turn.has_ended = event.id, event.kind in TERMINAL
        assert turn.last == last
        assert turn.has_ended == (turn.status in ENDED)

    def teardown(self) -> None:
        for turn in reversed(self.turns):
            if turn.status == TurnStatus.RUNNING:
                self.seeds.store.transact(turns.end, turn.turn_id, workers.overdue_failure(), no_redis, running=True)
            else:
                self.seeds.cancel(turn.turn_id)


@pytest.mark.timeout(600)
def test_a_turns_life_is_the_models(seeds: Seeds) -> None:
    """Twenty random lives of up to forty events each, the same in every run."""
    TurnLife.seeds = seeds
    limits = settings(
        max_examples=20,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
        print_blob=True,
    )
    run_state_machine_as_test(TurnLife, settings=limits)
