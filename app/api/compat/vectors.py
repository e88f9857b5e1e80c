"""Vector stores were vector databases up to 0.3: both spellings of their ids are taken on every route.

Clients through 0.3.5 send `vector_db_id(s)`, newer ones `vector_store_id(s)`; llama_stack 0.3.5 itself wants one here
and the other there. (`/v1/vector-dbs`, where 0.1 and 0.2 name their databases themselves: `app.stack.vector_dbs`.)
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from app.api.compat.forward import Forwarded, stack_of
from app.api.compat.version import client_version, is_llama_stack

router = APIRouter(tags=["Vector stores"])

JSON = dict[str, Any]
AnyBody = Annotated[JSON, Body()]


@router.post("/vector-io/insert")
async def insert_chunks(body: AnyBody, request: Request) -> Response:
    """Insert chunks into a vector store: `{vector_store_id or vector_db_id, chunks, ttl_seconds?}`."""
    return Forwarded(stack_of(request), "POST", "/v1/vector-io/insert", described(renamed(body, to="vector_db_id")))


@router.post("/vector-io/query")
async def query_chunks(body: AnyBody, request: Request) -> Response:
    """Query chunks of a vector store: `{vector_store_id or vector_db_id, query, params?}`."""
    return Forwarded(stack_of(request), "POST", "/v1/vector-io/query", renamed(body, to="vector_db_id"))


@router.post("/tool-runtime/rag-tool/insert")
async def insert_documents(body: AnyBody, request: Request) -> Response:
    """Insert documents into a vector store: `{vector_store_id or vector_db_id, documents, chunk_size_in_tokens}`."""
    asked = resized(renamed(body, to="vector_store_id"))
    return Forwarded(stack_of(request), "POST", "/v1/tool-runtime/rag-tool/insert", asked)


@router.post("/tool-runtime/rag-tool/query")
async def query_documents(body: AnyBody, request: Request) -> Response:
    """Query documents of vector stores: `{vector_store_ids or vector_db_ids, content, query_config?}`."""
    return Forwarded(stack_of(request), "POST", "/v1/tool-runtime/rag-tool/query", renamed(body, to="vector_store_ids"))


@router.post("/vector_stores/{vector_store_id}/search")
async def search(vector_store_id: str, body: AnyBody, request: Request) -> Response:
    """Search a vector store: `{query, filters?, max_num_results?, ranking_options?, rewrite_query?, search_mode?}`."""
    path = f"/v1/vector_stores/{vector_store_id}/search"
    version = client_version(request.headers) if is_llama_stack(request.headers) else None
    as_text = version is not None and version < (0, 4)
    return Forwarded(stack_of(request), "POST", path, body, answer=None if as_text else with_query_list)


def with_query_list(page: JSON) -> JSON:
    """For OpenAI's, llama-stack-client from 0.4, ogx-client: a list of queries. Older ones read one text."""
    query = page.get("search_query")
    return {**page, "search_query": [query] if isinstance(query, str) else query}


CHUNK_TOKENS = (100, 4096)
"""What 0.3.5 allows as the size of chunks."""

_OTHER = {
    "vector_db_id": "vector_store_id",
    "vector_store_id": "vector_db_id",
    "vector_store_ids": "vector_db_ids",
}


def renamed(body: JSON, *, to: str) -> JSON:
    """From all: a body with the id under the name `to`, which goes first if neither name is null."""
    given = next((body[name] for name in (to, _OTHER[to]) if body.get(name) is not None), None)
    rest = {name: value for name, value in body.items() if name not in (to, _OTHER[to])}
    return rest if given is None else {**rest, to: given}


def described(body: JSON) -> JSON:
    """From all: chunks with `chunk_metadata`, where 0.3.5's search reads ids; without it `knowledge_search` fails."""
    chunks = body.get("chunks")
    return {**body, "chunks": [_described(chunk) for chunk in chunks]} if isinstance(chunks, list) else body


def _described(chunk: Any) -> Any:
    if not isinstance(chunk, dict) or chunk.get("chunk_metadata") is not None:
        return chunk
    given = chunk.get("metadata")
    metadata: JSON = given if isinstance(given, dict) else {}
    document_id = metadata.get("document_id")
    if isinstance(document_id, int):  # as 0.1 and 0.2 took it
        document_id = str(document_id)
        chunk = {**chunk, "metadata": {**metadata, "document_id": document_id}}
    return {**chunk, "chunk_metadata": {"chunk_id": chunk.get("chunk_id"), "document_id": document_id}}


def resized(body: JSON) -> JSON:
    """From 0.1 and 0.2: a size of chunks that 0.3.5 does not allow becomes the nearest that it does."""
    size = body.get("chunk_size_in_tokens")
    if not isinstance(size, int) or size < 1:
        return body
    return {**body, "chunk_size_in_tokens": min(max(size, CHUNK_TOKENS[0]), CHUNK_TOKENS[1])}
