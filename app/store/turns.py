"""Turns as everyone but their owner sees them: read, cancelled, ended from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, literal, select, text, tuple_, update

from app.domain import events
from app.domain.errors import NotFound, TurnFailure
from app.domain.events import Event, EventId, EventKind
from app.domain.turns import TRANSITIONS, TurnKind, TurnStatus
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
    kind: TurnKind = TurnKind.AGENT


@dataclass(frozen=True)
class Standing:
    """How a turn stands, in short: what a follower asks."""

    status: TurnStatus
    last: EventId


@dataclass(frozen=True)
class Ended:
    """A turn was ended from outside: the events to publish, and the session's next turn if it is to be rung."""

    turn_id: str
    status: TurnStatus
    events: list[Event]
    following: str | None


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


def recent_turns(connection: Connection, status: TurnStatus | None, limit: int) -> list[tuple[TurnRow, str | None]]:
    """The newest turns of everyone, for an operator: (turn without its steps, agent id; None: it is a response)."""
    query = _columns().add_columns(sessions.c.agent_id).join(sessions, sessions.c.session_id == turns.c.session_id)
    query = query.order_by(turns.c.created_at.desc()).limit(limit)
    if status is not None:
        query = query.where(turns.c.status == status)
    return [(_turn(row, []), row.agent_id) for row in connection.execute(query)]


def find_turn(connection: Connection, turn_id: str) -> tuple[TurnRow, str | None]:
    """A turn of anyone, for an operator: (turn, agent id; None: it is a response). Raises NotFound."""
    found = _read(connection, turns.c.turn_id == turn_id)
    if not found:
        raise NotFound("Turn", turn_id)
    agent_id = connection.scalar(select(sessions.c.agent_id).where(sessions.c.session_id == found[0].session_id))
    return found[0], agent_id


def standings(connection: Connection, turn_ids: Sequence[str]) -> dict[str, Standing]:
    """How turns stand, by id; a turn that is gone is missing."""
    query = select(turns.c.turn_id, turns.c.status, turns.c.last_fence, turns.c.last_n)
    rows = connection.execute(query.where(turns.c.turn_id.in_(turn_ids)))
    return {row.turn_id: Standing(TurnStatus(row.status), EventId(row.last_fence, row.last_n)) for row in rows}


SEGMENTS_AT_ONCE = 8


def segments_after(connection: Connection, turn_id: str, cursor: EventId, limit: int) -> list[Event]:
    """The first recorded events after `cursor`, at most `limit` of them: none if there are none."""
    position = tuple_(event_segments.c.last_fence, event_segments.c.last_n)
    query = (
        select(event_segments.c.events)
        .where(event_segments.c.turn_id == turn_id, position > tuple_(literal(cursor.fence), literal(cursor.n)))
        .order_by(event_segments.c.last_fence, event_segments.c.last_n)
        .limit(SEGMENTS_AT_ONCE)
    )
    found: list[Event] = []
    for content in connection.scalars(query):
        found += events.unpack(content, cursor, limit - len(found))
        if len(found) >= limit:
            break
    return found


def cancel(
    connection: Connection, turn_id: str, failure: TurnFailure, raise_fence: RaiseFence
) -> tuple[TurnStatus | None, Ended | None]:
    """Ends a queued or awaiting turn; asks the owner of a running one to cancel it.

    Gives (the turn's status now, None if it is gone; its end if this ended it). Asking twice does no harm.
    """
    row = connection.execute(select(turns.c.status).where(turns.c.turn_id == turn_id).with_for_update()).one_or_none()
    if row is None:
        return None, None
    if row.status == TurnStatus.RUNNING:
        asked = func.coalesce(turns.c.cancel_requested_at, func.clock_timestamp())
        connection.execute(update(turns).where(turns.c.turn_id == turn_id).values(cancel_requested_at=asked))
        return TurnStatus.RUNNING, None
    ended = end(connection, turn_id, failure, raise_fence)
    return (ended.status if ended else TurnStatus(row.status)), ended


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
            sealed=None,
        )
    )
    return Ended(turn_id, status, terminal, next_in_session(connection, row.session_id, row.number))


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
        kind=TurnKind(row.kind),
    )
