"""`knowledge_search` of an agent's turn: in the documents of its session, and in the vector databases of its toolgroup.

A session's documents are in a vector database of its own (`app.store.session_chunks`), which nobody registers or sees:
it begins with the first document of a turn that has `builtin::rag`, and goes with the session.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from llama_stack.apis.agents import Document
from llama_stack.apis.tools import ToolInvocationResult
from llama_stack.apis.vector_io import Chunk, QueryChunksResponse
from llama_stack.apis.vector_stores import VectorStore
from llama_stack.providers.inline.tool_runtime.rag.config import RagToolRuntimeConfig
from llama_stack.providers.utils.memory.vector_store import VectorStoreWithIndex

from app.domain.errors import TurnFailure, Unavailable
from app.stack.fetching import Fetched
from app.stack.pieces import embed, pieces
from app.stack.retrieval import RagTools
from app.stack.vector_index import SearchIndex, score_of
from app.store import Store, session_chunks
from app.store.session_chunks import SessionChunk
from tasks.engine.inference import model_failure
from tasks.stack import LlamaStack

logger = logging.getLogger(__name__)

KNOWLEDGE_SEARCH = "knowledge_search"
RETRY_SECONDS = 0.5
CHUNK_TOKENS = 256
"""What the small embedding models see of a text."""
OVERLAP_TOKENS = 64


class Knowledge:
    """Of one session."""

    def __init__(self, stack: LlamaStack, store: Store, session_id: str) -> None:
        self._stack = stack
        self._store = store
        self._session_id = session_id

    async def insert(self, documents: Sequence[Document], fetched: Sequence[Fetched], texts: Sequence[str]) -> None:
        """Make documents searchable; one that the session has already gives way. Raises TurnFailure."""
        model = await self._model()
        for document, had, text in zip(documents, fetched, texts, strict=True):
            await self._insert(_document_id(document, had), had, text, model)

    async def _insert(self, document_id: str, had: Fetched, text: str, model: str) -> None:
        chunks = await pieces(document_id, text, CHUNK_TOKENS, OVERLAP_TOKENS, {"filename": had.name})
        try:
            await embed(self._stack.inference, model, chunks)
        except Exception as error:  # the model server's, whatever it is
            failure = model_failure(error)
            message = f"The turn's documents cannot be embedded by {model}: {failure.message}"
            raise TurnFailure(failure.code, message, failure.status) from error
        rows = await asyncio.to_thread(_rows, chunks)
        await self._ask(session_chunks.replace_document, document_id, model, rows)

    async def _model(self) -> str:
        """That of the session's documents, so that all can be searched at once."""
        used = await self._ask(session_chunks.embedding_model)
        model = used or await self._stack.embedding_model()
        if model is None:
            raise TurnFailure(
                "invalid_request",
                "Documents cannot be searched without an embedding model: set EMBEDDING_MODEL, or register one",
            )
        return model

    async def _ask(self, query: Callable[..., Any], *args: Any) -> Any:
        """Of the session's chunks; tries until Postgres answers."""
        while True:
            try:
                return await self._store.run(query, self._session_id, *args)
            except Unavailable as error:
                logger.warning("the session's documents cannot be reached, trying again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def search(self, query: Any, args: dict[str, Any]) -> ToolInvocationResult:
        """`args`: of the toolgroup; only these say where to search. Raises ValueError, or what a search raises."""
        if not isinstance(query, str) or not query.strip():
            raise ValueError("knowledge_search needs a query: a text")
        named = args.get("vector_db_ids") or args.get("vector_store_ids") or []
        model = await self._ask(session_chunks.embedding_model)
        own = [self._session_id] if model else []
        sources = _Sources(self._stack, self._store, self._session_id, model)
        tools = RagTools(RagToolRuntimeConfig(), sources, self._stack.inference, None)
        more = {name: value for name, value in args.items() if name == "query_config"}
        asked = {"query": query, "vector_db_ids": [*named, *own], **more}
        result: ToolInvocationResult = await tools.invoke_tool(KNOWLEDGE_SEARCH, asked)
        return result


class _Sources:
    """llama_stack's vector_io as `knowledge_search` uses it, in which the session's id names its own database."""

    def __init__(self, stack: LlamaStack, store: Store, session_id: str, model: str | None) -> None:
        self._vector_io = stack.vector_io
        self._session_id = session_id
        whose = {"identifier": session_id, "provider_id": "caravan", "embedding_dimension": 0}
        self._own = model and VectorStoreWithIndex(
            VectorStore(embedding_model=model, **whose), _SessionIndex(store, session_id), stack.inference
        )

    async def query_chunks(self, vector_db_id: str, query: Any, params: dict[str, Any]) -> QueryChunksResponse:
        if vector_db_id == self._session_id and self._own:
            return await self._own.query_chunks(query, params)
        if self._vector_io is None:
            raise ValueError("there are no vector databases: Postgres has no pgvector (DATABASE_URL)")
        return await self._vector_io.query_chunks(vector_db_id=vector_db_id, query=query, params=params)


class _SessionIndex(SearchIndex):
    def __init__(self, store: Store, session_id: str) -> None:
        self._store = store
        self._session_id = session_id

    async def query_vector(self, embedding: Any, k: int, score_threshold: float) -> QueryChunksResponse:
        found = await self._store.run(session_chunks.nearest, self._session_id, embedding.tolist(), k)
        return _answer([(chunk, score_of(distance)) for chunk, distance in found], score_threshold)

    async def query_keyword(self, query_string: str, k: int, score_threshold: float) -> QueryChunksResponse:
        found = await self._store.run(session_chunks.matching, self._session_id, query_string, k)
        return _answer(found, score_threshold)


def _rows(chunks: Sequence[Chunk]) -> list[SessionChunk]:
    return [
        SessionChunk(
            str(chunk.content),
            chunk.model_dump(mode="json", exclude={"embedding"}),
            session_chunks.array_of(chunk.embedding or ()),
        )
        for chunk in chunks
    ]


def _answer(found: list[tuple[dict[str, Any], float]], least: float) -> QueryChunksResponse:
    kept = [(Chunk(**chunk), score) for chunk, score in found if score >= least]
    return QueryChunksResponse(chunks=[chunk for chunk, _ in kept], scores=[score for _, score in kept])


def _document_id(document: Document, had: Fetched) -> str:
    """The same for the same URL, and for the same content without one."""
    uri = getattr(document.content, "uri", "")
    named = uri if uri.startswith(("http://", "https://")) else None
    return hashlib.sha256(named.encode() if named else had.data).hexdigest()[:32]
