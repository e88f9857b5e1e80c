"""The pieces of the documents that a session's turns were given, with their embeddings: its own vector database.

They are the session's rows, so they go with it, in whichever process and however it is deleted. Searches look at all of
a session's: that is exact, and as quick as an index for what one session has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ARRAY, REAL, Connection, Text, bindparam, cast, delete, func, insert, select, text

from app.store.tables import session_chunks


@dataclass(frozen=True)
class SessionChunk:
    """`chunk`: llama_stack's Chunk as JSON, without its embedding."""

    content: str
    chunk: dict[str, Any]
    embedding: str
    """As Postgres reads an array (`array_of`)."""


def array_of(embedding: Sequence[float]) -> str:
    """Made before a transaction begins: of a megabyte's chunks it takes seconds, and more as psycopg2 does it."""
    return "{" + json.dumps(embedding)[1:-1] + "}"


_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:document, 0))")
_INSERTION = insert(session_chunks).values(embedding=cast(bindparam("numbers", type_=Text), ARRAY(REAL)))
_OF_SESSION = session_chunks.c.session_id == bindparam("of_session")
_DISTANCE = text("CAST(embedding AS vector) <=> CAST(:query AS vector) AS distance")
_QUERY = func.plainto_tsquery("english", bindparam("query"))
_WORDS = func.to_tsvector("english", session_chunks.c.content)
_RANK = func.ts_rank(_WORDS, _QUERY).label("rank")


def replace_document(
    connection: Connection, session_id: str, document_id: str, model: str, chunks: Sequence[SessionChunk]
) -> None:
    """Takes the place of what the session had of this document. `model`: whose embeddings they are."""
    connection.execute(_LOCK, {"document": f"{session_id}:{document_id}"})
    of_document = (session_chunks.c.session_id == session_id, session_chunks.c.document_id == document_id)
    connection.execute(delete(session_chunks).where(*of_document))
    whose = {"session_id": session_id, "document_id": document_id, "embedding_model": model}
    rows = [
        {**whose, "position": position, "content": each.content, "chunk": each.chunk, "numbers": each.embedding}
        for position, each in enumerate(chunks)
    ]
    if rows:
        connection.execute(_INSERTION, rows)


def embedding_model(connection: Connection, session_id: str) -> str | None:
    """Of the session's documents, all of which have the same; None: it has no documents."""
    query = select(session_chunks.c.embedding_model).where(session_chunks.c.session_id == session_id).limit(1)
    model: str | None = connection.scalar(query)
    return model


def nearest(
    connection: Connection, session_id: str, embedding: Sequence[float], limit: int
) -> list[tuple[dict[str, Any], float]]:
    """(chunk, cosine distance), the nearest first."""
    query = select(session_chunks.c.chunk, _DISTANCE).where(_OF_SESSION).order_by(text("distance")).limit(limit)
    asked = {"of_session": session_id, "query": "[" + ",".join(map(str, embedding)) + "]"}
    return [(row.chunk, float(row.distance)) for row in connection.execute(query, asked)]


def matching(connection: Connection, session_id: str, words: str, limit: int) -> list[tuple[dict[str, Any], float]]:
    """(chunk, rank), the best first: those that have all the words of an English text."""
    found = select(session_chunks.c.chunk, _RANK).where(_OF_SESSION, _WORDS.op("@@")(_QUERY))
    rows = connection.execute(found.order_by(_RANK.desc()).limit(limit), {"of_session": session_id, "query": words})
    return [(row.chunk, float(row.rank)) for row in rows]
