"""llama_stack's pgvector provider on the process's shared Postgres connection.

Differs from the original: every connection parameter holds (the original knows no TLS), nothing secret stands in its
configuration, queries run in a thread and not on the event loop, a lost connection is opened again, and a store has a
table of its own whatever its id is (`app.stack.vector_index`). What clients are told of a store, its files and batches
is what Postgres has, not what this process saw last: several web processes change them. A file is read and cut up off
the event loop; a search that fails says so; nothing of a deleted store is left. A worker does not take up the file
batches of the web process, and who does goes on as the principal that made them.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from llama_stack.apis.common.errors import VectorStoreNotFoundError
from llama_stack.apis.vector_io import (
    Chunk,
    VectorStoreChunkingStrategyAuto,
    VectorStoreChunkingStrategyStatic,
    VectorStoreDeleteResponse,
    VectorStoreFileDeleteResponse,
    VectorStoreFileLastError,
    VectorStoreFileObject,
    VectorStoreSearchResponse,
    VectorStoreSearchResponsePage,
)
from llama_stack.apis.vector_stores import VectorStore
from llama_stack.core.storage.datatypes import KVStoreReference
from llama_stack.providers.datatypes import Api
from llama_stack.providers.remote.vector_io.pgvector.pgvector import (
    VECTOR_DBS_PREFIX,
    PGVectorVectorIOAdapter,
)
from llama_stack.providers.utils.kvstore import kvstore_impl
from llama_stack.providers.utils.memory.openai_vector_store_mixin import (
    CHUNK_MULTIPLIER,
    OPENAI_VECTOR_STORES_FILE_BATCHES_PREFIX,
    OPENAI_VECTOR_STORES_FILES_CONTENTS_PREFIX,
    OPENAI_VECTOR_STORES_FILES_PREFIX,
    OPENAI_VECTOR_STORES_PREFIX,
)
from llama_stack.providers.utils.memory.vector_store import VectorStoreWithIndex
from llama_stack.providers.utils.vector_io.vector_utils import sanitize_collection_name
from pydantic import BaseModel

from app.identity import LOCAL_PRINCIPAL
from app.stack import access
from app.stack.extraction import text_of
from app.stack.fetching import Fetched, mime_type_by_name
from app.stack.pieces import embed, pieces
from app.stack.postgres import KeyValueStore
from app.stack.vector_index import Index

log = logging.getLogger(__name__)

_MADE_UP = re.compile(r"vs_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
AUTO_TOKENS = (800, 400)
"""OpenAI's `auto`: tokens of a piece, and of its overlap."""

Metadata = dict[str, Any]


class VectorConfig(BaseModel):
    persistence: KVStoreReference
    file_max_bytes: int = 10_485_760


class VectorStores(PGVectorVectorIOAdapter):
    kvstore: KeyValueStore

    async def initialize(self) -> None:
        self.kvstore = await kvstore_impl(self.config.persistence)
        self.conn = self.kvstore.connection
        if self.files_api is not None:
            await self.initialize_openai_vector_stores()

    async def shutdown(self) -> None:
        # Not the original's, which closes the connection: that is shared, and closed with the stack.
        await super(PGVectorVectorIOAdapter, self).shutdown()

    def forget(self) -> None:
        """Read from Postgres what other processes registered or deleted, the next time it is asked for."""
        self.cache.clear()

    # --- stores ---

    async def register_vector_store(self, vector_store: VectorStore) -> None:
        index = self._remember(vector_store)
        await index.create()
        await self.kvstore.set(f"{VECTOR_DBS_PREFIX}{vector_store.identifier}", vector_store.model_dump_json())

    async def unregister_vector_store(self, vector_store_id: str) -> None:
        """Nothing of it is left, also where another process registered it, and if it was half deleted before."""
        index = Index(None, table_name(vector_store_id), self.conn)
        await index.delete()
        for prefix in (OPENAI_VECTOR_STORES_FILES_PREFIX, OPENAI_VECTOR_STORES_FILES_CONTENTS_PREFIX):
            await self.kvstore.delete_prefix(f"{prefix}{vector_store_id}:")
        for prefix in (OPENAI_VECTOR_STORES_PREFIX, VECTOR_DBS_PREFIX):
            await self.kvstore.delete(f"{prefix}{vector_store_id}")
        self.cache.pop(vector_store_id, None)
        self.openai_vector_stores.pop(vector_store_id, None)

    async def openai_delete_vector_store(self, vector_store_id: str) -> VectorStoreDeleteResponse:
        # The original logs what fails, and says that all is deleted.
        await self.unregister_vector_store(vector_store_id)
        return VectorStoreDeleteResponse(id=vector_store_id, deleted=True)

    async def _get_and_cache_vector_store_index(self, vector_store_id: str) -> VectorStoreWithIndex:
        if cached := self.cache.get(vector_store_id):
            return cached
        stored = await self.kvstore.get(f"{VECTOR_DBS_PREFIX}{vector_store_id}")
        if not stored:
            raise VectorStoreNotFoundError(vector_store_id)
        self._remember(VectorStore.model_validate_json(stored))
        return self.cache[vector_store_id]

    def _remember(self, vector_store: VectorStore) -> Index:
        index = Index(vector_store, table_name(vector_store.identifier), self.conn)
        self.cache[vector_store.identifier] = VectorStoreWithIndex(vector_store, index, self.inference_api)
        return index

    # --- content ---

    async def insert_chunks(self, vector_db_id: str, chunks: list[Chunk], ttl_seconds: int | None = None) -> None:
        """Each in the place of the one with its id. Raises what a model server's failure raises."""
        store = await self._get_and_cache_vector_store_index(vector_db_id)
        await self._embed(store, [chunk for chunk in chunks if chunk.embedding is None])
        await store.insert_chunks(chunks)

    async def replace_document(self, vector_db_id: str, document_id: str, chunks: Sequence[Chunk]) -> None:
        """What the store has of a document from now on: all of it, or, if this fails, what it had."""
        store = await self._get_and_cache_vector_store_index(vector_db_id)
        await self._embed(store, chunks)
        await store.index.replace_document(document_id, chunks)

    async def _embed(self, store: VectorStoreWithIndex, chunks: Sequence[Chunk]) -> None:
        described = store.vector_store
        await embed(self.inference_api, described.embedding_model, chunks, described.embedding_dimension)

    async def openai_search_vector_store(
        self,
        vector_store_id: str,
        query: str | list[str],
        filters: Metadata | None = None,
        max_num_results: int | None = 10,
        ranking_options: Any = None,
        rewrite_query: bool | None = False,
        search_mode: str | None = "vector",
    ) -> VectorStoreSearchResponsePage:
        """As the original, save that a search which fails is no search that finds nothing."""
        if search_mode not in ("keyword", "vector", "hybrid"):
            raise ValueError(f"search_mode must be keyword, vector or hybrid, not {search_mode}")
        words, most = " ".join(query) if isinstance(query, list) else query, max_num_results or 10
        least = getattr(ranking_options, "score_threshold", None) or 0.0
        params = {"max_chunks": most * CHUNK_MULTIPLIER, "score_threshold": least, "mode": search_mode}
        found = await self.query_chunks(vector_store_id, words, params)
        pairs = zip(found.chunks, found.scores, strict=True)
        kept = [(chunk, score) for chunk, score in pairs if self._matches_filters(chunk.metadata, filters or {})]
        data = [
            VectorStoreSearchResponse(
                file_id=chunk.document_id or "",
                filename=chunk.metadata.get("filename", ""),
                score=score,
                attributes=chunk.metadata,
                content=self._chunk_to_vector_store_content(chunk),
            )
            for chunk, score in kept[:most]
        ]
        return VectorStoreSearchResponsePage(search_query=words, data=data, has_more=False, next_page=None)

    def _matches_filters(self, metadata: Metadata, filters: Metadata) -> bool:
        try:
            matches: bool = super()._matches_filters(metadata, filters)
        except TypeError:  # a number is neither more nor less than a text
            return False
        return matches

    # --- files ---

    async def openai_attach_file_to_vector_store(
        self, vector_store_id: str, file_id: str, attributes: Metadata | None = None, chunking_strategy: Any = None
    ) -> VectorStoreFileObject:
        """Always answers with the file, whose `status` and `last_error` say if it could not be read or embedded."""
        if file_id in self.openai_vector_stores[vector_store_id]["file_ids"]:
            return VectorStoreFileObject(**await self._load_openai_vector_store_file(vector_store_id, file_id))
        strategy = chunking_strategy or VectorStoreChunkingStrategyAuto()
        file = VectorStoreFileObject(
            id=file_id,
            attributes=attributes or {},
            chunking_strategy=strategy,
            created_at=int(time.time()),
            status="completed",
            vector_store_id=vector_store_id,
        )
        name = ""
        try:
            name, chunks = await self._read(file_id, file.attributes, strategy)
            await self.replace_document(vector_store_id, file_id, chunks)
        except Exception as error:
            log.warning("file %s cannot be attached to %s: %s", file_id, vector_store_id, error)
            file.status = "failed"
            file.last_error = VectorStoreFileLastError(code="server_error", message=str(error))
        # The content is in the store's table, and not in the key-value store as well.
        await self._update_openai_vector_store_file(vector_store_id, file_id, {**file.model_dump(), "filename": name})
        await self._count(vector_store_id, file_id, file.status, 1)
        return file

    async def _read(self, file_id: str, attributes: Metadata, strategy: Any) -> tuple[str, list[Chunk]]:
        """(the file's name, its pieces). Raises ValueError: no text can be had from it."""
        if self.files_api is None:
            raise ValueError("there is no files API")
        name = (await self.files_api.openai_retrieve_file(file_id)).filename
        content = await self.files_api.openai_retrieve_file_content(file_id)
        text = await text_of(Fetched(content.body, mime_type_by_name(name), name), self.config.file_max_bytes)
        tokens, overlap = AUTO_TOKENS
        if isinstance(strategy, VectorStoreChunkingStrategyStatic):
            tokens, overlap = strategy.static.max_chunk_size_tokens, strategy.static.chunk_overlap_tokens
        chunks = await pieces(file_id, text, tokens, overlap, {**attributes, "filename": name})
        if not chunks:
            raise ValueError(f"{name} has no text")
        return name, chunks

    async def openai_delete_vector_store_file(
        self, vector_store_id: str, file_id: str
    ) -> VectorStoreFileDeleteResponse:
        file = await self.openai_retrieve_vector_store_file(vector_store_id, file_id)
        await self.replace_document(vector_store_id, file_id, [])
        await self._delete_openai_vector_store_file_from_storage(vector_store_id, file_id)
        await self._count(vector_store_id, file_id, file.status, -1)
        return VectorStoreFileDeleteResponse(id=file_id, deleted=True)

    async def _load_openai_vector_store_file_contents(self, store_id: str, file_id: str) -> list[Metadata]:
        store = await self._get_and_cache_vector_store_index(store_id)
        contents: list[Metadata] = await store.index.document(file_id)
        return contents

    async def _count(self, store_id: str, file_id: str, status: str, change: int) -> None:
        """Enter a file among the store's (1), or take it out (-1); other processes do the same at this moment."""
        key = f"{OPENAI_VECTOR_STORES_PREFIX}{store_id}"
        while stored := await self.kvstore.get(key):
            info = json.loads(stored)
            if (file_id in info["file_ids"]) == (change > 0):
                return
            info["file_ids"] = [each for each in info["file_ids"] if each != file_id] + [file_id] * (change > 0)
            for name in (status, "total"):
                info["file_counts"][name] += change
            if await self.kvstore.swap(key, stored, json.dumps(info)):
                self.openai_vector_stores[store_id] = info
                return
        raise VectorStoreNotFoundError(store_id)

    # --- batches of files ---

    async def _save_openai_vector_store_file_batch(self, batch_id: str, batch_info: Metadata) -> None:
        batch_info.setdefault("principal", access.acting_principal())
        await super()._save_openai_vector_store_file_batch(batch_id, batch_info)

    async def _process_file_batch_async(self, batch_id: str, batch_info: Metadata, *given: Any) -> None:
        # After a restart there is no request that it belongs to.
        with access.acting_as(batch_info.get("principal") or LOCAL_PRINCIPAL):
            await super()._process_file_batch_async(batch_id, batch_info, *given)

    # --- what Postgres has now ---

    async def look_up(self, vector_store_id: str, batch_id: str | None) -> None:
        """Sees what other processes made of a store, and of a batch that is not worked off here. Raises
        VectorStoreNotFoundError."""
        stored = await self.kvstore.get(f"{OPENAI_VECTOR_STORES_PREFIX}{vector_store_id}")
        if stored is None:
            self.openai_vector_stores.pop(vector_store_id, None)
            raise VectorStoreNotFoundError(vector_store_id)
        self.openai_vector_stores[vector_store_id] = json.loads(stored)
        if batch_id is not None and batch_id not in self._file_batch_tasks:
            batch = await self.kvstore.get(f"{OPENAI_VECTOR_STORES_FILE_BATCHES_PREFIX}{batch_id}")
            if batch is not None:
                self.openai_file_batches[batch_id] = json.loads(batch)


def _current(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of OpenAI's API that first looks up what it is about."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    async def call(self: VectorStores, *args: Any, **kwargs: Any) -> Any:
        named = signature.bind(self, *args, **kwargs).arguments
        await self.look_up(named["vector_store_id"], named.get("batch_id"))
        return await method(self, *args, **kwargs)

    return call


for _name in (
    "openai_retrieve_vector_store",
    "openai_update_vector_store",
    "openai_attach_file_to_vector_store",
    "openai_list_files_in_vector_store",
    "openai_retrieve_vector_store_file",
    "openai_retrieve_vector_store_file_contents",
    "openai_update_vector_store_file",
    "openai_delete_vector_store_file",
    "openai_create_vector_store_file_batch",
    "openai_retrieve_vector_store_file_batch",
    "openai_list_files_in_vector_store_file_batch",
    "openai_cancel_vector_store_file_batch",
):
    setattr(VectorStores, _name, _current(getattr(VectorStores, _name)))


def table_name(identifier: str) -> str:
    """The name of a store's table.

    Names of tables have neither case nor signs, and 63 characters at most, so that ids that clients chose
    (`app.stack.vector_dbs`) would share one: `Docs`, `docs`; `a-b`, `a_b`. Ids that were made up stand for themselves.
    """
    if _MADE_UP.fullmatch(identifier):
        return f"vs_{sanitize_collection_name(identifier)}"
    return f"vs_{hashlib.sha256(identifier.encode()).hexdigest()[:40]}"


async def get_adapter_impl(config: VectorConfig, deps: dict[Api, Any]) -> VectorStores:
    provider = VectorStores(config, deps[Api.inference], deps.get(Api.files))
    await provider.initialize()
    return provider
