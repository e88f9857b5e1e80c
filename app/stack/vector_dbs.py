"""`/v1/vector-dbs` of llama_stack 0.1 and 0.2, on 0.3.5's vector stores.

There, clients name their databases themselves, and register them again on each start of a program. 0.3.5 makes up the
ids of vector stores; save for that, a database made here is a vector store like any other, and each vector store is
shown as a database. Programs also name the provider that their server had (`faiss`, mostly): ours takes its place.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from llama_stack.apis.common.errors import VectorStoreNotFoundError
from llama_stack.apis.vector_io import OpenAICreateVectorStoreRequestWithExtraBody
from llama_stack.core.store.registry import DiskDistributionRegistry
from pydantic import BaseModel

from app.stack import access

KIND = "vector_store"

PROVIDERS = frozenset({
    "chroma", "chromadb", "faiss", "meta-reference", "milvus", "pgvector", "qdrant", "sqlite-vec", "sqlite_vec",
    "weaviate",
})  # fmt: skip
"""What the distributions of Llama Stack call their providers of vector databases."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class VectorDB(BaseModel):
    """A vector database as 0.1 and 0.2 describe it."""

    identifier: str
    provider_resource_id: str | None
    provider_id: str
    type: str = "vector_db"
    embedding_model: str
    embedding_dimension: int
    vector_db_name: str | None


class VectorDBList(BaseModel):
    data: list[VectorDB]


class VectorDBs:
    """The routes' methods; each asks as the principal of its request (see `app.stack.access`).

    `router`: the stack's vector_io. `lock`: makes who registers wait for who else does, in whichever process; blocks.
    """

    def __init__(self, router: Any, lock: Callable[[], AbstractContextManager[None]]) -> None:
        self._router = router
        self._table = router.routing_table
        self._lock = lock
        self._turn = asyncio.Lock()

    async def list_vector_dbs(self) -> VectorDBList:
        stores = await self._table.get_all_with_type(KIND)
        return VectorDBList(data=[_shape(store) for store in stores])

    async def get_vector_db(self, vector_db_id: str) -> VectorDB:
        """Raises VectorStoreNotFoundError."""
        store = await self._table.get_object_by_identifier(KIND, vector_db_id)
        if store is None:
            raise VectorStoreNotFoundError(vector_db_id)
        return _shape(store)

    async def register_vector_db(
        self,
        vector_db_id: str,
        embedding_model: str,
        embedding_dimension: int | None = None,
        provider_id: str | None = None,
        vector_db_name: str | None = None,
        provider_vector_db_id: str | None = None,
    ) -> VectorDB:
        """Make a database, or find it if it is there; `provider_vector_db_id` has no effect.

        Raises ValueError: the id is no id, is taken, or is that of a database for another embedding model; there is no
        such model or provider.
        """
        if not _ID.fullmatch(vector_db_id):
            raise ValueError("vector_db_id must have 1 to 128 letters, digits, `.`, `_` or `-`, the first no sign")
        async with self._exclusively():
            return await self._existing(vector_db_id, embedding_model, embedding_dimension) or await self._make(
                vector_db_id, embedding_model, embedding_dimension, provider_id, vector_db_name or vector_db_id
            )

    @asynccontextmanager
    async def _exclusively(self) -> AsyncIterator[None]:
        """Of this process, one waits in a thread: if all threads did, who has the lock would find none to go on in."""
        async with self._turn:
            lock = self._lock()
            await asyncio.to_thread(lock.__enter__)
            try:
                yield
            finally:
                await asyncio.to_thread(lock.__exit__, None, None, None)

    async def _existing(self, vector_db_id: str, model: str, dimension: int | None) -> VectorDB | None:
        # Straight from Postgres: another web process may have registered it a moment ago.
        found = await DiskDistributionRegistry.get(self._table.dist_registry, KIND, vector_db_id)
        if found is None:
            return None
        if found.owner is not None and found.owner.principal != access.acting_principal():
            raise ValueError(f"vector_db_id: {vector_db_id!r} is taken")
        if found.embedding_model != model or dimension not in (None, found.embedding_dimension):
            raise ValueError(
                f"vector_db_id: {vector_db_id!r} is there already, for the embedding model {found.embedding_model!r} "
                f"with {found.embedding_dimension} dimensions"
            )
        return _shape(found)

    async def _make(
        self, vector_db_id: str, model: str, dimension: int | None, provider_id: str | None, name: str
    ) -> VectorDB:
        """What the original's router does once it has made up an id."""
        store = await self._table.register_vector_store(
            vector_store_id=vector_db_id,
            embedding_model=model,
            embedding_dimension=dimension or await self._router._get_embedding_model_dimension(model),
            provider_id=known_provider(provider_id, self._table),
            provider_vector_store_id=vector_db_id,
            vector_store_name=name,
        )
        provider = await self._table.get_provider_impl(store.identifier)
        await provider.openai_create_vector_store(
            OpenAICreateVectorStoreRequestWithExtraBody(
                name=store.vector_store_name,
                provider_vector_store_id=store.identifier,
                provider_id=store.provider_id,
                embedding_model=store.embedding_model,
                embedding_dimension=store.embedding_dimension,
            )
        )
        return _shape(store)

    async def unregister_vector_db(self, vector_db_id: str) -> None:
        """Delete a database with its content. Raises VectorStoreNotFoundError."""
        await self.get_vector_db(vector_db_id)
        await self._router.openai_delete_vector_store(vector_db_id)


def known_provider(provider_id: str | None, table: Any) -> str | None:
    """The one that there is, in place of one that other servers have and this one has not."""
    here = list(table.impls_by_provider_id)
    return here[0] if provider_id in PROVIDERS and provider_id not in here and len(here) == 1 else provider_id


def with_known_provider(create: Callable[..., Awaitable[Any]], table: Any) -> Callable[..., Awaitable[Any]]:
    """`openai_create_vector_store`, whose `provider_id` may be one of these too."""

    @functools.wraps(create)
    async def call(params: Any) -> Any:
        if params.model_extra and "provider_id" in params.model_extra:
            params.model_extra["provider_id"] = known_provider(params.model_extra["provider_id"], table)
        return await create(params)

    call.__signature__ = inspect.signature(create)  # type: ignore[attr-defined]
    return call


def _shape(store: Any) -> VectorDB:
    return VectorDB(
        identifier=store.identifier,
        provider_resource_id=store.provider_resource_id,
        provider_id=store.provider_id,
        embedding_model=store.embedding_model,
        embedding_dimension=store.embedding_dimension,
        vector_db_name=store.vector_store_name,
    )


ROUTES = (
    ("get", "/v1/vector-dbs", "list_vector_dbs"),
    ("post", "/v1/vector-dbs", "register_vector_db"),
    ("get", "/v1/vector-dbs/{vector_db_id}", "get_vector_db"),
    ("delete", "/v1/vector-dbs/{vector_db_id}", "unregister_vector_db"),
)
