"""Documents that turns search, and what is registered: through either of two web processes, for the next turn on each
of two workers, all of which run before anything is made."""

from __future__ import annotations

import json
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from llama_stack_client import LlamaStackClient
from openai import OpenAI

from tests.acceptance.conftest import queue
from tests.acceptance.fire.system import Session, System
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL
from tests.support.scripted_model import DIMENSIONS, ScriptedModel
from tests.unit.stack.test_extraction import pdf

EMBEDDER = "bag/of-words"
RAG = "builtin::rag"
BOTH = (0, 1)


class Documents(BaseHTTPRequestHandler):
    """`served`: what each path answers with, as (type, body); `asked`: the paths, in order."""

    served: dict[str, tuple[str, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind, body = self.served[self.path]
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """`host:port` of a server of documents."""
    Documents.served, Documents.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Documents) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def running(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    scripted_model: ScriptedModel,
    host: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[System]:
    """Worker `a` has the turn pool, `b` a prefork child."""
    env = {
        **environment,
        "DATABASE_URL": migrated_database("caravan_knowledge"),
        "REDIS_URL": queue(environment, 5),
        "EMBEDDING_URL": scripted_model.url,
        "EMBEDDING_MODEL": EMBEDDER,
        "EMBEDDING_DIMENSION": str(DIMENSIONS),
        "FETCH_ALLOWED": host,
    }
    system = System(env, tmp_path_factory.mktemp("knowledge"), pools={"a": TURN_POOL, "b": ("-c", "1")})
    try:
        system.start_webs(2)
        system.start_workers("a", "b")
        yield system
    finally:
        system.stop()


@pytest.fixture
def system(running: System, model: object) -> System:
    running.start_workers("a", "b")
    for name in ("a", "b"):
        running.consume(name)
    return running


@pytest.fixture
def sdk(system: System) -> Iterator[LlamaStackClient]:
    """Of the second web process: tests make through it what they use through the first, or the other way round."""
    with LlamaStackClient(base_url=system.urls[1], max_retries=0) as client:
        yield client


def call(system: System, method: str, path: str, web: int = 0, **more: Any) -> httpx.Response:
    return httpx.request(method, system.urls[web] + path, timeout=60, **more)


def database(system: System, web: int = 0, name: str | None = None) -> str:
    """Registered as programs for llama-stack 0.1 and 0.2 do, with the provider that their servers had."""
    name = name or f"db-{uuid.uuid4().hex[:8]}"
    body = {
        "vector_db_id": name,
        "embedding_model": EMBEDDER,
        "embedding_dimension": DIMENSIONS,
        "provider_id": "faiss",
    }
    call(system, "POST", "/v1/vector-dbs", web, json=body).raise_for_status()
    return name


def document(text: Any, name: str = "d", mime_type: str = "text/plain", **metadata: Any) -> Any:
    return {"document_id": name, "content": text, "mime_type": mime_type, "metadata": metadata}


def insert(system: System, db: str, *documents: Any, web: int = 0) -> httpx.Response:
    body = {"vector_db_id": db, "documents": documents, "chunk_size_in_tokens": 100}
    return call(system, "POST", "/v1/tool-runtime/rag-tool/insert", web, json=body)


def contents(system: System, db: str, query: str = "camels", web: int = 0) -> list[str]:
    body = {"vector_db_id": db, "query": query, "params": {"max_chunks": 50}}
    found = call(system, "POST", "/v1/vector-io/query", web, json=body).raise_for_status().json()["chunks"]
    return [chunk["content"] for chunk in found]


def searching(*dbs: str) -> dict[str, Any]:
    return {"toolgroups": [{"name": f"{RAG}/knowledge_search", "args": {"vector_db_ids": list(dbs)}}]}


def search(query: str = "camels drink") -> str:
    return f"CALL knowledge_search {json.dumps({'query': query})} | HISTORY"


def turn(session: Session, script: str, **more: Any) -> dict[str, Any]:
    last = session.post(script, **more).ended()[-1].payload
    assert "turn" in last, last
    return dict(last["turn"])


def failure(session: Session, script: str, **more: Any) -> tuple[str, str]:
    last = session.post(script, **more).ended()[-1].payload
    return str(last["error"]["code"]), str(last["error"]["message"])


def tool_said(done: dict[str, Any]) -> str:
    """What the model was told by the turn's tools."""
    return json.dumps([step["tool_responses"] for step in done["steps"] if step["step_type"] == "tool_execution"])


def on_each_worker(system: System) -> Iterator[str]:
    """One worker after the other, while the others take no turns."""
    for name in ("a", "b"):
        system.consume(name)
        system.stop_consuming("b" if name == "a" else "a")
        yield name


# --- shared vectors ---------------------------------------------------------------------------------------------------


def test_what_a_client_inserts_is_found_by_the_next_turn_everywhere(system: System, sdk: LlamaStackClient) -> None:
    """Registered on one web process, filled on the other, searched on each worker, changed, searched again, gone."""
    db = database(system, web=0)
    session, owners = system.session(0, **searching(db)), set()
    sdk.tool_runtime.rag_tool.insert(
        documents=[document("camels drink at wells", "one")], vector_db_id=db, chunk_size_in_tokens=100
    )
    for name in on_each_worker(system):
        done = turn(session, search())
        owners.add(session.owner(done["turn_id"]))
        assert "camels drink at wells" in tool_said(done), name
        assert "'document_id': 'one'" in tool_said(done)
        sdk.tool_runtime.rag_tool.insert(
            documents=[document(f"camels drink at oasis {name}", "two")], vector_db_id=db, chunk_size_in_tokens=100
        )
        assert f"camels drink at oasis {name}" in tool_said(turn(session, search()))
    assert len(owners) == 2
    assert "oasis a" not in tool_said(turn(session, search()))
    assert call(system, "DELETE", f"/v1/vector-dbs/{db}", web=1).status_code == 204
    for _ in on_each_worker(system):
        assert "not found" in tool_said(turn(session, search()))
    assert not system.rows("SELECT key FROM llamastack_kvstore WHERE key LIKE :name", name=f"%{db}%")


def test_a_document_inserted_again_takes_the_place_of_the_first(system: System) -> None:
    """On either web process; readers see one version and never both or none; what fails leaves the old one; the other
    documents, also one with the same text, stay."""
    db, seen, over = database(system), list[list[str]](), threading.Event()
    insert(system, db, document("camels number", "other")).raise_for_status()
    insert(system, db, document("camels number 0")).raise_for_status()

    def read(web: int) -> None:
        while not over.is_set():
            seen.append([text for text in contents(system, db, web=web) if text != "camels number"])

    with ThreadPoolExecutor(4) as threads:
        reading = [threads.submit(read, web) for web in BOTH]
        for number in range(1, 11):
            insert(system, db, document(f"camels number {number}"), web=number % 2).raise_for_status()
        both = [threads.submit(insert, system, db, document(f"camels number {10 + web}"), web=web) for web in (1, 0)]
        assert {each.result().status_code for each in both} == {200}
        over.set()
        for each in reading:
            each.result()
    assert seen
    assert {len(texts) for texts in seen} == {1}
    [last] = [text for text in contents(system, db) if text != "camels number"]
    for wrong in (
        document("camels UNEMBEDDABLE"),
        document("x", mime_type="image/png"),
        document(f"http://{system.env['DATABASE_URL'].rpartition('@')[2].partition('/')[0]}/"),
        document({"uri": "http://169.254.169.254/latest"}),
        document(""),
    ):
        assert insert(system, db, wrong).status_code in (400, 503), wrong
        assert sorted(contents(system, db)) == sorted([last, "camels number"])
    insert(system, db, document("camels number", "d")).raise_for_status()
    assert contents(system, db) == ["camels number"] * 2


def test_what_a_worker_finds_wrong_is_told_as_llama_stack_tells_it(system: System) -> None:
    body = {"vector_db_id": database(system), "documents": [document("camels")], "chunk_size_in_tokens": -1}
    told = call(system, "POST", "/v1/tool-runtime/rag-tool/insert", json=body)
    assert told.status_code == 400, told.text
    assert told.json()["detail"]["errors"][0]["loc"] == ["max_chunk_size_tokens"]


def test_many_databases_are_registered_at_once(system: System) -> None:
    """More than a web process has threads, on each of two; the same one by all: it is one."""
    names = [f"db-{uuid.uuid4().hex[:8]}" for _ in range(8)] + ["shared"] * 8
    with ThreadPoolExecutor(len(names)) as threads:
        made = list(threads.map(lambda each: database(system, each[0] % 2, each[1]), enumerate(names)))
    assert made == names
    for web in BOTH:
        listed = [each["identifier"] for each in call(system, "GET", "/v1/vector-dbs", web).json()["data"]]
        assert {name: listed.count(name) for name in names} == dict.fromkeys(names, 1)


def test_chunks_are_replaced_by_their_ids(system: System) -> None:
    """Those that clients cut themselves, many at once; what Postgres cannot hold is 400."""
    db = database(system)

    def put(web: int, *chunks: dict[str, Any]) -> int:
        body = {"vector_db_id": db, "chunks": list(chunks)}
        return call(system, "POST", "/v1/vector-io/insert", web, json=body).status_code

    many = [{"content": f"camels {n}", "chunk_id": f"c{n}", "metadata": {"document_id": "x"}} for n in range(150)]
    assert put(0, *many) == 200
    assert put(1, {"content": "camels again", "chunk_id": "c7", "metadata": {"document_id": "x"}}) == 200
    stored = system.rows("SELECT count(*) AS n FROM pg_class WHERE relname LIKE 'vs_%' AND relkind = 'r'")
    assert stored[0]["n"] >= 1
    found = contents(system, db, "camels again")
    assert (found[0], "camels 7" in found) == ("camels again", False)
    assert put(0, {"content": "x", "embedding": [1.0], "metadata": {"document_id": "x"}}) == 400
    assert put(0, {"content": "a\0b", "metadata": {"document_id": "x"}}) == 400
    insert(system, db, document("camels at last", "x")).raise_for_status()
    assert contents(system, db) == ["camels at last"]


# --- documents of turns -----------------------------------------------------------------------------------------------


def test_documents_of_a_turn_are_searched_by_it_and_by_later_ones(system: System, host: str) -> None:
    """Not read into the context; together with the agent's databases; by no other session; listed nowhere; replaced
    when they come again; whatever type they have, and wherever they are."""
    db = database(system)
    insert(system, db, document("camels drink from the database", "in-db")).raise_for_status()
    session = system.session(0, toolgroups=[{"name": RAG, "args": {"vector_store_ids": [db]}}])
    Documents.served["/page"] = ("text/html", b"<h1>camels</h1><script>poison</script><p>drink from the page")
    Documents.served["/a.pdf"] = ("application/octet-stream", pdf("camels drink from the PDF"))
    given = [
        {"content": "camels drink from the text", "mime_type": "text/plain"},
        {"content": {"uri": f"http://{host}/page"}, "mime_type": "text/html"},
        {"content": f"http://{host}/a.pdf", "mime_type": ""},
        {"content": {"uri": "data:text/csv,who%2Cdoes%0Acamels%2Cdrink"}, "mime_type": "text/csv"},
    ]
    everywhere = {"query_config": {"max_chunks": 20, "max_tokens_in_context": 4096}}
    asked = [{"name": RAG, "args": {"vector_db_ids": [db], **everywhere}}]
    stores = call(system, "GET", "/v1/vector-dbs").json()
    done = turn(session, search(), documents=given, toolgroups=asked)
    told = tool_said(done)
    assert all(f"from the {where}" in told for where in ("database", "text", "page", "PDF")), told
    assert "who,does" in told
    assert "'filename': 'a.pdf'" in told
    assert "poison" not in told
    history = json.loads(done["output_message"]["content"])
    assert history[1]["content"] == search()
    Documents.served["/page"] = ("text/html", b"<p>camels drink from the new page")
    for name in on_each_worker(system):
        told = tool_said(turn(session, search(), toolgroups=asked))
        assert "from the text" in told, name
    told = tool_said(turn(session, search(), documents=[given[1]], toolgroups=asked))
    assert "from the new page" in told
    assert told.count("from the page") == 0
    assert "from the text" not in tool_said(turn(system.session(0, **searching(db)), search(), toolgroups=asked))
    assert call(system, "GET", "/v1/vector-dbs").json() == stores
    assert Documents.asked.count("/page") == 2


def test_where_to_search_is_not_the_models_to_say(system: System) -> None:
    """Neither another session, nor a database that the agent does not name."""
    db, one = database(system), system.session(0, toolgroups=[RAG])
    insert(system, db, document("camels drink from the database")).raise_for_status()
    turn(one, search(), documents=[{"content": "camels drink from my text", "mime_type": "text/plain"}])
    other = system.session(0, toolgroups=[RAG])
    arguments = {"query": "camels", "session_id": one.url.rpartition("/")[2], "vector_db_ids": [db]}
    told = tool_said(turn(other, f"CALL knowledge_search {json.dumps(arguments)} | SAY x"))
    assert "No vector DBs were provided" in told
    assert "needs a query" in tool_said(turn(one, "CALL knowledge_search {} | SAY x"))
    assert "insert_into_memory" not in turn(other, "TOOLS")["output_message"]["content"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"content": {"uri": "http://127.0.0.1:1/x"}, "mime_type": "text/plain"}, "FETCH_ALLOWED"),
        ({"content": {"uri": "http://localhost/x"}, "mime_type": "text/plain"}, "FETCH_ALLOWED"),
        ({"content": {"uri": "data:image/png;base64,AAAA"}, "mime_type": "image/png"}, "what can be read is"),
        ({"content": "camels UNEMBEDDABLE", "mime_type": "text/plain"}, "embedded by bag/of-words.*EMBEDDING_URL"),
    ],
)
def test_a_document_that_cannot_be_searched_fails_its_turn(system: System, given: dict[str, Any], why: str) -> None:
    """The reason is told; the session goes on."""
    session = system.session(0, toolgroups=[RAG])
    code, message = failure(session, "SAY x", documents=[given])
    assert code in ("invalid_request", "model_error")
    assert httpx.get(session.url, timeout=60).status_code == 200
    assert re.search(why, message), message
    assert turn(session, "SAY on")["output_message"]["content"] == "on "


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's alone")
def test_what_cannot_be_searched_is_a_file_for_code_alone(system: System) -> None:
    """Where the turn has both: what can be read is searched, and a file as well."""
    session = system.session(0, toolgroups=[RAG, "builtin::code_interpreter"])
    given = [
        {"content": {"uri": "data:image/png;name=plot.png;base64,AAAA"}, "mime_type": "image/png"},
        {"content": {"uri": "data:test/csv;name=a.csv,a"}, "mime_type": "test/csv"},
        {"content": "camels drink from the text", "mime_type": "text/plain"},
    ]
    listing = f"CALL code_interpreter {json.dumps({'code': 'import os; sorted(os.listdir())'})}"
    told = tool_said(turn(session, f"{listing} | {search()}", documents=given))
    assert "['a.csv', 'document.txt', 'plot.png']" in told
    assert "from the text" in told


def test_a_search_that_fails_is_told_to_the_model(system: System) -> None:
    """The embeddings server's answer, with the setting to look at."""
    db = database(system)
    told = tool_said(turn(system.session(0, **searching(db)), search("UNEMBEDDABLE")))
    assert "scripted 503" in told
    assert "EMBEDDING_URL" in told


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_toolgroup_holds_for_the_next_turn_everywhere(system: System) -> None:
    """Registered by one web process, seen by the other at once, offered on each worker, removed by the other, gone."""
    with McpServer() as server:
        group = system.toolgroup(server)
        session = system.session(0, toolgroups=[group])
        assert call(system, "GET", f"/v1/toolgroups/{group}", web=1).status_code == 200
        for _ in on_each_worker(system):
            assert '"3"' in tool_said(turn(session, 'CALL add {"a": 1, "b": 2} | SAY x')).replace("\\", "")
        assert call(system, "DELETE", f"/v1/toolgroups/{group}", web=1).status_code in (200, 204)
        assert call(system, "GET", f"/v1/toolgroups/{group}", web=0).status_code == 404
        for _ in on_each_worker(system):
            code, message = failure(session, "SAY x")
            assert (code, group in message) == ("invalid_request", True)


def test_a_model_holds_for_the_next_turn_everywhere(system: System) -> None:
    """And for the next completion on another web process."""
    name = f"late-{uuid.uuid4().hex[:8]}"
    call(system, "POST", "/v1/models", json={"model_id": name, "provider_id": "model-server"}).raise_for_status()
    asked = {"model": name, "messages": [{"role": "user", "content": "SAY x"}]}
    for path in ("/v1/chat/completions", "/v1/openai/v1/chat/completions"):
        assert call(system, "POST", path, web=1, json=asked).status_code == 200
    session = system.session(1, model=name)
    for _ in on_each_worker(system):
        assert turn(session, "SAY yes")["output_message"]["content"] == "yes "
    assert call(system, "DELETE", f"/v1/models/{name}", web=1).status_code in (200, 204)
    assert name not in call(system, "GET", "/v1/models", web=0).text
    for _ in on_each_worker(system):
        code, message = failure(session, "SAY no")
        assert (code, name in message) == ("invalid_request", True)


def test_a_shield_is_seen_by_every_web_process(system: System) -> None:
    name = f"shield-{uuid.uuid4().hex[:8]}"
    body = {"shield_id": name, "provider_id": "llama-guard", "provider_shield_id": "scripted"}
    call(system, "POST", "/v1/shields", web=1, json=body).raise_for_status()
    assert call(system, "GET", f"/v1/shields/{name}", web=0).status_code == 200
    assert call(system, "DELETE", f"/v1/shields/{name}", web=0).status_code in (200, 204)
    assert call(system, "GET", f"/v1/shields/{name}", web=1).status_code == 404


# --- vector stores of OpenAI's API ------------------------------------------------------------------------------------


@pytest.fixture
def openai(system: System) -> Iterator[list[OpenAI]]:
    """One for each web process."""
    clients = [OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in system.urls]
    yield clients
    for client in clients:
        client.close()


def test_vector_stores_are_one_on_all_web_processes(system: System, openai: list[OpenAI]) -> None:
    """Made on one, filled on both at once, read on the other, searched by a response on each worker; files are taken
    out, the store deleted; an embedding model need not be named."""
    one, two = openai
    store = one.vector_stores.create(name="camels").id
    names = [f"{n}.md" for n in range(6)]
    files = [one.files.create(file=(name, b"camels drink " + name.encode()), purpose="assistants") for name in names]
    with ThreadPoolExecutor(6) as threads:
        attached = [
            threads.submit(openai[n % 2].vector_stores.files.create, vector_store_id=store, file_id=file.id)
            for n, file in enumerate(files[:4])
        ]
        assert {each.result().status for each in attached} == {"completed"}
    batch = one.vector_stores.file_batches.create(vector_store_id=store, file_ids=[file.id for file in files[4:]])
    wait_until(lambda: two.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store).status == "completed")
    assert two.vector_stores.retrieve(store).file_counts.completed == 6
    assert {file.id for file in two.vector_stores.files.list(store)} == {file.id for file in files}
    picture = two.files.create(file=("camel.png", b"\x89PNG\0"), purpose="assistants")
    refused = one.vector_stores.files.create(vector_store_id=store, file_id=picture.id)
    assert (refused.status, "image/png" in str(refused.last_error)) == ("failed", True)
    assert "image/png" in str(two.vector_stores.files.retrieve(picture.id, vector_store_id=store).last_error)
    tool: Any = {"type": "file_search", "vector_store_ids": [store]}
    for _ in on_each_worker(system):
        answer = two.responses.create(
            model="scripted", input=search("drink 3.md"), tools=[tool], include=["file_search_call.results"]
        )
        assert "camels drink 3.md" in {found.text for found in answer.output[0].results}  # type: ignore[union-attr]
    for kind, found in (("gt", set[str]()), ("ne", {file.id for file in files})):
        filters: Any = {"type": kind, "key": "filename", "value": 1}  # which is a text
        assert {each.file_id for each in two.vector_stores.search(store, query="camels", filters=filters)} == found
    two.vector_stores.files.delete(files[3].id, vector_store_id=store)
    assert "camels drink 3.md" not in {found.content[0].text for found in one.vector_stores.search(store, query="3.md")}
    assert one.vector_stores.files.content(files[0].id, vector_store_id=store)
    two.vector_stores.delete(store)
    with pytest.raises(Exception, match="not found"):
        one.vector_stores.retrieve(store)
    assert not system.rows("SELECT key FROM llamastack_kvstore WHERE key LIKE :id", id=f"%:{store}%")
    table = "vs_" + store.replace("-", "_")
    assert system.rows("SELECT to_regclass(:table) AS it", table=table) == [{"it": None}]


# --- last, since it costs a worker ------------------------------------------------------------------------------------


def test_a_worker_that_dies_costs_no_document_a_second_fetch(system: System, host: str, model: ScriptedModel) -> None:
    """The next attempt searches what the first took in."""
    Documents.served["/once"] = ("text/plain", b"camels drink once")
    gate = uuid.uuid4().hex
    session = system.session(0, toolgroups=[RAG])
    system.stop_consuming("b")
    given = [{"content": {"uri": f"http://{host}/once"}, "mime_type": "text/plain"}]
    stream = session.accepted(f"HOLD {gate} | {search()}", documents=given)
    wait_until(lambda: model.held(gate))
    system.consume("b")
    system.workers["a"].kill_all()
    stream.wait_attempt(2, PATIENCE_SECONDS)
    model.release(gate)
    done = stream.ended()[-1].payload["turn"]
    assert "camels drink once" in tool_said(done)
    assert Documents.asked.count("/once") == 1
    rows = system.rows("SELECT * FROM session_chunks WHERE session_id = :id", id=session.url.rpartition("/")[2])
    assert len(rows) == 1
