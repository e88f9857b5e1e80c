"""Agents and sessions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, func, insert, not_, select, text, update

from app.domain.errors import NotFound
from app.store.tables import UNFINISHED_SQL, agents, seconds, sessions, turns


@dataclass(frozen=True)
class AgentRow:
    agent_id: str
    config: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class SessionRow:
    session_id: str
    agent_id: str
    name: str
    next_number: int
    """Of the session's next turn."""
    created_at: datetime


def create_agent(connection: Connection, owner: str, agent_id: str, config: dict[str, Any]) -> None:
    connection.execute(insert(agents).values(agent_id=agent_id, owner=owner, config=config))


def get_agent(connection: Connection, owner: str, agent_id: str) -> AgentRow:
    """Raises NotFound."""
    row = connection.execute(_agents(owner).where(agents.c.agent_id == agent_id)).one_or_none()
    if row is None:
        raise NotFound("Agent", agent_id)
    return _agent(row)


def list_agents(connection: Connection, owner: str, start: int, limit: int) -> tuple[list[AgentRow], bool]:
    """(one page, oldest first; whether more follow)."""
    query = _agents(owner).order_by(agents.c.created_at, agents.c.agent_id).offset(start).limit(limit + 1)
    rows = connection.execute(query).all()
    return [_agent(row) for row in rows[:limit]], len(rows) > limit


def create_session(connection: Connection, owner: str, agent_id: str, session_id: str, name: str) -> None:
    """Raises NotFound: no such agent."""
    locked = _agents(owner).where(agents.c.agent_id == agent_id).with_for_update(read=True)
    if connection.execute(locked).one_or_none() is None:
        raise NotFound("Agent", agent_id)
    values = {"session_id": session_id, "agent_id": agent_id, "owner": owner, "name": name}
    connection.execute(insert(sessions).values(**values))


def get_session(connection: Connection, owner: str, agent_id: str, session_id: str) -> SessionRow:
    """Raises NotFound: no such agent, or it has no such session."""
    query = _sessions(owner, agent_id).where(sessions.c.session_id == session_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        get_agent(connection, owner, agent_id)
        raise NotFound("Session", session_id)
    return _session(row)


def list_sessions(
    connection: Connection, owner: str, agent_id: str, start: int, limit: int
) -> tuple[list[SessionRow], bool]:
    """(one page, oldest first; whether more follow). Raises NotFound: no such agent."""
    get_agent(connection, owner, agent_id)
    query = _sessions(owner, agent_id).order_by(sessions.c.created_at, sessions.c.session_id)
    rows = connection.execute(query.offset(start).limit(limit + 1)).all()
    return [_session(row) for row in rows[:limit]], len(rows) > limit


def mark_agent_deleted(connection: Connection, owner: str, agent_id: str) -> list[str]:
    """Hides an agent and its sessions at once; gives the ids of the unfinished turns. Raises NotFound."""
    marked = (
        update(agents)
        .where(agents.c.agent_id == agent_id, agents.c.owner == owner, agents.c.deleted_at.is_(None))
        .values(deleted_at=func.clock_timestamp())
    )
    if connection.execute(marked).rowcount == 0:
        raise NotFound("Agent", agent_id)
    hidden = update(sessions).where(sessions.c.agent_id == agent_id, sessions.c.deleted_at.is_(None))
    connection.execute(hidden.values(deleted_at=func.clock_timestamp()))
    of_agent = select(sessions.c.session_id).where(sessions.c.agent_id == agent_id)
    return ask_to_end(connection, turns.c.session_id.in_(of_agent))


def mark_session_deleted(connection: Connection, owner: str, agent_id: str, session_id: str) -> list[str]:
    """Hides a session at once; gives the ids of its unfinished turns. Raises NotFound."""
    get_session(connection, owner, agent_id, session_id)
    marked = update(sessions).where(sessions.c.session_id == session_id)
    connection.execute(marked.values(deleted_at=func.clock_timestamp()))
    return ask_to_end(connection, turns.c.session_id == session_id)


def ask_to_end(connection: Connection, which: ColumnElement[bool]) -> list[str]:
    """Asks for the end of unfinished turns, whoever will see to it: their workers, or upkeep. Gives their ids.

    It takes their rows in the order of their sessions, as whoever ends a turn and rings the next one does.
    """
    in_order = select(turns.c.turn_id).where(which, text(UNFINISHED_SQL)).order_by(turns.c.session_id, turns.c.number)
    found = list(connection.scalars(in_order.with_for_update()))
    asked = update(turns).where(turns.c.turn_id.in_(found)).values(cancel_requested_at=func.clock_timestamp())
    connection.execute(asked)
    return found


def is_continued() -> ColumnElement[bool]:
    """Whether a turn of another session goes on from one of this session, whose content it needs.

    Also if that one is deleted: it is there as long as others go on from it.
    """
    of_session, later = turns.alias(), turns.alias()
    return exists().where(
        of_session.c.session_id == sessions.c.session_id,
        later.c.previous_turn_id == of_session.c.turn_id,
        later.c.session_id != of_session.c.session_id,
    )


def purge_deleted(connection: Connection, grace_seconds: float, limit: int) -> int:
    """Deletes the rows of sessions and agents marked deleted `grace_seconds` ago, once nothing is unfinished there and
    no other session's turn goes on from theirs."""
    old = func.clock_timestamp() - seconds(grace_seconds)
    purged = 0
    while purged < limit and (gone := _purge_sessions(connection, old, limit - purged)):
        purged += gone  # what these went on from may go now
    left = exists().where(sessions.c.agent_id == agents.c.agent_id)
    empty = select(agents.c.agent_id).where(agents.c.deleted_at < old, not_(left))
    emptied = delete(agents).where(agents.c.agent_id.in_(empty.limit(limit).with_for_update(skip_locked=True)))
    return purged + connection.execute(emptied).rowcount


def _purge_sessions(connection: Connection, old: ColumnElement[Any], limit: int) -> int:
    here = turns.c.session_id == sessions.c.session_id
    running = exists().where(and_(here, text(UNFINISHED_SQL)))
    # A response that was not to be stored has just been answered, and its stream may still be read.
    ended_lately = exists().where(and_(here, turns.c.completed_at >= old))
    idle = select(sessions.c.session_id).where(
        sessions.c.deleted_at < old, not_(running), not_(ended_lately), not_(is_continued())
    )
    gone = delete(sessions).where(sessions.c.session_id.in_(idle.limit(limit).with_for_update(skip_locked=True)))
    return connection.execute(gone).rowcount


def _agents(owner: str) -> Any:
    columns = select(agents.c.agent_id, agents.c.config, agents.c.created_at)
    return columns.where(agents.c.owner == owner, agents.c.deleted_at.is_(None))


def _sessions(owner: str, agent_id: str) -> Any:
    columns = select(
        sessions.c.session_id, sessions.c.agent_id, sessions.c.name, sessions.c.next_number, sessions.c.created_at
    )
    return columns.where(sessions.c.agent_id == agent_id, sessions.c.owner == owner, sessions.c.deleted_at.is_(None))


def _agent(row: Row[Any]) -> AgentRow:
    return AgentRow(row.agent_id, row.config, row.created_at)


def _session(row: Row[Any]) -> SessionRow:
    return SessionRow(row.session_id, row.agent_id, row.name, row.next_number, row.created_at)
