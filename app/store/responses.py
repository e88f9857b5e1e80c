"""Responses: read, listed, deleted. A response is a turn; outside a conversation it has a session of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, literal, select, text, tuple_, update

from app.domain.errors import InvalidRequest, NotFound
from app.domain.events import START, EventId
from app.domain.responses.events import Begun
from app.domain.responses.steps import output
from app.domain.turns import ENDED, TurnKind, TurnStatus
from app.store.tables import event_segments, sessions, turns
from app.store.turns import read_steps, segments_after

EVENTS_AT_ONCE = 5000
LISTED_AT_ONCE = 200


@dataclass(frozen=True)
class ResponseRow:
    """A response with its recorded steps as they are stored (`app.domain.responses.steps`)."""

    turn_id: str
    session_id: str
    status: TurnStatus
    request: dict[str, Any]
    steps: list[dict[str, Any]]
    output: dict[str, Any] | None
    error: dict[str, Any] | None
    last: EventId
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None


_OURS = (turns.c.kind == TurnKind.RESPONSE, turns.c.owner == bindparam("of_owner"))
_SHOWN = (*_OURS, turns.c.stored, sessions.c.deleted_at.is_(None))
_RESPONSES = select(turns).join(sessions, sessions.c.session_id == turns.c.session_id)


def get_response(connection: Connection, owner: str, turn_id: str) -> ResponseRow:
    """Raises NotFound: there is none, it is another's, deleted, or was not to be stored."""
    query = _RESPONSES.where(*_SHOWN, turns.c.turn_id == turn_id)
    return _one(connection, query, owner, turn_id)


def read_response(connection: Connection, owner: str, turn_id: str) -> ResponseRow:
    """Also one that is shown to nobody but who asked for it. Raises NotFound."""
    return _one(connection, select(turns).where(*_OURS, turns.c.turn_id == turn_id), owner, turn_id)


def _one(connection: Connection, query: Any, owner: str, turn_id: str) -> ResponseRow:
    row = connection.execute(query, {"of_owner": owner}).one_or_none()
    if row is None:
        raise NotFound("Response", f"resp_{turn_id}")
    return _response(row, read_steps(connection, [turn_id])[turn_id])


def list_responses(
    connection: Connection, owner: str, after: str | None, limit: int, *, model: str | None, descending: bool
) -> tuple[list[ResponseRow], bool]:
    """(one page behind the response `after`, whether more follow). Raises NotFound: there is no such response."""
    first = get_response(connection, owner, after) if after is not None else None
    rows = _in_order(connection, owner, first, max(limit + 1, LISTED_AT_ONCE if model else 0), descending)
    # Not in SQL: a member of a JSON value with U+0000 anywhere in it cannot be read there.
    of_model = (row for row in rows if model is None or row.request["model"] == model)
    found = list(islice(of_model, limit + 1))
    steps = read_steps(connection, [row.turn_id for row in found])
    return [_response(row, steps[row.turn_id]) for row in found[:limit]], len(found) > limit


def _in_order(
    connection: Connection, owner: str, behind: ResponseRow | Row[Any] | None, at_once: int, descending: bool
) -> Iterator[Row[Any]]:
    """All responses behind this one, read as they are asked for."""
    place = tuple_(turns.c.created_at, turns.c.turn_id)
    order = (turns.c.created_at.desc(), turns.c.turn_id.desc()) if descending else (turns.c.created_at, turns.c.turn_id)
    query = _RESPONSES.where(*_SHOWN).order_by(*order).limit(at_once)
    while True:
        here = tuple_(literal(behind.created_at), literal(behind.turn_id)) if behind else None
        there = () if here is None else (place < here if descending else place > here,)
        rows = connection.execute(query.where(*there), {"of_owner": owner}).all()
        yield from rows
        if len(rows) < at_once:
            return
        behind = rows[-1]


def mark_response_deleted(connection: Connection, owner: str, turn_id: str) -> list[str]:
    """Hides a response at once, and its session if it has one of its own. Gives the id of what is to be ended first.

    Its content stays for as long as a later response goes on from it. Raises NotFound.
    """
    row = get_response(connection, owner, turn_id)
    now = func.clock_timestamp()
    ends = row.status not in ENDED
    hidden = {"stored": False, **({"cancel_requested_at": now} if ends else {})}
    connection.execute(update(turns).where(turns.c.turn_id == turn_id).values(hidden))
    own = (sessions.c.session_id == row.session_id, sessions.c.metadata.is_(None))
    connection.execute(update(sessions).where(*own).values(deleted_at=now))
    return [turn_id] if ends else []


def check_previous(connection: Connection, owner: str, turn_id: str) -> None:
    """Keeps that response from being pruned until this transaction is over.

    Raises InvalidRequest: a response cannot go on from that one.
    """
    there = select(turns.c.session_id).where(turns.c.turn_id == turn_id).scalar_subquery()
    connection.execute(
        select(sessions.c.session_id).where(sessions.c.session_id == there).with_for_update(read=True, key_share=True)
    )
    try:
        row = get_response(connection, owner, turn_id)
    except NotFound as error:
        raise InvalidRequest(
            f"Previous response with id 'resp_{turn_id}' not found.", "previous_response_id"
        ) from error
    if row.status not in ENDED:
        message = f"previous_response_id: response 'resp_{turn_id}' is {row.status}; wait until it has ended"
        raise InvalidRequest(message, "previous_response_id")
    if row.request.get("conversation") is not None:
        message = "previous_response_id: this response belongs to a conversation; give `conversation` in its place"
        raise InvalidRequest(message, "previous_response_id")


_CHAIN = text(
    """
    WITH RECURSIVE chain (turn_id, previous_turn_id, depth) AS (
        SELECT turn_id, previous_turn_id, 0 FROM turns WHERE turn_id = :last
        UNION ALL
        SELECT turns.turn_id, turns.previous_turn_id, depth + 1
        FROM turns JOIN chain ON turns.turn_id = chain.previous_turn_id
    )
    SELECT turns.turn_id, turns.request FROM chain JOIN turns USING (turn_id) ORDER BY depth DESC
    """
).columns(turns.c.turn_id, turns.c.request)


def response_chain(connection: Connection, last: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(request, steps) of a response and of all that it goes on from, the first one first."""
    rows = connection.execute(_CHAIN, {"last": last}).all()
    steps = read_steps(connection, [row.turn_id for row in rows])
    return [(row.request, steps[row.turn_id]) for row in rows]


def input_items(connection: Connection, owner: str, turn_id: str) -> list[dict[str, Any]]:
    """In order: what the predecessors of a response were given and said, and its own input; an item that was given
    again, under its id, where it came first. Raises NotFound."""
    get_response(connection, owner, turn_id)
    *before, (own, _) = response_chain(connection, turn_id)
    items = [item for request, steps in before for item in (*request["input"], *output(steps))] + own["input"]
    once: dict[str, dict[str, Any]] = {}
    for item in items:
        once.setdefault(item["id"], item)
    return list(once.values())


def segment_end_before(connection: Connection, turn_id: str, n: int) -> EventId:
    """The last event of the last segment that ends with number `n` or before: a place to read the log from."""
    query = (
        select(event_segments.c.last_fence, event_segments.c.last_n)
        .where(event_segments.c.turn_id == turn_id, event_segments.c.last_n <= n)
        .order_by(event_segments.c.last_fence.desc(), event_segments.c.last_n.desc())
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return START if row is None else EventId(row.last_fence, row.last_n)


def items_begun(connection: Connection, turn_id: str) -> Begun:
    """What all recorded events of a response say of its output items."""
    begun, cursor = Begun(), START
    while found := segments_after(connection, turn_id, cursor, EVENTS_AT_ONCE):
        begun.read(found)
        cursor = found[-1].id
    return begun


def _response(row: Row[Any], steps: list[dict[str, Any]]) -> ResponseRow:
    return ResponseRow(
        turn_id=row.turn_id,
        session_id=row.session_id,
        status=TurnStatus(row.status),
        request=row.request,
        steps=steps,
        output=row.output_message,
        error=row.error,
        last=EventId(row.last_fence, row.last_n),
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
    )
