"""One vector store's table in Postgres: llama_stack's pgvector index, on the process's shared connection.

Differs from the original: queries run in a thread and not on the event loop; a document's pieces take the place of
those that it had, at once; a piece that is just what was asked for has a score, and not infinity, which JSON has not;
a table is made when its store is registered, and not whenever a process first looks at it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import psycopg2.errors
from llama_stack.apis.common.errors import VectorStoreNotFoundError
from llama_stack.apis.vector_io import Chunk, QueryChunksResponse
from llama_stack.apis.vector_stores import VectorStore
from llama_stack.providers.remote.vector_io.pgvector.pgvector import PGVectorIndex
from llama_stack.providers.utils.inference.prompt_adapter import interleaved_content_as_str
from llama_stack.providers.utils.memory.vector_store import EmbeddingIndex
from psycopg2.extras import Json

from app.stack.postgres import Connection

_LEAST_DISTANCE = 1e-6


def score_of(distance: float) -> float:
    """llama_stack's score of a distance, its reciprocal, within bounds."""
    return 0.0 if math.isnan(distance) else 1.0 / max(distance, _LEAST_DISTANCE)


class SearchIndex(EmbeddingIndex):
    """An index whose content is changed in other ways; hybrid search is made of the other two, as in the original."""

    query_hybrid = PGVectorIndex.query_hybrid

    async def add_chunks(self, chunks: Any, embeddings: Any) -> None:
        raise NotImplementedError

    async def delete_chunks(self, chunks_for_deletion: Any) -> None:
        raise NotImplementedError

    async def delete(self) -> None:
        raise NotImplementedError


class Index(PGVectorIndex):
    """`vector_store`: as clients know it. `table`: its table's name, an SQL identifier that needs no quotes."""

    def __init__(self, vector_store: VectorStore | None, table: str, connection: Connection) -> None:
        super().__init__(vector_store, vector_store.embedding_dimension if vector_store else 0, connection)
        self.table_name = table

    async def initialize(self) -> None:
        """Nothing: the table is there since the store was registered (`create`)."""

    async def create(self) -> None:
        table = self.table_name
        await self._execute(
            f"CREATE TABLE IF NOT EXISTS {table} (id TEXT PRIMARY KEY, document JSONB, "
            f"embedding vector({int(self.dimension)}), content_text TEXT, tokenized_content TSVECTOR);"
            f"CREATE INDEX IF NOT EXISTS {table}_content_gin_idx ON {table} USING GIN (tokenized_content);"
            f"CREATE INDEX IF NOT EXISTS {table}_document_idx ON {table} ({_DOCUMENT_ID})"
        )

    async def add_chunks(self, chunks: Sequence[Chunk], embeddings: Any) -> None:
        """Each in the place of the one that has its id; all at once. Their embeddings are their own."""
        await self._write(b"", chunks)

    async def replace_document(self, document_id: str, chunks: Sequence[Chunk]) -> None:
        """The document's only pieces from now on, at once; who else replaces the same document waits."""
        connection: Connection = self.conn
        lock = f"SELECT pg_advisory_xact_lock(hashtextextended('{self.table_name}:' || %s, 0));"
        deletion = f"DELETE FROM {self.table_name} WHERE {_DOCUMENT_ID} = %s;"  # noqa: S608 (ours)
        before = await asyncio.to_thread(lambda: connection.cursor().mogrify(lock + deletion, (document_id,) * 2))
        await self._write(before, chunks)

    async def _write(self, before: bytes, chunks: Sequence[Chunk]) -> None:
        """One string of statements, and so one transaction."""
        statement = before + await asyncio.to_thread(self._insertion, chunks)
        if statement:
            await self._execute(statement)

    def _insertion(self, chunks: Sequence[Chunk]) -> bytes:
        connection: Connection = self.conn
        unique = {chunk.chunk_id: chunk for chunk in chunks}  # one statement may not write a row twice
        with connection.cursor() as cursor:
            rows = [_row(cursor, *each) for each in unique.items()]
        if not rows:
            return b""
        columns = "(id, document, embedding, content_text, tokenized_content)"
        into = f"INSERT INTO {self.table_name} {columns} VALUES "  # noqa: S608 (ours)
        return (
            into.encode()
            + b",".join(rows)
            + b" ON CONFLICT (id) DO UPDATE SET embedding = EXCLUDED.embedding, document = EXCLUDED.document, "
            b"content_text = EXCLUDED.content_text, tokenized_content = EXCLUDED.tokenized_content"
        )

    async def document(self, document_id: str) -> list[dict[str, Any]]:
        """A document's pieces, in its order."""
        query = f"SELECT document FROM {self.table_name} WHERE {_DOCUMENT_ID} = %s"  # noqa: S608 (ours)
        found = [row[0] for row in await self._rows(query, (document_id,))]
        return sorted(found, key=_place)

    async def query_vector(self, embedding: Any, k: int, score_threshold: float) -> QueryChunksResponse:
        rows = await self._rows(
            f"SELECT document, embedding <=> %s::vector AS distance FROM {self.table_name} "  # noqa: S608 (ours)
            "ORDER BY distance LIMIT %s",
            (embedding.tolist(), k),
        )
        scored = [(Chunk(**document), score_of(float(distance))) for document, distance in rows]
        kept = [(chunk, score) for chunk, score in scored if score >= score_threshold]
        return QueryChunksResponse(chunks=[chunk for chunk, _ in kept], scores=[score for _, score in kept])

    async def query_keyword(self, query_string: str, k: int, score_threshold: float) -> QueryChunksResponse:
        return await self._in_thread(
            lambda: _finish(PGVectorIndex.query_keyword(self, query_string, k, score_threshold))
        )

    async def delete(self) -> None:
        await self._execute(f"DROP TABLE IF EXISTS {self.table_name}")

    async def delete_chunks(self, chunks_for_deletion: Any) -> None:
        # The original passes the ids as the statement's arguments, instead of as its one argument.
        ids = [chunk.chunk_id for chunk in chunks_for_deletion]
        await self._execute(f"DELETE FROM {self.table_name} WHERE id = ANY(%s)", (ids,))  # noqa: S608 (ours)

    async def _execute(self, statement: str | bytes, arguments: tuple[Any, ...] | None = None) -> None:
        connection: Connection = self.conn
        await self._in_thread(lambda: connection.cursor().execute(statement, arguments))

    async def _rows(self, statement: str, arguments: tuple[Any, ...]) -> list[Any]:
        def work() -> list[Any]:
            connection: Connection = self.conn
            with connection.cursor() as cursor:
                cursor.execute(statement, arguments)
                return list(cursor.fetchall())

        return await self._in_thread(work)

    async def _in_thread[T](self, work: Callable[[], T]) -> T:
        """Every query here may be run twice, should the connection be lost. Raises VectorStoreNotFoundError: another
        process has deleted the store; ValueError: Postgres cannot hold this."""
        connection: Connection = self.conn
        try:
            return await asyncio.to_thread(connection.limited, work)
        except psycopg2.errors.UndefinedTable as error:
            raise VectorStoreNotFoundError(self.vector_store.identifier if self.vector_store else "") from error
        except psycopg2.DataError as error:  # another number of dimensions, or U+0000
            raise ValueError(str(error).partition("\n")[0]) from error


def _row(cursor: Any, chunk_id: str, chunk: Chunk) -> bytes:
    """The embedding is in its column, and not in the document as well."""
    text, numbers = interleaved_content_as_str(chunk.content), json.dumps(chunk.embedding)
    values = (chunk_id, Json(chunk.model_dump(exclude={"embedding"})), numbers, text, text)
    row: bytes = cursor.mogrify("(%s, %s, %s::vector, %s, to_tsvector('english', %s))", values)
    return row


def _place(chunk: dict[str, Any]) -> int:
    window = (chunk.get("chunk_metadata") or {}).get("chunk_window") or ""
    start = window.partition("-")[0]
    return int(start) if start.isdigit() else 0


_DOCUMENT_ID = "(coalesce(document #>> '{metadata,document_id}', document #>> '{chunk_metadata,document_id}'))"


def _finish[T](steps: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for anything, as the original index's are: they only call psycopg2."""
    try:
        steps.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a pgvector query waited for the event loop")
