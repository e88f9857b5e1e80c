"""Deletes sessions that nobody has used for long, with all that they hold. Never a part of a session's history."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, not_, or_, select, text

from app.store.tables import UNFINISHED_SQL, seconds, sessions, turns

BATCH = 100


def _idle_for(older_than_seconds: float) -> ColumnElement[bool]:
    """Sessions whose last turn ended before then, or that had none; turns of a session end in order."""
    before = func.clock_timestamp() - seconds(older_than_seconds)
    used = exists().where(
        turns.c.session_id == sessions.c.session_id,
        turns.c.number == sessions.c.next_number - 1,
        or_(turns.c.completed_at.is_(None), turns.c.completed_at >= before),
    )
    unfinished = exists().where(turns.c.session_id == sessions.c.session_id, text(UNFINISHED_SQL))
    return and_(sessions.c.created_at < before, not_(used), not_(unfinished))


def idle_sessions(connection: Connection, older_than_seconds: float) -> int:
    """How many sessions there are to prune."""
    query = select(func.count()).select_from(sessions).where(_idle_for(older_than_seconds))
    return int(connection.execute(query).scalar_one())


def prune_sessions(connection: Connection, older_than_seconds: float, after: str | None) -> tuple[int, str | None]:
    """Deletes the idle ones of the next sessions behind the id `after`.

    Gives (how many were deleted, the id to go on behind; None: there are no more). A session that somebody is using at
    this moment is left for another time.
    """
    some = select(sessions.c.session_id).order_by(sessions.c.session_id).limit(BATCH).with_for_update(skip_locked=True)
    if after is not None:
        some = some.where(sessions.c.session_id > after)
    locked = list(connection.scalars(some))
    if not locked:
        return 0, None
    # Looked at once they are locked: a turn posted until then is seen, a later one waits and finds no session.
    gone = delete(sessions).where(sessions.c.session_id.in_(locked), _idle_for(older_than_seconds))
    return connection.execute(gone).rowcount, locked[-1]
