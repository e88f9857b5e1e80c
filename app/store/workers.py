"""Leases of worker processes, and what upkeep asks and changes. There is no leader: every process does this."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    and_,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)

from app.domain.errors import TurnFailure
from app.domain.turns import TurnStatus
from app.store.claims import CLAIMABLE, FIRST_IN_SESSION
from app.store.tables import UNWANTED_SQL, registry_version, seconds, turns, workers
from app.store.turns import Ended, RaiseFence, end

SUSPECTED_FROM = 2
"""Workers lost in a row from which on a turn is suspected of crashing them, and waits before its next try."""

SUSPECTED_WAIT_SECONDS = 60
BATCH = 50
_NOW = func.clock_timestamp()
RING_FIRST_SECONDS = 4
RING_MOST_SECONDS = 60
KEEP_DEAD_WORKERS_SECONDS = 3600


@dataclass(frozen=True)
class WorkerRow:
    """A worker process whose lease is not over."""

    worker_id: str
    name: str
    running: int


@dataclass(frozen=True)
class Renewal:
    """Ids of turns: all that the worker owns; those of them to be cancelled; those past their deadline."""

    owned: set[str]
    cancelled: set[str]
    overdue: set[str]


def register(connection: Connection, worker_id: str, name: str, lease_seconds: float) -> None:
    lease = func.clock_timestamp() + seconds(lease_seconds)
    connection.execute(insert(workers).values(worker_id=worker_id, name=name, lease_until=lease))


def renew(connection: Connection, worker_id: str, lease_seconds: float) -> Renewal | None:
    """Renews a lease; tells which of the worker's turns are to end. None: it was found dead."""
    lease = func.clock_timestamp() + seconds(lease_seconds)
    mine = update(workers).where(workers.c.worker_id == worker_id, workers.c.dead_at.is_(None))
    if connection.execute(mine.values(lease_until=lease)).rowcount == 0:
        return None
    late = (turns.c.deadline_at < func.clock_timestamp()).label("late")
    owned = select(turns.c.turn_id, turns.c.cancel_requested_at, late).where(
        turns.c.worker_id == worker_id, turns.c.status == TurnStatus.RUNNING
    )
    rows = connection.execute(owned).all()
    return Renewal(
        owned={row.turn_id for row in rows},
        cancelled={row.turn_id for row in rows if row.cancel_requested_at is not None},
        overdue={row.turn_id for row in rows if row.late},
    )


def retire(connection: Connection, worker_id: str) -> None:
    """Ends one's own lease: what it still owns can be taken at once."""
    connection.execute(
        update(workers).where(workers.c.worker_id == worker_id).values(lease_until=func.clock_timestamp())
    )


def live_workers(connection: Connection) -> list[WorkerRow]:
    running = (
        select(func.count())
        .where(turns.c.worker_id == workers.c.worker_id, turns.c.status == TurnStatus.RUNNING)
        .scalar_subquery()
    )
    query = select(workers.c.worker_id, workers.c.name, running.label("running"))
    alive = query.where(workers.c.dead_at.is_(None), workers.c.lease_until > func.clock_timestamp())
    return [WorkerRow(row.worker_id, row.name, row.running) for row in connection.execute(alive.order_by("name"))]


def mark_dead(connection: Connection, lease_seconds: float) -> int:
    """Marks workers whose lease is over, checking it again in the statement; not within a lease of Postgres's start."""
    now = func.clock_timestamp()
    over = (
        workers.c.dead_at.is_(None),
        workers.c.lease_until < now,
        func.pg_postmaster_start_time() + seconds(lease_seconds) < now,
    )
    # A locked row is being renewed or marked; or its worker was stopped in mid-renewal, and must not stop everybody.
    free = select(workers.c.worker_id).where(*over).with_for_update(skip_locked=True, key_share=True)
    expired = update(workers).where(workers.c.worker_id.in_(free), *over)
    return connection.execute(expired.values(dead_at=now)).rowcount


def orphans(connection: Connection) -> list[str]:
    """Some running turns whose worker is dead: others for each of the processes that take them now."""
    query = select(turns.c.turn_id).join(workers, workers.c.worker_id == turns.c.worker_id)
    return list(
        connection.scalars(
            query.where(turns.c.status == TurnStatus.RUNNING, workers.c.dead_at.is_not(None))
            .order_by(func.random())
            .limit(BATCH)
        )
    )


def take_from_dead(
    connection: Connection, turn_id: str, max_losses: int, raise_fence: RaiseFence
) -> tuple[str | None, Ended | None]:
    """Puts a dead worker's turn back to queued, or ends it: (its id if it is to be rung now, its end if it ended).

    It ends if it lost `max_losses` workers with no step recorded in between, if it is to be cancelled, or is overdue.
    """
    row = connection.execute(
        select(turns)
        .where(turns.c.turn_id == turn_id, turns.c.status == TurnStatus.RUNNING)
        .where(exists().where(and_(workers.c.worker_id == turns.c.worker_id, workers.c.dead_at.is_not(None))))
        .with_for_update(skip_locked=True)
    ).one_or_none()
    return (None, None) if row is None else _requeue_or_end(connection, row, 1, max_losses, raise_fence)


def disown(
    connection: Connection,
    turn_id: str,
    worker_id: str,
    max_losses: int,
    raise_fence: RaiseFence,
    *,
    broken: bool = False,
) -> tuple[str | None, Ended | None]:
    """As `take_from_dead`, for a turn that this worker owns but does not run.

    `broken`: it tried, and failed by a fault of this program, which counts as a loss. Otherwise the reply to its claim
    was lost, which costs nothing.
    """
    row = connection.execute(
        select(turns)
        .where(turns.c.turn_id == turn_id, turns.c.worker_id == worker_id, turns.c.status == TurnStatus.RUNNING)
        .with_for_update()
    ).one_or_none()
    return (None, None) if row is None else _requeue_or_end(connection, row, int(broken), max_losses, raise_fence)


def _requeue_or_end(
    connection: Connection, row: Row[Any], cost: int, max_losses: int, raise_fence: RaiseFence
) -> tuple[str | None, Ended | None]:
    turn_id = str(row.turn_id)
    failures = row.failures + cost
    overdue = row.deadline_at is not None and row.deadline_at < connection.scalar(select(func.clock_timestamp()))
    if row.cancel_requested_at is not None:
        return None, end(connection, turn_id, TurnFailure("cancelled", "Cancelled."), raise_fence, running=True)
    if overdue:
        return None, end(connection, turn_id, overdue_failure(), raise_fence, running=True)
    if cost and failures >= max_losses:
        times = "once" if failures == 1 else f"{failures} times in a row with no step finished in between"
        message = f"The worker running this turn was lost {times} (MAX_WORKER_LOSSES)."
        return None, end(connection, turn_id, TurnFailure("worker_lost", message), raise_fence, running=True)
    values = {"status": TurnStatus.QUEUED, "fence": turns.c.fence + 1, "failures": failures, "tail_lost": True}
    suspected = failures >= SUSPECTED_FROM
    values |= _later(failures) if suspected else {"queued_at": _NOW, "rung_at": _NOW, "rings": 1}
    connection.execute(update(turns).where(turns.c.turn_id == turn_id).values(values))
    return None if suspected else turn_id, None


def _later(failures: int) -> dict[str, Any]:
    """Twice as long after each loss, and not all that were lost together at once; upkeep rings when it is time."""
    wait = min(SUSPECTED_WAIT_SECONDS, 2.0 ** (failures - 1)) * random.uniform(0.5, 1.5)  # noqa: S311
    at = _NOW + seconds(wait)
    return {"claimable_at": at, "queued_at": at, "rung_at": None, "rings": 0}


def overdue_failure() -> TurnFailure:
    return TurnFailure("turn_timeout", "The turn took longer than it may (TURN_TIMEOUT_SECONDS).")


def to_ring(connection: Connection, *, backing_off: bool, at_most: int = BATCH) -> list[str]:
    """Claimable turns whose last doorbell is old enough: 4 s, and if `backing_off`, twice as long each time, at most a
    minute. Back off only while messages wait in the queue: if none does, all that were sent are lost, or were in vain.
    """
    due = (
        select(turns.c.turn_id)
        .where(*CLAIMABLE, due_to_ring(turns, backing_off=backing_off))
        .order_by(turns.c.queued_at)
        .limit(min(at_most, BATCH))
        .with_for_update(skip_locked=True)
    )
    ring = update(turns).where(turns.c.turn_id.in_(due)).values(rung_at=_NOW, rings=turns.c.rings + 1)
    return list(connection.scalars(ring.returning(turns.c.turn_id)))


def due_to_ring(table: Table, *, backing_off: bool) -> ColumnElement[bool]:
    """Of a table with `rung_at` and `rings`: whether the last doorbell is old enough (`to_ring`)."""
    factor = func.power(2, func.least(table.c.rings - 1, 8)) if backing_off else 1
    wait = func.least(RING_FIRST_SECONDS * factor, RING_MOST_SECONDS)
    return or_(table.c.rung_at.is_(None), table.c.rung_at < _NOW - seconds(wait))


def end_overdue(
    connection: Connection, turn_id: str, max_queue_wait_seconds: float, raise_fence: RaiseFence
) -> Ended | None:
    """Ends a turn that `overdue` gave, unless somebody has taken or ended it since, or is about to."""
    still = _is_free(connection, turn_id) and overdue(connection, max_queue_wait_seconds, only=turn_id)
    return end(connection, turn_id, still[0][1], raise_fence) if still else None


def _is_free(connection: Connection, turn_id: str) -> bool:
    """Takes the turn's row, unless another transaction has it: that one sees to the turn, or upkeep does later."""
    row = select(turns.c.turn_id).where(turns.c.turn_id == turn_id).with_for_update(skip_locked=True)
    return connection.execute(row).one_or_none() is not None


def overdue(
    connection: Connection, max_queue_wait_seconds: float, *, only: str | None = None
) -> list[tuple[str, TurnFailure]]:
    """Turns that waited too long, for a worker or for input, and why that ends them.

    A suspected turn waits for a process of its own, of which there are few, so it has until its deadline.
    """
    now = func.clock_timestamp()
    alive = select(func.count()).where(workers.c.dead_at.is_(None), workers.c.lease_until > now).scalar_subquery()
    waited = and_(
        turns.c.status == TurnStatus.QUEUED,
        turns.c.queued_at < now - seconds(max_queue_wait_seconds),
        or_(turns.c.failures < SUSPECTED_FROM, alive == 0),
        FIRST_IN_SESSION,
    )
    late = and_(turns.c.status.in_([TurnStatus.QUEUED, TurnStatus.AWAITING_INPUT]), turns.c.deadline_at < now)
    query = select(turns.c.turn_id, turns.c.status, turns.c.deadline_at < now, alive).where(or_(waited, late))
    if only is not None:
        query = query.where(turns.c.turn_id == only)
    return [
        (turn_id, _overdue(status, bool(is_late), live, max_queue_wait_seconds))
        for turn_id, status, is_late, live in connection.execute(query.limit(BATCH))
    ]


def unwanted(connection: Connection, *, only: str | None = None) -> list[str]:
    """Turns that nobody runs and whose end was asked for while somebody did, or when their session was deleted."""
    query = select(turns.c.turn_id).where(turns.c.cancel_requested_at.is_not(None), text(UNWANTED_SQL))
    if only is not None:
        query = query.where(turns.c.turn_id == only)
    return list(connection.scalars(query.limit(BATCH)))


def end_unwanted(connection: Connection, turn_id: str, failure: TurnFailure, raise_fence: RaiseFence) -> Ended | None:
    """Ends a turn that `unwanted` gave, as `end_overdue` does."""
    still = _is_free(connection, turn_id) and unwanted(connection, only=turn_id)
    return end(connection, turn_id, failure, raise_fence) if still else None


def _overdue(status: str, is_late: bool, live: int, max_queue_wait_seconds: float) -> TurnFailure:
    if status == TurnStatus.AWAITING_INPUT:
        return TurnFailure("input_wait_exceeded", "No tool responses came in time (INPUT_WAIT_SECONDS).")
    if is_late:
        return overdue_failure()
    why = why_nobody_took_it(live)
    message = f"No worker took the turn within {max_queue_wait_seconds:g} s (MAX_QUEUE_WAIT_SECONDS): {why}."
    return TurnFailure("queue_wait_exceeded", message)


def why_nobody_took_it(live: int) -> str:
    return f"{live} worker processes run, and none had room" if live else "no worker is running"


def forget_dead_workers(connection: Connection) -> int:
    """Deletes rows of long dead workers that no turn names."""
    old = workers.c.dead_at < func.clock_timestamp() - seconds(KEEP_DEAD_WORKERS_SECONDS)
    unused = ~exists().where(turns.c.worker_id == workers.c.worker_id)
    return connection.execute(delete(workers).where(old, unused)).rowcount


def bump_registry_version(connection: Connection) -> None:
    """Tells every worker, at its next claim, that models, toolgroups, shields or vector stores have changed."""
    connection.execute(update(registry_version).values(version=registry_version.c.version + 1))


def registry_version_now(connection: Connection) -> int:
    return int(connection.execute(select(registry_version.c.version)).scalar_one())
