"""Turns as everyone but their owner sees them: accepted, read, resumed, ended from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, literal, select, text, tuple_, update

from app.domain import events
from app.domain.errors import Conflict, NotFound, TurnFailure
from app.domain.events import Event, EventId, EventKind
from app.domain.turns import TRANSITIONS, TurnStatus
from app.store.agents import get_session
from app.store.tables import UNFINISHED_SQL, event_segments, journal, sessions, turns, workers

RaiseFence = Callable[[str, int, EventId], list[Event] | None]
"""(turn id, new fence, last recorded event) → the dead attempt's events after it, or None if they cannot be had."""


@dataclass(frozen=True)
class TurnRow:
    """A turn with its recorded steps (each a Step as JSON), as `GET` shows it."""

    turn_id: str
    session_id: str
    number: int
    status: TurnStatus
    request: dict[str, Any]
    steps: list[dict[str, Any]]
    output_message: dict[str, Any] | None
    error: dict[str, Any] | None
    fence: int
    last: EventId
    worker: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None


@dataclass(frozen=True)
class Standing:
    """How a turn stands, in short: what a follower asks."""

    status: TurnStatus
    last: EventId


@dataclass(frozen=True)
class Ended:
    """A turn was ended from outside: the events to publish, and the session's next turn if it is to be rung."""

    turn_id: str
    events: list[Event]
    following: str | None


_TAKE_NUMBER = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("of_session"),
        sessions.c.agent_id == bindparam("of_agent"),
        sessions.c.owner == bindparam("of_owner"),
        sessions.c.deleted_at.is_(None),
    )
    .values(next_number=sessions.c.next_number + 1)
    .returning(sessions.c.next_number)
)
_AWAITING = select(turns.c.turn_id).where(
    turns.c.session_id == bindparam("of_session"), turns.c.status == TurnStatus.AWAITING_INPUT
)
_ADD_TURN = insert(turns).values(
    {
        **{name: bindparam(name) for name in ("turn_id", "session_id", "owner", "number", "request")},
        "status": TurnStatus.QUEUED,
        "tool_responses": {},
        "queued_at": func.clock_timestamp(),
        "rung_at": func.clock_timestamp(),
        "rings": 1,
    }
)


def accept(
    connection: Connection, owner: str, agent_id: str, session_id: str, turn_id: str, request: dict[str, Any]
) -> list[Ended]:
    """Stores a new turn at the end of its session, and supersedes the one that awaits input there, if any.

    Gives the turns that this ended. Raises NotFound: no such agent or session.
    """
    where = {"of_session": session_id, "of_agent": agent_id, "of_owner": owner}
    following = connection.execute(_TAKE_NUMBER, where).scalar()
    if following is None:
        get_session(connection, owner, agent_id, session_id)
        raise NotFound("Session", session_id)
    superseded = _supersede(connection, session_id) if following > 2 else []
    row = {"turn_id": turn_id, "session_id": session_id, "owner": owner, "number": following - 1, "request": request}
    connection.execute(_ADD_TURN, row)
    return superseded


def _supersede(connection: Connection, session_id: str) -> list[Ended]:
    failure = TurnFailure("superseded", "A newer turn of the session superseded this one while it awaited input.")
    awaiting = connection.scalars(_AWAITING, {"of_session": session_id}).all()
    ended = [end(connection, turn_id, failure, _no_tail) for turn_id in awaiting]
    return [one for one in ended if one is not None]


def _no_tail(turn_id: str, fence: int, last: EventId) -> None:
    """A turn that awaits input has every event recorded, so there is no tail to save."""


def resume(connection: Connection, turn_id: str, session_id: str, responses: list[dict[str, Any]]) -> EventId:
    """Stores a client's tool responses and puts the turn back to queued for its next leg.

    Gives the last event of the leg before. Raises NotFound, Conflict: the turn does not await input.
    """
    row = connection.execute(
        select(turns).where(turns.c.turn_id == turn_id, turns.c.session_id == session_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound("Turn", turn_id)
    if row.status != TurnStatus.AWAITING_INPUT:
        raise Conflict(f"Turn '{turn_id}' is {row.status}, so it does not await tool responses")
    steps = read_steps(connection, [turn_id])[turn_id]
    ordinal = max(i for i, step in enumerate(steps) if step["step_type"] == "inference")
    connection.execute(
        update(turns)
        .where(turns.c.turn_id == turn_id)
        .values(
            status=TurnStatus.QUEUED,
            tool_responses={**row.tool_responses, str(ordinal): responses},
            output_message=None,
            completed_at=None,
            cancel_requested_at=None,
            deadline_at=None,
            queued_at=func.clock_timestamp(),
            rung_at=func.clock_timestamp(),
            rings=1,
        )
    )
    return EventId(row.last_fence, row.last_n)


def get_turn(connection: Connection, session_id: str, turn_id: str) -> TurnRow:
    """Raises NotFound: the session has no such turn."""
    found = _read(connection, turns.c.session_id == session_id, turns.c.turn_id == turn_id)
    if not found:
        raise NotFound("Turn", turn_id)
    return found[0]


def session_turns(connection: Connection, session_id: str, turn_ids: Sequence[str] | None = None) -> list[TurnRow]:
    """A session's turns in order; only those of `turn_ids` if given."""
    conditions = [turns.c.session_id == session_id]
    if turn_ids is not None:
        conditions.append(turns.c.turn_id.in_(turn_ids))
    return _read(connection, *conditions)


def recent_turns(connection: Connection, status: TurnStatus | None, limit: int) -> list[tuple[TurnRow, str]]:
    """The newest turns of everyone, for an operator: (turn without its steps, agent id)."""
    query = _columns().add_columns(sessions.c.agent_id).join(sessions, sessions.c.session_id == turns.c.session_id)
    query = query.order_by(turns.c.created_at.desc()).limit(limit)
    if status is not None:
        query = query.where(turns.c.status == status)
    return [(_turn(row, []), row.agent_id) for row in connection.execute(query)]


def find_turn(connection: Connection, turn_id: str) -> tuple[TurnRow, str]:
    """A turn of anyone, for an operator: (turn, agent id). Raises NotFound."""
    found = _read(connection, turns.c.turn_id == turn_id)
    if not found:
        raise NotFound("Turn", turn_id)
    agent_id = connection.scalar(select(sessions.c.agent_id).where(sessions.c.session_id == found[0].session_id))
    return found[0], str(agent_id)


def standings(connection: Connection, turn_ids: Sequence[str]) -> dict[str, Standing]:
    """How turns stand, by id; a turn that is gone is missing."""
    query = select(turns.c.turn_id, turns.c.status, turns.c.last_fence, turns.c.last_n)
    rows = connection.execute(query.where(turns.c.turn_id.in_(turn_ids)))
    return {row.turn_id: Standing(TurnStatus(row.status), EventId(row.last_fence, row.last_n)) for row in rows}


def segments_after(connection: Connection, turn_id: str, cursor: EventId, limit: int) -> list[Event]:
    """The recorded events after `cursor`, from at most `limit` segments."""
    position = tuple_(event_segments.c.last_fence, event_segments.c.last_n)
    query = (
        select(event_segments.c.events)
        .where(event_segments.c.turn_id == turn_id, position > tuple_(literal(cursor.fence), literal(cursor.n)))
        .order_by(event_segments.c.last_fence, event_segments.c.last_n)
        .limit(limit)
    )
    return [event for content in connection.scalars(query) for event in events.unpack(content) if event.id > cursor]


def request_cancel(connection: Connection, turn_id: str) -> TurnStatus | None:
    """Asks a running turn's owner to cancel it; gives the turn's status, None if it is gone."""
    asked = (
        update(turns)
        .where(turns.c.turn_id == turn_id, turns.c.status == TurnStatus.RUNNING)
        .values(cancel_requested_at=func.coalesce(turns.c.cancel_requested_at, func.clock_timestamp()))
    )
    if connection.execute(asked).rowcount:
        return TurnStatus.RUNNING
    status = connection.scalar(select(turns.c.status).where(turns.c.turn_id == turn_id))
    return None if status is None else TurnStatus(status)


def end(
    connection: Connection, turn_id: str, failure: TurnFailure, raise_fence: RaiseFence, *, running: bool = False
) -> Ended | None:
    """Ends a turn that nobody owns (or, with `running`, one whose owner is known to be dead).

    Raises the fence here and in the log, stores what the dead attempt left in the log, then the terminal event, all in
    this transaction. None: the turn has ended already, or is running.
    """
    row = connection.execute(select(turns).where(turns.c.turn_id == turn_id).with_for_update()).one_or_none()
    cancelled = failure.code in ("cancelled", "superseded", "deleted")
    status = TurnStatus.CANCELLED if cancelled else TurnStatus.FAILED
    if row is None or status not in TRANSITIONS[TurnStatus(row.status)]:
        return None
    if row.status == TurnStatus.RUNNING and not running:
        return None
    last = EventId(row.last_fence, row.last_n)
    tail = raise_fence(turn_id, row.fence + 1, last)
    if tail:
        add_segment(connection, turn_id, tail)
        last = tail[-1].id
    may_be_lost = tail is None and (row.tail_lost or row.status == TurnStatus.RUNNING)
    first_n = last.n + 1 + (events.LOST_TAIL_LEAP if may_be_lost else 0)
    terminal = events.number(last, row.fence + 1, [(EventKind.ERROR, events.error(failure))], first_n)
    add_segment(connection, turn_id, terminal)
    connection.execute(
        update(turns)
        .where(turns.c.turn_id == turn_id)
        .values(
            status=status,
            fence=row.fence + 1,
            tail_lost=False,
            last_fence=terminal[-1].id.fence,
            last_n=terminal[-1].id.n,
            error=failure.as_dict(),
            completed_at=func.clock_timestamp(),
            deadline_at=None,
        )
    )
    return Ended(turn_id, terminal, next_in_session(connection, row.session_id, row.number))


_ADD_SEGMENT = insert(event_segments)


def add_segment(connection: Connection, turn_id: str, recorded: Sequence[Event]) -> None:
    """Stores events that follow all that are stored."""
    last = recorded[-1].id
    row = {"turn_id": turn_id, "last_fence": last.fence, "last_n": last.n, "events": events.pack(recorded)}
    connection.execute(_ADD_SEGMENT, row)


_FIRST_UNFINISHED = (
    select(turns.c.turn_id, turns.c.status, turns.c.number)
    .where(turns.c.session_id == bindparam("of_session"), text(UNFINISHED_SQL))
    .order_by(turns.c.number)
    .limit(1)
)


def next_in_session(connection: Connection, session_id: str, ended: int) -> str | None:
    """After the turn with the number `ended`: the one to ring now. Its queue wait starts here.

    None: there is none, it is not queued, or an earlier turn than the one that ended goes first.
    """
    row = connection.execute(_FIRST_UNFINISHED, {"of_session": session_id}).one_or_none()
    if row is None or row.status != TurnStatus.QUEUED or row.number < ended:
        return None
    now = func.clock_timestamp()
    ring = update(turns).where(turns.c.turn_id == row.turn_id, turns.c.status == TurnStatus.QUEUED)
    connection.execute(ring.values(queued_at=now, rung_at=now, rings=1))
    return str(row.turn_id)


def _columns() -> Any:
    return select(turns, workers.c.name.label("worker")).join(
        workers, workers.c.worker_id == turns.c.worker_id, isouter=True
    )


def _read(connection: Connection, *conditions: Any) -> list[TurnRow]:
    rows = connection.execute(_columns().where(*conditions).order_by(turns.c.number)).all()
    steps = read_steps(connection, [row.turn_id for row in rows])
    return [_turn(row, steps[row.turn_id]) for row in rows]


_STEPS = (
    select(journal.c.turn_id, journal.c.step)
    .where(journal.c.turn_id.in_(bindparam("of_turns", expanding=True)))
    .order_by(journal.c.turn_id, journal.c.ordinal)
)


def read_steps(connection: Connection, turn_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The recorded steps of turns, in order, by turn."""
    steps: dict[str, list[dict[str, Any]]] = {turn_id: [] for turn_id in turn_ids}
    for row in connection.execute(_STEPS, {"of_turns": turn_ids}):
        steps[row.turn_id].append(row.step)
    return steps


def _turn(row: Row[Any], steps: list[dict[str, Any]]) -> TurnRow:
    return TurnRow(
        turn_id=row.turn_id,
        session_id=row.session_id,
        number=row.number,
        status=TurnStatus(row.status),
        request=row.request,
        steps=steps,
        output_message=row.output_message,
        error=row.error,
        fence=row.fence,
        last=EventId(row.last_fence, row.last_n),
        worker=row.worker,
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
    )
