"""llama_stack's routes behind a web application, and as a library in a worker, on real Postgres and real sockets.

The model server is a small one of this file's own: it answers as the model id asks it to.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from llama_stack.apis.inference import OpenAIChatCompletionRequestWithExtraBody
from llama_stack.providers.datatypes import Api
from sqlalchemy.engine import make_url

from app.domain.errors import CompletionError
from app.settings import Settings
from app.stack.chunks import ModelError
from app.stack.completions import CHAT
from app.stack.mounted import RegistryHook, StackApp, create_stack_app, stack_lifespan
from app.stack.postgres import Connection, libpq_parameters, open_connection
from app.store.tables import metadata
from tasks.stack import LlamaStack
from tests.support import wait_until

# --- a model server ---------------------------------------------------------------------------------------------------


class FakeModelServer:
    """OpenAI-compatible enough; remembers what it was asked, and which answers the client hung up on."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.connections = 0
        self.hung_up = asyncio.Event()
        self.drop_next = 0
        self.may_embed = asyncio.Event()
        self.may_embed.set()
        self.refuse = False
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self.answer(reader, writer):
                pass
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        self.requests.append((first.split()[1], headers, body))
        if self.drop_next:
            self.drop_next -= 1
            return False
        if first.split()[1].endswith("/embeddings"):
            await self.may_embed.wait()
            if self.refuse:
                return self.whole(writer, {"error": {"message": "who are you"}}, "401 Unauthorized")
            return self.whole(writer, self.embeddings(body))
        if body["model"] == "refuses":
            return self.whole(writer, {"error": {"message": "too many of you", "code": 429}}, "429 Too Many Requests")
        if not body.get("stream"):
            message = {"role": "assistant", "content": "Hello there"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            return self.whole(writer, {"id": "c", "created": 1, "model": "m", "choices": [choice]})
        return await self.stream(reader, writer, body["model"])

    def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(texts)]
        return {
            "object": "list",
            "model": body["model"],
            "data": data,
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }

    def whole(self, writer: asyncio.StreamWriter, answer: Any, status: str = "200 OK") -> bool:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return True

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, model: str) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for word in ("Hello", " ", "there"):
            self.send(writer, chunk({"content": word}))
        if model == "breaks":
            return False
        if model == "hangs":
            await writer.drain()
            assert await reader.read() == b""
            self.hung_up.set()
            return False
        self.send(writer, chunk({}, "stop"))
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        self.send(writer, {"id": "c", "created": 1, "model": "m", "choices": [], "usage": usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return True

    def send(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        event = b"data: " + json.dumps(data).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def vector(text: str) -> list[float]:
    """Letters counted: near each other for near texts."""
    letters = Counter(text.lower())
    return [float(letters[letter]) + 0.01 for letter in "abcdefgh"]


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[FakeModelServer]:
    fake = FakeModelServer()
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    yield fake
    listening.close()


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """A database of the test's own, since the registry is for a whole database."""
    name = f"stack_{uuid4().hex[:12]}"
    with administrator(postgres_url) as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    with administrator(postgres_url) as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


class administrator:
    def __init__(self, url: str) -> None:
        self.connection = open_connection(libpq_parameters(make_url(url)))
        self.connection.autocommit = True

    def __enter__(self) -> Any:
        return self.connection.cursor()

    def __exit__(self, *_: object) -> None:
        self.connection.close()


MODELS = ["meta/Llama-3.2", "refuses", "breaks", "hangs"]
EMBEDDING_MODELS = {"sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"}


@pytest.fixture
def settings(database_url: str, server: FakeModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return make_settings(database_url, inference_url=server.url)


def make_settings(database_url: str, **values: Any) -> Settings:
    given = {"database_url": database_url, "inference_model": MODELS, **values}
    return Settings(_env_file=None, **given)


@asynccontextmanager
async def web(
    settings: Settings, hook: RegistryHook | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, StackApp]]:
    """Our application with llama_stack's mounted behind it, on a real socket."""
    stack = create_stack_app(settings, hook)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with stack_lifespan(stack):
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/", stack)
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    serving = asyncio.create_task(running.serve())
    while not running.started:
        if serving.done():
            await serving
        await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client, stack
    running.should_exit = True
    await serving


@asynccontextmanager
async def worker(settings: Settings) -> AsyncIterator[LlamaStack]:
    stack = await LlamaStack.start(settings)
    try:
        yield stack
    finally:
        await stack.close()


def ask(model: str, **fields: Any) -> OpenAIChatCompletionRequestWithExtraBody:
    messages = [{"role": "user", "content": "hi"}]
    return OpenAIChatCompletionRequestWithExtraBody(model=model, messages=messages, **{"stream": True, **fields})


def connections(database_url: str) -> int:
    with administrator(database_url) as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        found: int = cursor.fetchone()[0]
        return found


# --- the mounted routes -----------------------------------------------------------------------------------------------


async def test_clients_see_exactly_the_configured_model_ids(settings: Settings, server: FakeModelServer) -> None:
    async with web(settings) as (client, _):
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["identifier"] for model in models if model["model_type"] == "llm"] == MODELS
        assert {model["identifier"] for model in models if model["model_type"] == "embedding"} == EMBEDDING_MODELS
        assert server.requests == []  # nothing was asked of the model server in order to start


async def test_models_that_are_no_longer_configured_are_gone_but_registered_ones_stay(settings: Settings) -> None:
    async with web(settings) as (client, _):
        new = {"model_id": "embed", "model_type": "embedding", "provider_id": "model-server"}
        answer = await client.post("/v1/models", json={**new, "metadata": {"embedding_dimension": 8}})
        assert answer.json()["identifier"] == "embed"
    async with web(settings.model_copy(update={"inference_model": ["only"]})) as (client, _):
        models = (await client.get("/v1/models")).json()["data"]
        assert {model["identifier"] for model in models} == {"embed", "only"} | EMBEDDING_MODELS


async def test_what_is_ours_is_not_served(settings: Settings) -> None:
    """Agents, responses and conversations."""
    paths = ("/v1/agents", "/v1alpha/agents", "/v1/agents/a/session/s", "/v1alpha/agents/a/sessions", "/v1/responses")
    async with web(settings) as (client, _):
        for path in (*paths, "/v1/openai/v1/responses", "/v1/conversations/conv_0"):
            assert (await client.get(path)).status_code == 404
        for path in ("/v1/agents", "/v1/responses", "/v1/conversations"):
            assert (await client.post(path, json={})).status_code == 404


@pytest.mark.parametrize("version", ["0.1.9", "0.7.5"])
async def test_no_client_is_refused_for_its_version(settings: Settings, version: str) -> None:
    async with web(settings) as (client, _):
        answer = await client.get("/v1/models", headers={"x-llamastack-client-version": version})
        assert answer.status_code == 200


async def test_its_stores_work_repeatedly_and_at_once(settings: Settings, database_url: str) -> None:
    async def keep(client: httpx.AsyncClient, number: int) -> None:
        sent = {"file": (f"{number}.txt", f"number {number}".encode())}
        made = await client.post("/v1/files", files=sent, data={"purpose": "assistants"})
        path = f"/v1/files/{made.json()['id']}"
        assert (await client.get(f"{path}/content")).text == f"number {number}"
        assert (await client.delete(path)).json()["deleted"]
        assert (await client.get(path)).status_code == 404

    async with web(settings) as (client, _):
        for number in range(2):
            await keep(client, number)
        await asyncio.gather(*(keep(client, number) for number in range(16)))
        # What the module says that the web process holds: one, and a pool.
        assert connections(database_url) <= 1 + settings.database_pool_size
    await asyncio.to_thread(wait_until, lambda: connections(database_url) == 0)
    with administrator(database_url) as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        its_tables = {name for (name,) in cursor.fetchall()}
    assert "openai_files" in its_tables
    assert not its_tables & metadata.tables.keys()  # ours, which are in the same database


async def test_nothing_is_stored_of_completions(settings: Settings, database_url: str) -> None:
    async with web(settings) as (_, stack):
        request = {"model": MODELS[0], "messages": [{"role": "user", "content": "hi"}]}
        answer = await stack.complete(CHAT, request, principal="local", headers={})
        assert isinstance(answer, bytes)
        told = json.loads(answer)
        assert (told["choices"][0]["message"]["content"], told["model"]) == ("Hello there", MODELS[0])
        with administrator(database_url) as cursor:
            cursor.execute("SELECT to_regclass('inference_store')")
            assert cursor.fetchone()[0] is None


async def test_files_are_kept(settings: Settings, tmp_path: Path) -> None:
    async with web(settings) as (client, _):
        answer = await client.post("/v1/files", files={"file": ("a.txt", b"abc")}, data={"purpose": "assistants"})
        assert answer.status_code == 200, answer.text
        assert (await client.get(f"/v1/files/{answer.json()['id']}/content")).content == b"abc"
        assert list((tmp_path / "caravan" / "files").iterdir())


async def test_starts_while_the_model_server_is_down(database_url: str) -> None:
    async with web(make_settings(database_url, inference_url="http://127.0.0.1:1/v1")) as (client, stack):
        assert (await client.get("/v1/models")).status_code == 200
        request = {"model": MODELS[0], "messages": [{"role": "user", "content": "hi"}]}
        with pytest.raises(CompletionError, match="cannot be reached") as raised:
            await stack.complete(CHAT, request, principal="local", headers={})
        assert raised.value.status == 502


async def test_starts_without_pgvector(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.stack.postgres._create_vector_extension", lambda cursor: False)
    async with web(settings) as (client, _):
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/vector_stores")).status_code == 404
    async with worker(settings) as stack:
        assert stack.vector_io is None


async def test_starts_without_the_right_to_install_pgvector(
    settings: Settings, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    role, password = f"limited_{uuid4().hex[:12]}", "p@ss/:%+w &?#"
    with administrator(database_url) as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD %s", (password,))
        cursor.execute(f"GRANT ALL ON SCHEMA public TO {role}")
    url = make_url(database_url).set(username=role, password=password).render_as_string(hide_password=False)
    try:
        async with web(make_settings(url, inference_url=settings.inference_url)) as (client, _):
            assert (await client.get("/v1/vector_stores")).status_code == 404
            sent = {"file": ("a.txt", b"abc")}
            assert (await client.post("/v1/files", files=sent, data={"purpose": "assistants"})).status_code == 200
        assert [r.name for r in caplog.records if "pgvector" in r.getMessage()] == ["app.stack.postgres"]
    finally:
        with administrator(database_url) as cursor:
            cursor.execute(f"DROP OWNED BY {role} CASCADE")
            cursor.execute(f"DROP ROLE {role}")


async def test_logging_stays_as_it_was(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    before = (list(root.handlers), list(access.handlers), access.propagate)
    with caplog.at_level(logging.DEBUG, "app"):
        async with web(settings.model_copy(update={"inference_api_key": None})) as (client, _):
            await client.get("/v1/models")
    assert (list(root.handlers), list(access.handlers), access.propagate) == before
    quiet = [record for record in caplog.records if record.name.startswith("llama_stack") and record.levelno < 30]
    assert quiet == []


async def test_hook_is_called_before_the_client_hears_of_a_change(settings: Settings) -> None:
    told: list[str] = []

    async def hook() -> None:
        await asyncio.sleep(0)
        told.append("changed")

    async with web(settings, hook) as (client, _):
        model = {"model_id": "new", "provider_id": "model-server"}
        await client.post("/v1/models", json=model)
        assert len(told) == 1
        await client.get("/v1/models")
        await client.post("/v1/models", json={"wrong": 1})
        assert len(told) == 1
        assert (await client.delete("/v1/models/new")).status_code < 300
        assert len(told) == 2


async def test_failing_hook_does_not_fail_the_request(settings: Settings) -> None:
    def hook() -> None:
        raise RuntimeError("no Redis")

    async with web(settings, hook) as (client, _):
        answer = await client.post("/v1/models", json={"model_id": "new", "provider_id": "model-server"})
        assert answer.status_code == 200


# --- what nobody owns -------------------------------------------------------------------------------------------------


def made_by(app: StackApp, principal: str | None) -> httpx.AsyncClient:
    """Requests as a principal; None: as nobody, as everything was before there were principals."""

    async def called(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, **({"principal": principal} if principal else {})}, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(called), base_url="http://web")


async def test_an_mcp_server_without_its_url_is_not_registered(settings: Settings) -> None:
    async with web(settings) as (http, _):
        asked = {"toolgroup_id": "mcp::nowhere", "provider_id": "model-context-protocol"}
        answer = await http.post("/v1/toolgroups", json=asked)
        assert (answer.status_code, "mcp_endpoint" in answer.text) == (400, True)
        assert "mcp::nowhere" not in (await http.get("/v1/toolgroups")).text
        answer = await http.post("/v1/toolgroups", json=asked | {"mcp_endpoint": {"uri": "http://127.0.0.1:1/mcp"}})
        assert answer.status_code == 200
        assert "mcp::nowhere" in (await http.get("/v1/toolgroups")).text


async def test_what_nobody_owns_is_everyones_to_use_and_the_local_ones_to_change(settings: Settings) -> None:
    app = create_stack_app(settings)
    text = {"content": "abba", "metadata": {"document_id": "d"}, "chunk_metadata": {"chunk_id": "c"}}
    async with stack_lifespan(app), made_by(app, None) as nobody, made_by(app, "alice") as alice:
        embedding = {"model_type": "embedding", "metadata": {"embedding_dimension": 8}, "provider_id": "model-server"}
        assert (await nobody.post("/v1/models", json={"model_id": "embed", **embedding})).status_code == 200
        store = {"name": "s", "embedding_model": "embed", "embedding_dimension": 8}
        store_id = (await nobody.post("/v1/vector_stores", json=store)).json()["id"]
        path = f"/v1/vector_stores/{store_id}"
        inserted = {"vector_db_id": store_id, "chunks": [text]}
        changes = [("POST", "/v1/vector-io/insert", inserted), ("POST", path, {"name": "mine"}), ("DELETE", path, None)]
        for method, changed, body in changes:
            assert (await alice.request(method, changed, json=body)).status_code == 403, changed
        async with made_by(app, "local") as local:
            for method, changed, body in changes[:2]:
                assert (await local.request(method, changed, json=body)).status_code == 200, changed
            asked = {"vector_db_id": store_id, "query": "a bee"}
            assert "abba" in (await alice.post("/v1/vector-io/query", json=asked)).text
            assert (await local.delete(path)).status_code == 200


async def test_rows_that_nobody_owns_are_the_local_ones(settings: Settings) -> None:
    """Files and prompts are never the configuration's: somebody made them, before there were keys."""
    app = create_stack_app(settings)
    async with (
        stack_lifespan(app),
        made_by(app, None) as nobody,
        made_by(app, "alice") as alice,
        made_by(app, "local") as local,
    ):
        sent = {"file": ("a.txt", b"abc")}
        paths = [
            f"/v1/files/{(await nobody.post('/v1/files', files=sent, data={'purpose': 'assistants'})).json()['id']}",
            f"/v1/prompts/{(await nobody.post('/v1/prompts', json={'prompt': 'hi'})).json()['prompt_id']}",
        ]
        for path in paths:
            assert (await alice.get(path)).status_code == 404, path
            assert (await alice.delete(path)).status_code == 404, path
            assert (await local.get(path)).status_code == 200, path
            assert (await local.delete(path)).status_code < 300, path


async def test_a_file_batch_goes_on_after_a_restart_as_who_made_it(settings: Settings, server: FakeModelServer) -> None:
    """No request is there then that says whose it is, and the file is nobody else's."""
    embedding = {"model_type": "embedding", "metadata": {"embedding_dimension": 8}, "provider_id": "model-server"}
    store = {"name": "s", "embedding_model": "embed", "embedding_dimension": 8}
    server.may_embed.clear()
    app = create_stack_app(settings)
    async with stack_lifespan(app), made_by(app, "alice") as alice:
        await alice.post("/v1/models", json={"model_id": "embed", **embedding})
        sent = {"file": ("a.txt", b"abba")}
        file_id = (await alice.post("/v1/files", files=sent, data={"purpose": "assistants"})).json()["id"]
        path = f"/v1/vector_stores/{(await alice.post('/v1/vector_stores', json=store)).json()['id']}/file_batches"
        path += f"/{(await alice.post(path, json={'file_ids': [file_id]})).json()['id']}"
        assert (await alice.get(path)).json()["status"] == "in_progress"
    server.may_embed.set()
    app = create_stack_app(settings)
    async with stack_lifespan(app), made_by(app, "alice") as alice, asyncio.timeout(60):
        while (await alice.get(path)).json()["status"] == "in_progress":  # noqa: ASYNC110 (over HTTP)
            await asyncio.sleep(0.05)
        assert (await alice.get(path)).json()["file_counts"]["completed"] == 1


# --- a worker beside it -----------------------------------------------------------------------------------------------


async def test_what_the_web_registers_is_usable_on_a_running_worker(settings: Settings, database_url: str) -> None:
    # Another process, as in production: llama_stack keeps its backends in a global, for one stack in a process.
    async with worker(settings) as stack:
        assert (await stack.models.list_models()).data
        await asyncio.to_thread(register_in_another_process, settings)
        with pytest.raises(ValueError, match="not found"):
            await stack.inference.openai_chat_completion(ask("late"))
        await stack.refresh_registry()
        chunks = [chunk async for chunk in await stack.inference.openai_chat_completion(ask("late"))]
        assert chunks[0].choices[0].delta.content == "Hello"
        assert (await stack.tool_groups.get_tool_group("mcp::late")).provider_id == "model-context-protocol"
        listed = await stack.tool_groups.list_tools("builtin::rag")
        assert "knowledge_search" in [tool.name for tool in listed.data]
        found = await stack.tool_runtime.rag_tool.query(content="abba", vector_store_ids=[late_store(database_url)])
        assert "abba" in json.dumps([item.model_dump() for item in found.content])
        # What the module says that a worker holds.
        await asyncio.to_thread(wait_until, lambda: connections(database_url) == 1)


def late_store(database_url: str) -> str:
    with administrator(database_url) as cursor:
        cursor.execute("SELECT value::json ->> 'identifier' FROM llamastack_kvstore WHERE key LIKE '%pgvector%::vs_%'")
        store: str = cursor.fetchone()[0]
        return store


REGISTER = """
import asyncio, json, sys
import httpx
from app.settings import Settings
from app.stack.mounted import create_stack_app, stack_lifespan

async def main():
    app = create_stack_app(Settings(_env_file=None, **json.loads(sys.argv[1])))
    async with stack_lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://web") as web:
        for path, body in json.loads(sys.argv[2]):
            answer = await web.post(path, json=body)
            assert answer.status_code < 300, (path, answer.text)
            if path == "/v1/vector_stores":
                text = {"content": "abba", "metadata": {}, "chunk_metadata": {"chunk_id": "c", "document_id": "d"}}
                body = {"vector_db_id": answer.json()["id"], "chunks": [text]}
                answer = await web.post("/v1/vector-io/insert", json=body)
                assert answer.status_code < 300, answer.text

asyncio.run(main())
"""


def register_in_another_process(settings: Settings) -> None:
    embedding = {"model_type": "embedding", "metadata": {"embedding_dimension": 8}, "provider_id": "model-server"}
    requests = [
        ("/v1/models", {"model_id": "late", "provider_id": "model-server"}),
        ("/v1/models", {"model_id": "embed", **embedding}),
        (
            "/v1/toolgroups",
            {
                "toolgroup_id": "mcp::late",
                "provider_id": "model-context-protocol",
                "mcp_endpoint": {"uri": "http://127.0.0.1:1/mcp"},
            },
        ),
        ("/v1/vector_stores", {"name": "late", "embedding_model": "embed", "embedding_dimension": 8}),
    ]
    start_process(REGISTER, settings, json.dumps(requests))


def start_process(program: str, settings: Settings, *arguments: str) -> None:
    values = {
        "database_url": settings.database_url.get_secret_value(),
        "inference_url": settings.inference_url,
        "inference_model": settings.inference_model,
    }
    # Four at once spend 6 s of CPU each on importing llama_stack, which took 53 s on two busy cores.
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(values), *arguments], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]


async def test_what_is_registered_while_the_registry_is_read_stays_known(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is removed stays unknown: the request that did it goes on with what it has just made."""
    async with web(settings) as (client, app):
        registry = app.impls[Api.models].dist_registry
        read = registry.kvstore.values_in_range

        async def slowly(*bounds: str) -> list[str]:
            values: list[str] = await read(*bounds)
            body = {"model_id": "new", "provider_id": "model-server"}
            assert (await client.post("/v1/models", json=body)).status_code == 200
            assert (await client.delete("/v1/models/old")).status_code in (200, 204)
            return values

        await client.post("/v1/models", json={"model_id": "old", "provider_id": "model-server"})
        monkeypatch.setattr(registry.kvstore, "values_in_range", slowly)
        await app.refresh_registry()
        known = {model["identifier"] for model in (await client.get("/v1/models")).json()["data"]}
        assert ("new" in known, "old" in known) == (True, False)


async def test_worker_goes_on_after_its_connections_were_cut(settings: Settings, database_url: str) -> None:
    async with worker(settings) as stack:
        with administrator(database_url) as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await stack.refresh_registry()
        assert {model.identifier for model in (await stack.models.list_models()).data} == {*MODELS, *EMBEDDING_MODELS}


async def test_who_waits_for_the_connection_does_not_cut_off_who_has_it(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's insertion may take longer than a look into the registry may."""
    monkeypatch.setattr("app.stack.postgres.KEY_VALUE_SECONDS", 0.2)
    connection, begun = Connection(libpq_parameters(make_url(database_url))), threading.Event()
    tries: list[str] = []

    def insert() -> None:
        with connection.cursor() as cursor:
            tries.append("one")
            begun.set()
            cursor.execute("SELECT pg_sleep(1)")

    inserting = asyncio.create_task(asyncio.to_thread(connection.limited, insert))
    await asyncio.to_thread(begun.wait)
    await asyncio.to_thread(connection.run, lambda cursor: cursor.execute("SELECT 1"))
    await inserting
    assert tries == ["one"]
    connection.close()


async def test_who_searches_the_web_can_be_changed(settings: Settings, database_url: str) -> None:
    """The toolgroup of the configuration takes its name back, also from a principal who had registered it; a worker
    that still runs with the old setting can use it."""

    async def served_by(http: httpx.AsyncClient) -> str:
        groups = (await http.get("/v1/toolgroups")).json()["data"]
        return str(next(each["provider_id"] for each in groups if each["identifier"] == "builtin::websearch"))

    async with web(settings) as (http, _):
        assert await served_by(http) == "tavily-search"
        await http.delete("/v1/toolgroups/builtin::websearch")
        mine = {"toolgroup_id": "builtin::websearch", "provider_id": "bing-search"}
        (await http.post("/v1/toolgroups", json=mine)).raise_for_status()
    async with web(make_settings(database_url, web_search_provider="brave")) as (http, _):
        assert await served_by(http) == "brave-search"
        [tool] = (await http.get("/v1/tools", params={"toolgroup_id": "builtin::websearch"})).json()["data"]
        assert tool["name"] == "web_search"
    async with worker(settings) as running:
        async with web(make_settings(database_url, web_search_provider="brave")) as (http, _):
            await running.refresh_registry()
        with pytest.raises(ValueError, match="BRAVE_SEARCH_API_KEY"):
            await running.call_tool("builtin::websearch", "web_search", {"query": "x"})


@pytest.mark.slow
async def test_processes_that_start_at_once_on_an_empty_database_do_not_trip_each_other(settings: Settings) -> None:
    await asyncio.gather(*(asyncio.to_thread(start_process, REGISTER, settings, "[]") for _ in range(4)))


# --- the model server's provider --------------------------------------------------------------------------------------


async def test_no_key_is_made_up_and_a_given_one_is_sent(settings: Settings, server: FakeModelServer) -> None:
    async with worker(settings) as stack:
        await stack.inference.openai_chat_completion(ask(MODELS[0], stream=False))
    with_key = make_settings(settings.database_url.get_secret_value(), inference_url=server.url, inference_api_key="k")
    async with worker(with_key) as stack:
        await stack.inference.openai_chat_completion(ask(MODELS[0], stream=False))
    assert [headers.get("authorization") for _, headers, _ in server.requests] == [None, "Bearer k"]


async def test_request_holds_what_was_asked_and_no_limit_of_zero(settings: Settings, server: FakeModelServer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"default": None}}}
    async with worker(settings) as stack:
        params = ask(MODELS[0], max_tokens=0, temperature=0.0, response_format=schema, top_k=4)
        async for _ in await stack.inference.openai_chat_completion(params):
            pass
    assert server.requests[0][2] == {
        "model": MODELS[0],
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "temperature": 0.0,
        "top_k": 4,
        "response_format": schema,
    }


async def test_connections_are_used_again(settings: Settings, server: FakeModelServer) -> None:
    async with worker(settings) as stack:
        for _ in range(5):
            async for _ in await stack.inference.openai_chat_completion(ask(MODELS[0])):
                pass
            await stack.inference.openai_chat_completion(ask(MODELS[0], stream=False))
    assert server.connections == 1


async def test_connection_lost_before_the_answer_is_tried_twice_more(
    settings: Settings, server: FakeModelServer
) -> None:
    async with worker(settings) as stack:
        server.drop_next = 2
        assert await stack.inference.openai_chat_completion(ask(MODELS[0]))
        server.requests.clear()
        server.drop_next = 3
        with pytest.raises(ModelError, match="broke"):
            await stack.inference.openai_chat_completion(ask(MODELS[0]))
        assert len(server.requests) == 3


async def test_answer_is_never_tried_again(settings: Settings, server: FakeModelServer) -> None:
    async with worker(settings) as stack:
        with pytest.raises(ModelError, match="too many of you") as raised:
            await stack.inference.openai_chat_completion(ask("refuses"))
        assert raised.value.status_code == 429
        stream = await stack.inference.openai_chat_completion(ask("breaks"))
        with pytest.raises(ModelError, match="broke"):
            async for _ in stream:
                pass
        assert len(server.requests) == 2


async def test_silence_ends_in_a_timeout(settings: Settings) -> None:
    async with worker(settings.model_copy(update={"model_timeout_seconds": 0.2})) as stack:
        with pytest.raises(ModelError, match="in time") as raised:
            async for _ in await stack.inference.openai_chat_completion(ask("hangs")):
                pass
        assert raised.value.status_code == 504


async def test_cancelling_the_consumer_hangs_up_on_the_model_server(
    settings: Settings, server: FakeModelServer
) -> None:
    began = asyncio.Event()

    async def consume(stack: LlamaStack) -> None:
        async for _ in await stack.inference.openai_chat_completion(ask("hangs")):
            began.set()

    async with worker(settings) as stack:
        consumer = asyncio.create_task(consume(stack))
        await began.wait()
        consumer.cancel()
        async with asyncio.timeout(60):
            await server.hung_up.wait()


async def test_closing_the_stream_hangs_up_on_the_model_server(settings: Settings, server: FakeModelServer) -> None:
    async with worker(settings) as stack:
        stream = await stack.inference.openai_chat_completion(ask("hangs"))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(60):
            await server.hung_up.wait()
