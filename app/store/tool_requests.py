"""Requests to the tool runtime that wait for a worker, are run by one, or have their answer.

Unlike a turn, a request is its client's alone: who asked waits for the answer, and nobody makes it again. A row goes
when its answer was given, or, if nobody asks for that any more, a while later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from app.domain.errors import TooManyTurns
from app.store.admission import Caps
from app.store.tables import registry_version, seconds, tool_requests, workers
from app.store.workers import BATCH, due_to_ring

KEEP_SECONDS = 60
"""An answer that nobody fetches, and a request after the longest time that it may wait."""

_NOW = func.clock_timestamp()
_LIVE_WORKER = exists().where(workers.c.worker_id == tool_requests.c.worker_id, workers.c.dead_at.is_(None))
_WAITS = tool_requests.c.worker_id.is_(None)
_ENDED = tool_requests.c.status.is_not(None)


@dataclass(frozen=True)
class ToolRequest:
    """One that this worker is to run. `arguments`: JSON of the method's."""

    request_id: str
    worker_id: str
    owner: str
    method: str
    arguments: bytes
    sealed: bytes | None
    registry_version: int


@dataclass(frozen=True)
class Answer:
    """`status`: HTTP's. `body`: JSON of what the method gave (200), or of what says why it gave nothing."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Standing:
    """How a request stands. `lost`: its worker is dead, or its row is gone, so there will be no answer."""

    answer: Answer | None = None
    lost: bool = False
    late: bool = False
    """It has waited too long for a worker."""


def add(
    connection: Connection,
    request_id: str,
    owner: str,
    method: str,
    arguments: bytes,
    sealed: bytes | None,
    caps: Caps,
) -> None:
    """Does nothing if it is there already, as after a lost reply.

    Raises TooManyTurns: as many wait or run as turns may; those that are added at this moment are not seen.
    """
    row = {"request_id": request_id, "owner": owner, "method": method, "arguments": arguments, "sealed": sealed}
    if connection.execute(insert(tool_requests).values(row).on_conflict_do_nothing()).rowcount == 0:
        return
    own = func.count().filter(tool_requests.c.owner == owner)
    counts = connection.execute(select(own.label("own"), func.count().label("all")).where(~_ENDED)).one()
    if counts.own > caps.principal:
        raise TooManyTurns(f"You have {caps.principal} tool requests waiting or running (MAX_TURNS_PER_PRINCIPAL)")
    if counts.all > caps.total:
        raise TooManyTurns(f"There are {caps.total} tool requests waiting or running (MAX_TURNS)")


def claim(connection: Connection, request_id: str, worker_id: str) -> ToolRequest | None:
    """Takes a request that waits. One that this worker has taken already is given again: the reply may have been lost.

    None: somebody else has it, nobody wants it any more, or this worker is dead.
    """
    alive = exists().where(workers.c.worker_id == worker_id, workers.c.dead_at.is_(None), workers.c.lease_until > _NOW)
    mine = or_(_WAITS, tool_requests.c.worker_id == worker_id)
    taken = connection.execute(
        update(tool_requests)
        .where(tool_requests.c.request_id == request_id, mine, ~_ENDED, alive)
        .values(worker_id=worker_id)
        .returning(tool_requests)
    ).one_or_none()
    if taken is None:
        return None
    version = connection.execute(select(registry_version.c.version)).scalar_one()
    sealed = taken.sealed and bytes(taken.sealed)
    return ToolRequest(request_id, worker_id, taken.owner, taken.method, bytes(taken.arguments), sealed, version)


def finish(connection: Connection, request_id: str, worker_id: str, answer: Answer) -> None:
    """Nothing happens if the request is gone."""
    connection.execute(
        update(tool_requests)
        .where(tool_requests.c.request_id == request_id, tool_requests.c.worker_id == worker_id)
        .values(status=answer.status, answer=answer.body, ended_at=_NOW, arguments=None, sealed=None)
    )


def standings(connection: Connection, request_ids: Sequence[str], max_wait_seconds: float) -> dict[str, Standing]:
    """Of those requests that have come to an end, or will not."""
    late = and_(_WAITS, tool_requests.c.created_at < _NOW - seconds(max_wait_seconds))
    rows = connection.execute(
        select(
            tool_requests.c.request_id,
            tool_requests.c.status,
            tool_requests.c.answer,
            and_(~_WAITS, ~_LIVE_WORKER).label("lost"),
            late.label("late"),
        ).where(tool_requests.c.request_id.in_(request_ids))
    ).all()
    there = {row.request_id: _standing(row.status, row.answer, row.lost, row.late) for row in rows}
    found = {request_id: there.get(request_id, Standing(lost=True)) for request_id in request_ids}
    return {request_id: standing for request_id, standing in found.items() if standing != Standing()}


def _standing(status: int | None, answer: bytes | None, lost: bool, late: bool) -> Standing:
    if status is not None:
        return Standing(Answer(status, bytes(answer or b"")))
    return Standing(lost=lost, late=late)


def withdraw(connection: Connection, *request_ids: str) -> bool:
    """Those that no worker has taken. False: there were none."""
    return (
        connection.execute(delete(tool_requests).where(tool_requests.c.request_id.in_(request_ids), _WAITS)).rowcount
        > 0
    )


def forget(connection: Connection, request_ids: Sequence[str]) -> None:
    """Those whose answers were given."""
    connection.execute(delete(tool_requests).where(tool_requests.c.request_id.in_(request_ids)))


def to_ring(connection: Connection, *, backing_off: bool, at_most: int = BATCH) -> list[str]:
    """As `app.store.workers.to_ring`, for requests that wait."""
    due = (
        select(tool_requests.c.request_id)
        .where(_WAITS, due_to_ring(tool_requests, backing_off=backing_off))
        .order_by(tool_requests.c.created_at)
        .limit(min(at_most, BATCH))
        .with_for_update(skip_locked=True)
    )
    ring = update(tool_requests).where(tool_requests.c.request_id.in_(due))
    rung = ring.values(rung_at=_NOW, rings=tool_requests.c.rings + 1)
    return list(connection.scalars(rung.returning(tool_requests.c.request_id)))


def forget_abandoned(connection: Connection, max_wait_seconds: float) -> int:
    """Deletes some of those that no web process asks for any more, as it died. What runs stays: it may take long."""
    left = and_(~_ENDED, or_(_WAITS, ~_LIVE_WORKER), _before(tool_requests.c.created_at, max_wait_seconds))
    old = (
        select(tool_requests.c.request_id)
        # Not by the clock, which is volatile, so that Postgres would look at every request.
        .where(tool_requests.c.created_at < func.now() - seconds(KEEP_SECONDS))
        .where(or_(left, _before(tool_requests.c.ended_at, 0)))
        .limit(BATCH)
        .with_for_update(skip_locked=True)
    )
    return connection.execute(delete(tool_requests).where(tool_requests.c.request_id.in_(old))).rowcount


def _before(time: ColumnElement[Any], wait_seconds: float) -> ColumnElement[bool]:
    return time < _NOW - seconds(wait_seconds + KEEP_SECONDS)
