"""Conversations: the sessions that have metadata, which no agent's session has, and the items in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as insert_or_not

from app.domain.errors import NotFound
from app.domain.items import Item, conversation_id, refused
from app.store.agents import ask_to_end
from app.store.tables import session_items, sessions, turns

_COLUMNS = (sessions.c.session_id, sessions.c.metadata, sessions.c.created_at)
_LOCK = select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("what"), 0)))
_APPEND = insert_or_not(session_items).on_conflict_do_nothing().returning(session_items.c.item_id)


@dataclass(frozen=True)
class ConversationRow:
    session_id: str
    metadata: dict[str, str]
    created_at: datetime


def create(
    connection: Connection, owner: str, session_id: str, metadata: dict[str, str], items: Sequence[Item]
) -> ConversationRow:
    """`items`: checked and with ids (`app.domain.items`)."""
    values = {"session_id": session_id, "owner": owner, "name": "", "metadata": metadata}
    made = connection.execute(insert(sessions).values(values).returning(*_COLUMNS)).one()
    append(connection, session_id, [(item, None) for item in items])
    return _row(made)


def get(connection: Connection, owner: str, session_id: str) -> ConversationRow:
    """Raises NotFound."""
    return _row(_found(connection.execute(select(*_COLUMNS).where(*_own(owner, session_id))).one_or_none(), session_id))


def update_metadata(connection: Connection, owner: str, session_id: str, metadata: dict[str, str]) -> ConversationRow:
    """Raises NotFound."""
    changed = update(sessions).where(*_own(owner, session_id)).values(metadata=metadata).returning(*_COLUMNS)
    return _row(_found(connection.execute(changed).one_or_none(), session_id))


def mark_deleted(connection: Connection, owner: str, session_id: str) -> list[str]:
    """Hides a conversation at once; gives the ids of its unfinished turns. Raises NotFound."""
    marked = update(sessions).where(*_own(owner, session_id)).values(deleted_at=func.clock_timestamp())
    _found(connection.execute(marked.returning(*_COLUMNS)).one_or_none(), session_id)
    return ask_to_end(connection, turns.c.session_id == session_id)


def add_items(connection: Connection, owner: str, session_id: str, items: Sequence[Item]) -> None:
    """Adds items (checked, with ids) at the end. A response that runs has read its context before.

    Raises NotFound. InvalidRequest: the conversation has an item of this id.
    """
    # The lock keeps the row from being purged meanwhile, and keeps nobody else waiting.
    locked = select(*_COLUMNS).where(*_own(owner, session_id)).with_for_update(read=True, key_share=True)
    _found(connection.execute(locked).one_or_none(), session_id)
    there = append(connection, session_id, [(item, None) for item in items])
    if there:
        index = next(index for index, item in enumerate(items) if item["id"] in there)
        raise refused(f"items[{index}].id", f"the conversation has an item '{items[index]['id']}' already")


def list_items(
    connection: Connection, owner: str, session_id: str, after: str | None, limit: int, *, descending: bool
) -> tuple[list[Item], bool]:
    """(one page behind the item with the id `after`, in this order; whether more follow).

    Raises NotFound: no such conversation, or it has no item `after`.
    """
    get(connection, owner, session_id)
    query = select(session_items.c.item).where(session_items.c.session_id == session_id)
    position = session_items.c.position
    if after is not None:
        cursor = _of_item(connection, session_id, after).position
        query = query.where(position < cursor if descending else position > cursor)
    query = query.order_by(position.desc() if descending else position).limit(limit + 1)
    found = list(connection.scalars(query))
    return found[:limit], len(found) > limit


def get_item(connection: Connection, owner: str, session_id: str, item_id: str) -> Item:
    """Raises NotFound: no such conversation, or it has no such item."""
    get(connection, owner, session_id)
    item: Item = _of_item(connection, session_id, item_id).item
    return item


def delete_item(connection: Connection, owner: str, session_id: str, item_id: str) -> ConversationRow:
    """Gives the conversation. Raises NotFound: no such conversation, or it has no such item."""
    conversation = get(connection, owner, session_id)
    position = _of_item(connection, session_id, item_id).position
    this = (session_items.c.session_id == session_id, session_items.c.position == position)
    connection.execute(delete(session_items).where(*this))
    return conversation


# --- for the engine ---------------------------------------------------------------------------------------------------


def items_of(connection: Connection, session_id: str) -> list[tuple[Item, str | None]]:
    """All items in order, each with what a built-in tool gave the model where the item does not say it."""
    query = select(session_items.c.item, session_items.c.result).where(session_items.c.session_id == session_id)
    return [(row.item, row.result) for row in connection.execute(query.order_by(session_items.c.position))]


def append(connection: Connection, session_id: str, entries: Sequence[tuple[Item, str | None]]) -> set[str]:
    """Adds (item with its id, result) at the end, as one piece, within the caller's transaction.

    An item whose id the conversation has is left out, and the one that is there stays as it is; gives these ids.
    The caller may hold the session's row, but not FOR UPDATE.
    """
    if not entries:
        return set()
    # Whoever appends waits for who did before to commit: positions are in the order of commits, so that nothing appears
    # before what somebody has read. Not by a lock of the session's row: who ends a turn holds that turn's row already,
    # and who deletes a session takes the two in the other order.
    connection.execute(_LOCK, {"what": f"items of {session_id}"})
    rows = [
        {"session_id": session_id, "item_id": item["id"], "item": item, "result": result} for item, result in entries
    ]
    return {row["item_id"] for row in rows} - set(connection.scalars(_APPEND, rows))


def _own(owner: str, session_id: str) -> tuple[Any, ...]:
    return (
        sessions.c.session_id == session_id,
        sessions.c.owner == owner,
        sessions.c.metadata.is_not(None),
        sessions.c.deleted_at.is_(None),
    )


def _found(row: Any, session_id: str) -> Any:
    if row is None:
        raise NotFound("Conversation", conversation_id(session_id))
    return row


def _of_item(connection: Connection, session_id: str, item_id: str) -> Any:
    """Its position and content. Raises NotFound: the conversation has no such item."""
    query = select(session_items.c.position, session_items.c.item).where(session_items.c.session_id == session_id)
    # Postgres takes no U+0000 in a text; no item has such an id.
    known = "\0" not in item_id
    row = connection.execute(query.where(session_items.c.item_id == item_id)).one_or_none() if known else None
    if row is None:
        raise NotFound("Item", item_id)
    return row


def _row(row: Row[Any]) -> ConversationRow:
    return ConversationRow(row.session_id, row.metadata, row.created_at)
