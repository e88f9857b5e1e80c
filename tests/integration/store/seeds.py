"""Rows to test with, made by the store's own functions."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from llama_stack.apis.agents import AgentConfig, InferenceStep, Step, ToolExecutionStep
from llama_stack.apis.inference import CompletionMessage, StopReason, ToolCall, ToolResponse
from sqlalchemy import Connection, text

from app.domain import events
from app.domain.errors import TurnFailure
from app.domain.events import Event, EventId, EventKind
from app.domain.turns import TurnStatus
from app.store import Store, admission, agents, claims, turns, workers
from app.store.admission import Accepted, Caps, Resumption, Submission
from app.store.claims import Claim, LegEnd
from app.store.turns import Ended, TurnRow

OWNER = "tester"
NO_CAPS = Caps(1_000_000, 1_000_000, 1_000_000)
Json = dict[str, Any]


class Seeds:
    """Makes agents, sessions, turns, workers and claims, and reads them back."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def agent(self, **config: Any) -> str:
        agent_id = str(uuid.uuid4())
        stored = AgentConfig(**{"model": "scripted", "instructions": "", **config}).model_dump(mode="json")
        self.store.transact(agents.create_agent, OWNER, agent_id, stored)
        return agent_id

    def session(self, agent_id: str | None = None) -> str:
        session_id = str(uuid.uuid4())
        self.store.transact(agents.create_session, OWNER, agent_id or self.agent(), session_id, "a session")
        return session_id

    def submission(self, session_id: str, turn_id: str | None = None, **request: Any) -> Submission:
        """What a client asks for; its hash is that of the request."""
        agent_id = self.scalar("SELECT agent_id FROM sessions WHERE session_id = :id", id=session_id)
        stored = {"messages": [{"role": "user", "content": "SAY hello"}], **request}
        request_hash = hashlib.sha256(json.dumps(stored).encode()).digest()
        made = turn_id or str(uuid.uuid4())
        return Submission(OWNER, str(agent_id), session_id, made, stored, request_hash, NO_CAPS)

    def submit(self, submission: Submission, **changes: Any) -> Accepted:
        return self.store.transact(admission.accept, replace(submission, **changes), no_redis)

    def accept(self, session_id: str, turn_id: str, **request: Any) -> list[Ended]:
        return list(self.submit(self.submission(session_id, turn_id, **request)).ended)

    def resumption(
        self, turn_id: str, session_id: str, responses: list[Json], key: str | None = None, caps: Caps = NO_CAPS
    ) -> Resumption:
        request_hash = hashlib.sha256(json.dumps(responses).encode()).digest()
        return Resumption(OWNER, session_id, turn_id, responses, request_hash, caps, key)

    def resume(self, *args: Any, **kwargs: Any) -> Accepted:
        """With the arguments of `resumption`."""
        return self.store.transact(admission.resume, self.resumption(*args, **kwargs))

    def cancel(self, turn_id: str) -> TurnStatus | None:
        return self.store.transact(turns.cancel, turn_id, TurnFailure("cancelled", "Cancelled."), no_redis)[0]

    def turn(self, session_id: str | None = None, **request: Any) -> str:
        turn_id = str(uuid.uuid4())
        self.accept(session_id or self.session(), turn_id, **request)
        return turn_id

    def worker(self, lease_seconds: float = 60) -> str:
        worker_id = str(uuid.uuid4())
        self.store.transact(workers.register, worker_id, "host:1", lease_seconds)
        return worker_id

    def claim(self, turn_id: str, worker_id: str | None = None) -> Claim | None:
        return self.store.transact(claims.claim, turn_id, worker_id or self.worker(), 60.0)

    def claimed(self, turn_id: str | None = None, worker_id: str | None = None) -> Claim:
        claim = self.claim(turn_id or self.turn(), worker_id)
        assert claim is not None
        return claim

    def record(self, claim: Claim, recorded: Sequence[Event] = (), **what: Any) -> Claim:
        return self.store.transact(claims.record, claim, recorded, **what)

    def complete(self, claim: Claim) -> Claim:
        end = LegEnd(TurnStatus.COMPLETED, completed_at=datetime.now(UTC))
        return self.record(claim, [next_event(claim, EventKind.TURN_COMPLETE)], end=end)

    def await_input(self, claim: Claim, wait_seconds: float = 60) -> Claim:
        """Ends the leg after an inference that asks for the client's tool `ask`."""
        step = inference_step(claim.turn_id, ToolCall(call_id="c1", tool_name="ask", arguments="{}"))
        end = LegEnd(
            TurnStatus.AWAITING_INPUT,
            step["model_response"],
            completed_at=datetime.now(UTC),
            deadline_seconds=wait_seconds,
        )
        last = next_event(claim, EventKind.TURN_AWAITING_INPUT)
        return self.record(claim, [last], step=step, end=end)

    def kill(self, worker_id: str) -> None:
        """The worker died a while ago, and somebody found out."""
        with self.store.engine.begin() as connection:
            dead = text(
                "UPDATE workers SET lease_until = now() - interval '1 s', dead_at = now() WHERE worker_id = :id"
            )
            connection.execute(dead, {"id": worker_id})

    def lose_worker(self, claim: Claim, max_losses: int = 3) -> tuple[str | None, Ended | None]:
        self.kill(claim.worker_id)
        return self.store.transact(workers.take_from_dead, claim.turn_id, max_losses, no_redis)

    def age(self, turn_id: str, column: str, seconds: float) -> None:
        """Moves one of a turn's times into the past."""
        statement = f"UPDATE turns SET {column} = {column} - make_interval(secs => :s) WHERE turn_id = :id"
        with self.store.engine.begin() as connection:
            connection.execute(text(statement), {"s": seconds, "id": turn_id})

    def suspect_no_longer(self, turn_id: str) -> None:
        """The wait of a suspected turn is over."""
        self.age(turn_id, "claimable_at", 1000)

    def row(self, turn_id: str) -> TurnRow:
        return self.store.transact(turns.find_turn, turn_id)[0]

    def column(self, turn_id: str, name: str) -> Any:
        return self.scalar(f"SELECT {name} FROM turns WHERE turn_id = :id", id=turn_id)

    def scalar(self, statement: str, **values: Any) -> Any:
        with self.store.engine.begin() as connection:
            return connection.execute(text(statement), values).scalar()

    def events(self, turn_id: str, after: EventId = events.START) -> list[Event]:
        return self.store.transact(turns.segments_after, turn_id, after, 1000)


@contextmanager
def unhurried(store: Store) -> Iterator[Connection]:
    """A transaction that Postgres does not end, however long a test is idle in it."""
    with store.engine.begin() as connection:
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        yield connection


def no_redis(turn_id: str, fence: int, last: EventId) -> list[Event] | None:
    """A `RaiseFence` while Redis is down."""
    return None


def next_events(claim: Claim, *kinds: EventKind) -> list[Event]:
    """Events that follow the claim's last one; each names its kind."""
    contents = [(kind, events.ascii_json({"kind": kind.value, "of": index})) for index, kind in enumerate(kinds)]
    return events.number(claim.last, claim.fence, contents, claim.last.n + 1)


def next_event(claim: Claim, kind: EventKind = EventKind.STEP_COMPLETE) -> Event:
    return next_events(claim, kind)[0]


def inference_step(turn_id: str, *calls: ToolCall) -> Json:
    reason = StopReason.end_of_message if calls else StopReason.end_of_turn
    message = CompletionMessage(content="" if calls else "Hello", stop_reason=reason, tool_calls=list(calls))
    return _dumped(InferenceStep(turn_id=turn_id, model_response=message, **_step_fields()))


def tool_step(turn_id: str, call: ToolCall, content: str = "3") -> Json:
    response = ToolResponse(call_id=call.call_id, tool_name=call.tool_name, content=content)
    step = ToolExecutionStep(turn_id=turn_id, tool_calls=[call], tool_responses=[response], **_step_fields())
    return _dumped(step)


def _step_fields() -> Json:
    now = datetime.now(UTC)
    return {"step_id": str(uuid.uuid4()), "started_at": now, "completed_at": now}


def _dumped(step: Step) -> Json:
    dumped: Json = events.dump(step)
    return dumped
