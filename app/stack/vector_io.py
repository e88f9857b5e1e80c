"""llama_stack's pgvector provider on the process's shared Postgres connection.

Differs from the original: every connection parameter holds (the original knows no TLS), nothing secret stands in its
configuration, queries run in a thread and not on the event loop, a lost connection is opened again, a refresh forgets
deleted stores, a worker does not take up the file batches of the web process, and who does goes on as the principal
that made them, a search that fails is an error, and a store has a table of its own whatever its id is.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

from llama_stack.apis.common.errors import VectorStoreNotFoundError
from llama_stack.apis.vector_stores import VectorStore
from llama_stack.core.storage.datatypes import KVStoreReference
from llama_stack.providers.datatypes import Api
from llama_stack.providers.remote.vector_io.pgvector.pgvector import (
    VECTOR_DBS_PREFIX,
    PGVectorIndex,
    PGVectorVectorIOAdapter,
    upsert_models,
)
from llama_stack.providers.utils.kvstore import kvstore_impl
from llama_stack.providers.utils.memory.vector_store import VectorStoreWithIndex
from psycopg2 import sql
from pydantic import BaseModel

from app.identity import LOCAL_PRINCIPAL
from app.stack import access
from app.stack.postgres import Connection, KeyValueStore, create_table

_search_errors: ContextVar[list[Exception] | None] = ContextVar("search_errors", default=None)

_MADE_UP = re.compile(r"vs_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class VectorConfig(BaseModel):
    persistence: KVStoreReference


def _finish[T](steps: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for anything, as the original index's are: they only call psycopg2."""
    try:
        steps.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a pgvector query waited for the event loop")


class Index(PGVectorIndex):
    async def _in_thread(self, name: str, *args: Any) -> Any:
        method = getattr(PGVectorIndex, name)

        connection: Connection = self.conn
        # Every query here may be run twice, should the connection be lost.
        return await asyncio.to_thread(connection.limited, lambda: _finish(method(self, *args)))

    async def initialize(self) -> None:
        await self._in_thread("initialize")

    async def add_chunks(self, chunks: Any, embeddings: Any) -> None:
        await self._in_thread("add_chunks", chunks, embeddings)

    async def query_vector(self, embedding: Any, k: int, score_threshold: float) -> Any:
        return await self._in_thread("query_vector", embedding, k, score_threshold)

    async def query_keyword(self, query_string: str, k: int, score_threshold: float) -> Any:
        return await self._in_thread("query_keyword", query_string, k, score_threshold)

    async def delete(self) -> None:
        await self._in_thread("delete")

    async def delete_chunks(self, chunks_for_deletion: Any) -> None:
        # The original passes the ids as the statement's arguments, instead of as its one argument.
        ids = [chunk.chunk_id for chunk in chunks_for_deletion]
        connection: Connection = self.conn
        statement = f"DELETE FROM {self.table_name} WHERE id = ANY(%s)"  # noqa: S608 (a sanitized identifier)
        await asyncio.to_thread(connection.limited, lambda: connection.cursor().execute(statement, (ids,)))


class VectorStores(PGVectorVectorIOAdapter):
    async def initialize(self) -> None:
        self.kvstore = await kvstore_impl(self.config.persistence)
        assert isinstance(self.kvstore, KeyValueStore)
        self.conn = self.kvstore.connection
        await asyncio.to_thread(self.conn.run, _create_metadata_table)
        if self.files_api is not None:
            await self.initialize_openai_vector_stores()
        else:
            await self.forget()

    async def shutdown(self) -> None:
        # Not the original's, which closes the connection: that is shared, and closed with the stack.
        await super(PGVectorVectorIOAdapter, self).shutdown()

    async def forget(self) -> None:
        """Read from Postgres what other processes registered or deleted, the next time it is asked for."""
        self.cache.clear()
        self.openai_vector_stores = await self._load_openai_vector_stores()

    async def _save_openai_vector_store_file_batch(self, batch_id: str, batch_info: dict[str, Any]) -> None:
        batch_info.setdefault("principal", access.acting_principal())
        await super()._save_openai_vector_store_file_batch(batch_id, batch_info)

    async def _process_file_batch_async(self, batch_id: str, batch_info: dict[str, Any], *given: Any) -> None:
        # After a restart there is no request that it belongs to.
        with access.acting_as(batch_info.get("principal") or LOCAL_PRINCIPAL):
            await super()._process_file_batch_async(batch_id, batch_info, *given)

    @functools.wraps(PGVectorVectorIOAdapter.openai_search_vector_store)  # llama_stack compares signatures
    async def openai_search_vector_store(self, *args: Any, **kwargs: Any) -> Any:
        # The original logs what the search raises, and answers that nothing was found.
        errors: list[Exception] = []
        outer = _search_errors.set(errors)
        try:
            page = await super().openai_search_vector_store(*args, **kwargs)
        finally:
            _search_errors.reset(outer)
        if errors:
            raise errors[0]
        return page

    @functools.wraps(PGVectorVectorIOAdapter.query_chunks)
    async def query_chunks(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().query_chunks(*args, **kwargs)
        except Exception as error:
            if (errors := _search_errors.get()) is not None:
                errors.append(error)
            raise

    async def register_vector_store(self, vector_store: VectorStore) -> None:
        await self.kvstore.set(f"{VECTOR_DBS_PREFIX}{vector_store.identifier}", vector_store.model_dump_json())
        entry = (vector_store.identifier, vector_store)
        await asyncio.to_thread(self.conn.limited, lambda: upsert_models(self.conn, [entry]))
        await self._remember(vector_store)

    async def unregister_vector_store(self, vector_store_id: str) -> None:
        # The original leaves the table behind where another process registered the store.
        await self._get_and_cache_vector_store_index(vector_store_id)
        await super().unregister_vector_store(vector_store_id)

    async def _get_and_cache_vector_store_index(self, vector_store_id: str) -> VectorStoreWithIndex:
        if cached := self.cache.get(vector_store_id):
            return cached
        stored = await self.kvstore.get(f"{VECTOR_DBS_PREFIX}{vector_store_id}")
        if not stored:
            raise VectorStoreNotFoundError(vector_store_id)
        return await self._remember(VectorStore.model_validate_json(stored))

    async def _remember(self, vector_store: VectorStore) -> VectorStoreWithIndex:
        named = vector_store.model_copy(update={"identifier": table_suffix(vector_store.identifier)})
        index = Index(named, vector_store.embedding_dimension, self.conn, self.kvstore)
        await index.initialize()
        store = VectorStoreWithIndex(vector_store, index, self.inference_api)
        self.cache[vector_store.identifier] = store
        return store


def table_suffix(identifier: str) -> str:
    """What follows `vs_` in the name of a store's table.

    Names of tables have neither case nor signs, and 63 characters at most, so that ids that clients chose
    (`app.stack.vector_dbs`) would share one: `Docs`, `docs`; `a-b`, `a_b`. Ids that were made up stand for themselves.
    """
    if _MADE_UP.fullmatch(identifier):
        return identifier
    return hashlib.sha256(identifier.encode()).hexdigest()[:40]


def _create_metadata_table(cursor: Any) -> None:
    create_table(cursor, sql.Identifier("metadata_store"), "key TEXT PRIMARY KEY, data JSONB")


async def get_adapter_impl(config: VectorConfig, deps: dict[Api, Any]) -> VectorStores:
    provider = VectorStores(config, deps[Api.inference], deps.get(Api.files))
    await provider.initialize()
    return provider
