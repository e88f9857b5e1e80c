"""The folder that the code of a session's turns works in: what each turn left of each file.

A name's last row is what the folder has; a turn's own row is what it showed the client, and stays when later turns
change the file. Writes come with what a turn's owner records (`app.store.claims.record`).
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, bindparam, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as upsert

from app.domain.errors import NotFound
from app.store.tables import session_files, turns

Changes = Mapping[str, bytes | None]
"""By name: the new content, or None for a file that is gone."""

_LAST = (
    select(session_files.c.name, session_files.c.content, func.octet_length(session_files.c.content).label("size"))
    .ext(distinct_on(session_files.c.name))
    .where(session_files.c.session_id == bindparam("of_session"))
    .order_by(session_files.c.name, session_files.c.number.desc())
    .subquery()
)
_FOLDER = select(_LAST.c.name, _LAST.c.content).where(_LAST.c.content.is_not(None))
_SIZES = select(_LAST.c.name, _LAST.c.size).where(_LAST.c.size.is_not(None))
_INSERT = upsert(session_files)
_LEAVE = _INSERT.on_conflict_do_update(
    index_elements=["session_id", "name", "number"], set_={"content": _INSERT.excluded.content}
)


def folder(connection: Connection, session_id: str) -> dict[str, bytes]:
    """All files, by name."""
    return {row.name: bytes(row.content) for row in connection.execute(_FOLDER, {"of_session": session_id})}


def sizes(connection: Connection, session_id: str) -> dict[str, int]:
    """Bytes of all files, by name."""
    return {row.name: row.size for row in connection.execute(_SIZES, {"of_session": session_id})}


def leave(connection: Connection, session_id: str, number: int, changes: Changes) -> None:
    """What the session's turn `number` left. Making it again changes nothing."""
    for name, content in changes.items():
        row = {"session_id": session_id, "number": number, "name": name, "content": content}
        connection.execute(_LEAVE, row)


def left_by_turn(connection: Connection, session_id: str, turn_id: str, name: str) -> bytes:
    """A file as a turn left it. Raises NotFound: it left none of this name."""
    query = (
        select(session_files.c.content)
        .join(turns, (turns.c.session_id == session_files.c.session_id) & (turns.c.number == session_files.c.number))
        .where(
            session_files.c.session_id == session_id,
            turns.c.turn_id == turn_id,
            session_files.c.name == name,
            session_files.c.content.is_not(None),
        )
    )
    content = connection.execute(query).scalar_one_or_none()
    if content is None:
        raise NotFound("Attachment", name)
    return bytes(content)
