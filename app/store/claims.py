"""Turns as their owner sees them: claimed, recorded step by step, ended, handed back.

Every write here needs the current fence, status `running` and the owner. A write that finds itself already made (its
commit reply was lost) is not made again; one that finds another owner raises AttemptLost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, exists, func, insert, or_, select, text, true, update
from sqlalchemy.dialects.postgresql import insert as upsert

from app.domain.errors import AttemptLost, TurnFailure
from app.domain.events import Event, EventId, size
from app.domain.turns import ENDED, TurnKind, TurnStatus
from app.store import conversations, session_files
from app.store.responses import response_chain
from app.store.session_files import Changes
from app.store.tables import (
    UNFINISHED_SQL,
    agents,
    journal,
    registry_version,
    seconds,
    sessions,
    tool_calls,
    turns,
    workers,
)
from app.store.turns import add_segment, next_in_session, read_steps

StoredItem = tuple[dict[str, Any], str | None]
"""(an item of a conversation, what a built-in tool gave the model where the item does not say it)"""


@dataclass(frozen=True)
class PastTurn:
    """An earlier turn: its input messages (items, of a response) and its steps, as JSON; the text of its documents."""

    messages: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    context: str


@dataclass(frozen=True)
class LedgerEntry:
    """A server tool call that was started: by which attempt, and its ToolResponse once it is there."""

    fence: int
    result: dict[str, Any] | None


@dataclass(frozen=True)
class Claim:
    """A turn that this worker owns, with all that is needed to go on with it."""

    turn_id: str
    session_id: str
    number: int
    agent_id: str | None
    owner: str
    worker_id: str
    fence: int
    last: EventId
    tail_lost: bool
    agent_config: dict[str, Any] | None
    request: dict[str, Any]
    resolved: dict[str, Any] | None
    tool_responses: dict[str, list[dict[str, Any]]]
    started_at: datetime
    deadline_at: datetime
    registry_version: int
    event_bytes: int = 0
    """Of all recorded events of the turn."""
    following: str | None = None
    """After the turn's end: the session's next turn, if it is queued and is to be rung."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[tuple[int, int], LedgerEntry] = field(default_factory=dict)
    past: list[PastTurn] = field(default_factory=list)
    """An agent's: the session's earlier turns. A response's: the chain of `previous_response_id`, first one first."""
    kind: TurnKind = TurnKind.AGENT
    created_at: datetime | None = None
    items: list[StoredItem] = field(default_factory=list)
    """Of the conversation that a response belongs to."""
    sealed: bytes | None = None


@dataclass(frozen=True)
class LegEnd:
    """How a leg ends: the turn's next status, the message it ends with, or why it failed.

    `output_message`: CompletionMessage of an agent's turn, `{"status", "reason"}` of a response. `items`: what a
    response adds to its conversation.
    """

    status: TurnStatus
    output_message: dict[str, Any] | None = None
    failure: TurnFailure | None = None
    completed_at: datetime | None = None
    deadline_seconds: float | None = None
    items: Sequence[StoredItem] = ()


# Statements of the hot path are built once: building one costs as much as running it.
_NOW = func.clock_timestamp()
_EARLIER = turns.alias("earlier")
FIRST_IN_SESSION = ~exists().where(
    _EARLIER.c.session_id == turns.c.session_id,
    _EARLIER.c.number < turns.c.number,
    text(f"earlier.{UNFINISHED_SQL}"),
)
"""Whether every earlier turn of its session has ended."""

CLAIMABLE = (
    turns.c.status == TurnStatus.QUEUED,
    turns.c.cancel_requested_at.is_(None),
    or_(turns.c.claimable_at.is_(None), turns.c.claimable_at <= _NOW),
    FIRST_IN_SESSION,
)
"""A queued turn that may be claimed now."""

_CLAIM = (
    update(turns)
    .where(
        turns.c.turn_id == bindparam("of_turn"),
        *CLAIMABLE,
        turns.c.failures < bindparam("fewer_failures"),
        exists().where(
            workers.c.worker_id == bindparam("by_worker"), workers.c.dead_at.is_(None), workers.c.lease_until > _NOW
        ),
    )
    .values(
        status=TurnStatus.RUNNING,
        fence=turns.c.fence + 1,
        worker_id=bindparam("by_worker"),
        claimed_at=_NOW,
        started_at=func.coalesce(turns.c.started_at, _NOW),
        deadline_at=func.coalesce(turns.c.deadline_at, _NOW + seconds(bindparam("timeout"))),
    )
    .returning(turns)
)
_CONTEXT = (
    select(agents.c.agent_id, agents.c.config, registry_version.c.version)
    .select_from(sessions.join(agents, isouter=True).join(registry_version, true()))
    .where(sessions.c.session_id == bindparam("of_session"))
)
_PAST = (
    select(turns.c.turn_id, turns.c.request, turns.c.resolved["context"].as_string().label("context"))
    .where(turns.c.session_id == bindparam("of_session"), turns.c.number < bindparam("before"))
    .order_by(turns.c.number)
)
_LEDGER = select(tool_calls).where(tool_calls.c.turn_id == bindparam("of_turn"))


def claim(
    connection: Connection,
    turn_id: str,
    worker_id: str,
    timeout_seconds: float,
    *,
    fewer_failures_than: int = 2**31 - 1,
) -> Claim | None:
    """Takes a queued turn that is the first unfinished one of its session; needs a live lease.

    None: somebody else has it, it has ended, an earlier turn of its session has not, it is to be cancelled or waits
    because it is suspected, it lost as many workers as `fewer_failures_than`, or the lease is over.
    """
    what = {"of_turn": turn_id, "by_worker": worker_id, "timeout": timeout_seconds}
    what["fewer_failures"] = fewer_failures_than
    row = connection.execute(_CLAIM, what).one_or_none()
    if row is None:
        return None
    context = connection.execute(_CONTEXT, {"of_session": row.session_id}).one()
    return Claim(
        turn_id=row.turn_id,
        session_id=row.session_id,
        number=row.number,
        agent_id=context.agent_id,
        owner=row.owner,
        worker_id=worker_id,
        fence=row.fence,
        last=EventId(row.last_fence, row.last_n),
        tail_lost=row.tail_lost,
        agent_config=context.config,
        request=row.request,
        resolved=row.resolved,
        tool_responses=row.tool_responses,
        started_at=row.started_at,
        deadline_at=row.deadline_at,
        registry_version=context.version,
        event_bytes=row.event_bytes,
        kind=TurnKind(row.kind),
        created_at=row.created_at,
        sealed=row.sealed,
        **(_recorded(connection, row) if row.kind == TurnKind.AGENT else _recorded_response(connection, row)),
    )


def wants_process(connection: Connection, turn_id: str, failures: int) -> bool:
    """Whether a turn could be claimed now but for having lost so many workers: it wants a process of its own."""
    query = select(turns.c.turn_id).where(turns.c.turn_id == turn_id, *CLAIMABLE, turns.c.failures >= failures)
    return connection.execute(query).one_or_none() is not None


def _recorded(connection: Connection, row: Row[Any]) -> dict[str, Any]:
    """The turn's journal and ledger, and the session's earlier turns: at most three statements, whatever there is."""
    earlier = _rows(connection, _PAST, {"of_session": row.session_id, "before": row.number}, row.number > 1)
    entries = _rows(connection, _LEDGER, {"of_turn": row.turn_id}, row.fence > 1)
    with_steps = [each.turn_id for each in earlier] + ([row.turn_id] if row.fence > 1 else [])
    steps = read_steps(connection, with_steps) if with_steps else {}
    return {
        "steps": steps.get(row.turn_id, []),
        "past": [PastTurn(each.request["messages"], steps[each.turn_id], each.context or "") for each in earlier],
        "ledger": {(each.ordinal, each.index): LedgerEntry(each.fence, each.result) for each in entries},
    }


def _recorded_response(connection: Connection, row: Row[Any]) -> dict[str, Any]:
    """The response's journal and ledger, what its predecessors said, and its conversation's items."""
    retried = row.fence > 1
    entries = _rows(connection, _LEDGER, {"of_turn": row.turn_id}, retried)
    chain = response_chain(connection, row.previous_turn_id) if row.previous_turn_id else []
    in_conversation = row.request.get("conversation") is not None
    return {
        "steps": read_steps(connection, [row.turn_id])[row.turn_id] if retried else [],
        "past": [PastTurn(request["input"], steps, "") for request, steps in chain],
        "ledger": {(each.ordinal, each.index): LedgerEntry(each.fence, each.result) for each in entries},
        "items": conversations.items_of(connection, row.session_id) if in_conversation else [],
    }


def _rows(connection: Connection, query: Any, what: dict[str, Any], any_possible: bool) -> Sequence[Row[Any]]:
    return connection.execute(query, what).all() if any_possible else ()


_OWNED = (
    turns.c.turn_id == bindparam("of_turn"),
    turns.c.fence == bindparam("with_fence"),
    turns.c.status == TurnStatus.RUNNING,
    turns.c.worker_id == bindparam("by_worker"),
    turns.c.last_fence == bindparam("at_fence"),
    turns.c.last_n == bindparam("at_n"),
)
_OWNED_UPDATE = update(turns).where(*_OWNED)
_RUNNING_HERE = exists().where(
    turns.c.turn_id == bindparam("of_turn"),
    turns.c.fence == bindparam("with_fence"),
    turns.c.status == TurnStatus.RUNNING,
)
_ADD_STEP = insert(journal)
_START_CALL = (
    upsert(tool_calls)
    .values({name: bindparam(name) for name in ("turn_id", "ordinal", "index", "fence")})
    .on_conflict_do_update(
        index_elements=["turn_id", "ordinal", "index"], set_={"fence": bindparam("fence"), "started_at": _NOW}
    )
)
_FORGET_CALLS = delete(tool_calls).where(
    tool_calls.c.turn_id == bindparam("of_turn"),
    tool_calls.c.fence == bindparam("with_fence"),
    tool_calls.c.result.is_(None),
)
_FINISH_CALL = (
    update(tool_calls)
    .where(
        tool_calls.c.turn_id == bindparam("of_turn"),
        tool_calls.c.ordinal == bindparam("of_ordinal"),
        tool_calls.c.index == bindparam("of_index"),
        _RUNNING_HERE,
    )
    .values(result=bindparam("response"))
)


def record(
    connection: Connection,
    claim: Claim,
    events: Sequence[Event],
    *,
    step: dict[str, Any] | None = None,
    resolved: dict[str, Any] | None = None,
    started_calls: Sequence[tuple[int, int]] = (),
    result: tuple[int, int, dict[str, Any]] | None = None,
    files: Changes | None = None,
    end: LegEnd | None = None,
) -> Claim:
    """Records what happened since the last recording, in one fenced transaction; gives the claim as it is now.

    `events`: all events since the last segment. `step`: the next Step of the journal. `started_calls`: (ordinal, index)
    of tool calls about to be made. `result`: (ordinal, index, ToolResponse) of one that was made. `files`: what it
    left in the session's folder.
    Raises AttemptLost: this worker no longer owns the turn.
    """
    values: dict[str, Any] = _end_values(end) if end else {}
    if step is not None:
        values["failures"] = 0
    if resolved is not None:
        values["resolved"] = resolved
    if events:
        values |= {"last_fence": events[-1].id.fence, "last_n": events[-1].id.n, "tail_lost": False}
        values["event_bytes"] = turns.c.event_bytes + size(events)
    if (started_calls or files) and not values:
        values["worker_id"] = claim.worker_id  # changes nothing, and needs the fence like every other write
    if values and not _fenced_update(connection, claim, values, events):
        return _advanced(claim, events, step, resolved)
    if step is not None:
        row = {"turn_id": claim.turn_id, "ordinal": len(claim.steps), "step_id": step["step_id"], "step": step}
        connection.execute(_ADD_STEP, row)
    if events:
        add_segment(connection, claim.turn_id, events)
    for ordinal, index in started_calls:
        _start_call(connection, claim, ordinal, index)
    if result is not None:
        _finish_call(connection, claim, *result)
    if files:
        session_files.leave(connection, claim.session_id, claim.number, files)
    if end and end.items:
        conversations.append(connection, claim.session_id, end.items)
    following = next_in_session(connection, claim.session_id, claim.number) if end and end.status in ENDED else None
    return replace(_advanced(claim, events, step, resolved), following=following)


def _fenced_update(connection: Connection, claim: Claim, values: dict[str, Any], events: Sequence[Event]) -> bool:
    """False: it was made before. Raises AttemptLost."""
    if connection.execute(_OWNED_UPDATE.values(values), _owner(claim)).rowcount:
        return True
    row = connection.execute(select(turns).where(turns.c.turn_id == claim.turn_id)).one_or_none()
    if row and events and row.fence == claim.fence and (row.last_fence, row.last_n) == events[-1].id:
        return False
    raise AttemptLost(f"turn {claim.turn_id}: attempt {claim.fence} is over")


def _end_values(end: LegEnd) -> dict[str, Any]:
    return {
        "status": end.status,
        "output_message": end.output_message,
        "error": end.failure.as_dict() if end.failure else None,
        "completed_at": end.completed_at,
        "deadline_at": _NOW + seconds(end.deadline_seconds) if end.deadline_seconds else None,
        **({"sealed": None} if end.status in ENDED else {}),
    }


def _owner(claim: Claim) -> dict[str, Any]:
    return {
        "of_turn": claim.turn_id,
        "with_fence": claim.fence,
        "by_worker": claim.worker_id,
        "at_fence": claim.last.fence,
        "at_n": claim.last.n,
    }


def _start_call(connection: Connection, claim: Claim, ordinal: int, index: int) -> None:
    row = {"turn_id": claim.turn_id, "ordinal": ordinal, "index": index, "fence": claim.fence}
    connection.execute(_START_CALL, row)


def _finish_call(connection: Connection, claim: Claim, ordinal: int, index: int, response: dict[str, Any]) -> None:
    """Needs the turn's fence, so that an attempt that is over does not overwrite its successor's result."""
    what = {
        "of_turn": claim.turn_id,
        "with_fence": claim.fence,
        "of_ordinal": ordinal,
        "of_index": index,
        "response": response,
    }
    if connection.execute(_FINISH_CALL, what).rowcount == 0:
        raise AttemptLost(f"turn {claim.turn_id}: attempt {claim.fence} is over")


def _advanced(
    claim: Claim, events: Sequence[Event], step: dict[str, Any] | None, resolved: dict[str, Any] | None
) -> Claim:
    return replace(
        claim,
        last=events[-1].id if events else claim.last,
        event_bytes=claim.event_bytes + size(events),
        steps=[*claim.steps, step] if step is not None else claim.steps,
        resolved=resolved if resolved is not None else claim.resolved,
        tail_lost=False if events else claim.tail_lost,
    )


def hand_over(connection: Connection, claim: Claim, events: Sequence[Event], *, between_steps: bool = False) -> bool:
    """Puts an owned turn back to queued, at no cost to its failures; False if it is no longer owned.

    `between_steps`: this attempt has no tool call in flight, so those that it noted as about to be made are forgotten.
    """
    values: dict[str, Any] = {
        "status": TurnStatus.QUEUED,
        "fence": turns.c.fence + 1,
        "queued_at": func.clock_timestamp(),
        "rung_at": func.clock_timestamp(),
        "rings": 1,
    }
    if events:
        values |= {"last_fence": events[-1].id.fence, "last_n": events[-1].id.n}
        values["event_bytes"] = turns.c.event_bytes + size(events)
    try:
        if _fenced_update(connection, claim, values, ()) and events:
            add_segment(connection, claim.turn_id, events)
    except AttemptLost:
        return False
    if between_steps:
        connection.execute(_FORGET_CALLS, {"of_turn": claim.turn_id, "with_fence": claim.fence})
    return True


def still_owned(connection: Connection, claim: Claim) -> bool:
    """Whether the claim holds; waits for whoever is ending the turn at this moment."""
    query = select(turns.c.fence, turns.c.status).where(turns.c.turn_id == claim.turn_id).with_for_update(read=True)
    row = connection.execute(query).one_or_none()
    return row is not None and row.fence == claim.fence and row.status == TurnStatus.RUNNING
