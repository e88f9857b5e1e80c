"""llama_stack's RAG tools, as workers use them: in turns, and for requests to the tool runtime.

Differs from the original: a document that cannot be inserted is an error, where the original logs it, goes on, and
answers as if all were well; it is fetched under rules (`app.stack.fetching`) and read off the event loop; it is known
by its own id, in whose place it comes, and leaves no file behind.
"""

from __future__ import annotations

from typing import Any

from llama_stack.apis.tools import RAGDocument
from llama_stack.apis.vector_io import VectorStoreChunkingStrategyStaticConfig
from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.tool_runtime.rag.config import RagToolRuntimeConfig
from llama_stack.providers.inline.tool_runtime.rag.memory import MemoryToolRuntimeImpl
from pydantic import Field

from app.stack.extraction import text_of
from app.stack.fetching import Rules, fetch
from app.stack.pieces import pieces

OVERLAP = 4
"""One part in so many of a chunk is in the next one too."""


class RagConfig(RagToolRuntimeConfig):
    """`FETCH_ALLOWED` and `DOCUMENT_MAX_BYTES`, which is also what a document's text may have."""

    fetch_allowed: list[str] = Field(default=[])
    document_max_bytes: int = 10_485_760


class RagTools(MemoryToolRuntimeImpl):
    async def insert(self, documents: list[RAGDocument], vector_db_id: str, chunk_size_in_tokens: int = 512) -> None:
        """Raises ValueError: a document cannot be had, or not be read, or the size is out of bounds (100 to 4096).
        VectorStoreNotFoundError is one of these. Documents before the one that failed stay."""
        sizes = VectorStoreChunkingStrategyStaticConfig(
            max_chunk_size_tokens=chunk_size_in_tokens, chunk_overlap_tokens=chunk_size_in_tokens // OVERLAP
        )
        table = self.vector_io_api.routing_table
        store = await table.get_provider_impl(vector_db_id)
        await table.assert_action_allowed("update", "vector_store", vector_db_id)
        for document in documents:
            try:
                await self._insert(store, document, vector_db_id, sizes)
            except ValueError as error:
                raise ValueError(f"document {document.document_id!r} cannot be inserted: {error}") from error

    async def _insert(self, store: Any, document: RAGDocument, vector_db_id: str, sizes: Any) -> None:
        rules = Rules.allowing(self.config.fetch_allowed, self.config.document_max_bytes)
        name = document.metadata.get("filename")
        had = await fetch(document.content, document.mime_type, rules, name=str(name) if name else None)
        text = await text_of(had, rules.max_bytes)
        metadata = {"filename": had.name, **document.metadata}
        chunks = await pieces(
            document.document_id, text, sizes.max_chunk_size_tokens, sizes.chunk_overlap_tokens, metadata
        )
        if not chunks:
            raise ValueError("it has no text")
        if hasattr(store, "replace_document"):
            await store.replace_document(vector_db_id, document.document_id, chunks)
        else:  # another provider, of a run.yaml of the user's own
            await store.insert_chunks(vector_db_id, chunks)


async def get_provider_impl(config: RagConfig, deps: dict[Api, Any]) -> RagTools:
    provider = RagTools(config, deps[Api.vector_io], deps[Api.inference], deps.get(Api.files))
    await provider.initialize()
    return provider
