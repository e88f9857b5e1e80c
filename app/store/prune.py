"""Deletes sessions that nobody has used for long, with all that they hold. Never a part of a session's history."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, exists, false, func, not_, or_, select, text

from app.store.agents import is_continued
from app.store.tables import UNFINISHED_SQL, seconds, session_items, sessions, turns

BATCH = 100


def _idle_for(older_than_seconds: float) -> ColumnElement[bool]:
    """Sessions whose last turn ended before then, or that had none; turns of a session end in order. A conversation is
    used as well when an item is added."""
    before = func.clock_timestamp() - seconds(older_than_seconds)
    used = exists().where(
        turns.c.session_id == sessions.c.session_id,
        turns.c.number == sessions.c.next_number - 1,
        or_(turns.c.completed_at.is_(None), turns.c.completed_at >= before),
    )
    unfinished = exists().where(turns.c.session_id == sessions.c.session_id, text(UNFINISHED_SQL))
    of_session = session_items.c.session_id == sessions.c.session_id
    last = select(session_items.c.created_at).where(of_session).order_by(session_items.c.position.desc()).limit(1)
    added = func.coalesce(last.scalar_subquery() >= before, false())
    return and_(sessions.c.created_at < before, not_(used), not_(unfinished), not_(added))


def idle_sessions(connection: Connection, older_than_seconds: float) -> int:
    """How many sessions there are to prune: idle ones that no session in use goes on from, be it through others."""
    idle = _idle_for(older_than_seconds)
    earlier, later = turns.alias(), turns.alias()
    goes_on = later.c.previous_turn_id == earlier.c.turn_id
    used = sessions.join(later, later.c.session_id == sessions.c.session_id).join(earlier, goes_on)
    needed = select(earlier.c.session_id).select_from(used).where(not_(idle)).cte(recursive=True)
    further = needed.join(later, later.c.session_id == needed.c.session_id).join(earlier, goes_on)
    needed = needed.union(select(earlier.c.session_id).select_from(further))
    query = select(func.count()).select_from(sessions)
    return int(connection.execute(query.where(idle, sessions.c.session_id.not_in(select(needed)))).scalar_one())


def prune_sessions(connection: Connection, older_than_seconds: float, after: str | None) -> tuple[int, str | None]:
    """Deletes the idle ones of the next sessions behind the id `after`, and what only these went on from.

    Gives (how many were deleted, the id to go on behind; None: there are no more). A session that somebody is using at
    this moment is left for another time.
    """
    some = select(sessions.c.session_id).order_by(sessions.c.session_id).limit(BATCH)
    if after is not None:
        some = some.where(sessions.c.session_id > after)
    batch = _locked(connection, some)
    deleted, candidates = 0, batch
    while candidates:
        earlier = list(connection.scalars(_earlier_than(candidates)))
        # Looked at once they are locked: a turn posted until then is seen, a later one waits and finds no session.
        idle = (sessions.c.session_id.in_(candidates), _idle_for(older_than_seconds), not_(is_continued()))
        gone = connection.execute(delete(sessions).where(*idle)).rowcount
        deleted += gone
        named = select(sessions.c.session_id).where(sessions.c.session_id.in_(earlier))
        candidates = _locked(connection, named) if gone else []
    return deleted, batch[-1] if batch else None


def _locked(connection: Connection, some: Select[Any]) -> list[str]:
    return list(connection.scalars(some.with_for_update(skip_locked=True)))


def _earlier_than(session_ids: list[str]) -> Select[Any]:
    """The sessions whose turns the turns of these go on from."""
    earlier, later = turns.alias(), turns.alias()
    goes_on = later.c.previous_turn_id == earlier.c.turn_id
    return select(earlier.c.session_id).join(later, goes_on).where(later.c.session_id.in_(session_ids))
