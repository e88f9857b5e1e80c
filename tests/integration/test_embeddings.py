"""`EMBEDDING_URL` through the stack: stores that name no model, batches, and what is said when the server fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from app.local.server import free_port
from app.settings import Settings
from app.stack.chunks import ModelError
from app.stack.inference import EMBEDDING_BATCH
from tests.integration.test_stack_mount import FakeModelServer, database_url, make_settings, web, worker

__all__ = ["database_url"]

TEXTS = [f"text {number}" for number in range(2 * EMBEDDING_BATCH + 1)]


@pytest.fixture
async def embedder() -> AsyncIterator[FakeModelServer]:
    fake = FakeModelServer()
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    yield fake
    listening.close()


@pytest.fixture
def settings(database_url: str, embedder: FakeModelServer) -> Settings:
    return with_embeddings(database_url, embedding_url=embedder.url, embedding_api_key="sk-embed")


def with_embeddings(database_url: str, **values: Any) -> Settings:
    given = {"embedding_model": "text-embedding", "embedding_dimension": 8, "model_aliases": ["short=text-embedding"]}
    return make_settings(database_url, inference_url=f"http://127.0.0.1:{free_port()}/v1", **{**given, **values})


def chunks(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"content": text, "metadata": {"document_id": "d"}, "chunk_metadata": {"chunk_id": f"c{number}"}}
        for number, text in enumerate(texts)
    ]


async def test_a_store_that_names_no_model_has_the_settings_model(
    settings: Settings, embedder: FakeModelServer
) -> None:
    """Also where the id has no slash, which llama_stack expects. Large inserts are asked for in batches, in order."""
    async with web(settings) as (client, _):
        store = (await client.post("/v1/vector_stores", json={"name": "s"})).json()["id"]
        inserted = {"vector_db_id": store, "chunks": chunks(TEXTS)}
        assert (await client.post("/v1/vector-io/insert", json=inserted)).status_code == 200
        asked = [body["input"] for path, _, body in embedder.requests if path == "/v1/embeddings"]
        assert [text for batch in asked for text in batch] == TEXTS
        assert max(len(batch) for batch in asked) == EMBEDDING_BATCH
        _, headers, body = embedder.requests[0]
        assert (body["model"], headers["authorization"]) == ("text-embedding", "Bearer sk-embed")
        found = await client.post("/v1/vector-io/query", json={"vector_db_id": store, "query": "other"})
        assert found.status_code == 200, found.text


async def test_each_name_of_the_embedding_model_is_that_model(settings: Settings, embedder: FakeModelServer) -> None:
    async with web(settings) as (client, _):
        for name in ("text-embedding", "short", "embeddings-server/text-embedding"):
            store = {"name": "s", "embedding_model": name}
            assert (await client.post("/v1/vector_stores", json=store)).status_code == 200, name
            database = {"vector_db_id": name.replace("/", "-"), "embedding_model": name, "embedding_dimension": 8}
            assert (await client.post("/v1/vector-dbs", json=database)).status_code == 200, name


async def test_a_dead_embeddings_server_is_an_error_that_names_the_setting(database_url: str) -> None:
    """The stack starts without it; inserting and searching fail at once, in the web process and in a worker."""
    dead = with_embeddings(database_url, embedding_url=f"http://127.0.0.1:{free_port()}/v1")
    async with web(dead) as (client, _), worker(dead) as stack:
        store = (await client.post("/v1/vector_stores", json={"name": "s"})).json()["id"]
        await stack.refresh_registry()
        inserted = await client.post("/v1/vector-io/insert", json={"vector_db_id": store, "chunks": chunks(["a"])})
        assert_names_the_setting(inserted, dead)
        assert_names_the_setting(await client.post(f"/v1/vector_stores/{store}/search", json={"query": "a"}), dead)
        with pytest.raises(ModelError, match="EMBEDDING_URL"):
            await stack.vector_io.query_chunks(store, "a")


def assert_names_the_setting(answer: httpx.Response, settings: Settings) -> None:
    assert answer.status_code == 502, answer.text
    assert f"EMBEDDING_URL ({settings.embedding_url}): The model server cannot be reached" in answer.text


async def test_a_wrong_dimension_is_told(database_url: str, embedder: FakeModelServer) -> None:
    wrong = with_embeddings(database_url, embedding_url=embedder.url, embedding_dimension=9)
    async with web(wrong) as (client, _):
        store = (await client.post("/v1/vector_stores", json={"name": "s"})).json()["id"]
        answer = await client.post("/v1/vector-io/insert", json={"vector_db_id": store, "chunks": chunks(["a"])})
        assert "EMBEDDING_DIMENSION is 9, but EMBEDDING_URL gave 8 numbers" in answer.text


async def test_a_refused_key_is_not_the_clients(settings: Settings, embedder: FakeModelServer) -> None:
    embedder.refuse = True
    async with web(settings) as (client, _):
        store = (await client.post("/v1/vector_stores", json={"name": "s"})).json()["id"]
        answer = await client.post("/v1/vector-io/insert", json={"vector_db_id": store, "chunks": chunks(["a"])})
        assert answer.status_code == 502
        assert "EMBEDDING_URL refused EMBEDDING_API_KEY" in answer.text
