"""Whose it is: API keys name the principal, and what a principal made does not exist for others, on every route.

One web process and one worker with keys of alice and bob, and an installation of their own around them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from celery import Celery
from llama_stack_client import AuthenticationError, LlamaStackClient

from app.identity.keys import entry, make_key
from app.local.server import free_port
from app.local.valkey import Valkey
from app.settings import Settings, sqlalchemy_url
from app.stack.config import build_run_config
from app.stack.mounted import routes
from app.stack.vector_dbs import ROUTES as VECTOR_DBS
from app.store import Store, session_files
from tests.support import ROOT, wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL, Process, web_process, worker_node
from tests.support.scripted_model import DIMENSIONS

ALICE, ALICES_NEXT, BOB = make_key(), make_key(), make_key()
ORIGIN = "https://page.example"
CLIENT_TOOL = {
    "name": "ask_user",
    "description": "Asks",
    "input_schema": {"type": "object", "properties": {}},
}


@dataclass(frozen=True)
class House:
    """A running installation, and where its processes log."""

    url: str
    env: dict[str, str]
    logs: tuple[Path, ...]

    def client(self, key: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def keyless_environment(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    with Valkey(tmp_path_factory.mktemp("valkey-identity")) as valkey:
        database = migrated_database("caravan_identity")
        yield {**environment, "DATABASE_URL": database, "REDIS_URL": valkey.url, "LOG_LEVEL": "DEBUG"}


@pytest.fixture(scope="module")
def house(keyless_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    logs = tmp_path_factory.mktemp("identity")
    keys = [entry("alice", ALICE), entry("bob", BOB), entry("alice", ALICES_NEXT)]
    env = {**keyless_environment, "API_KEYS": ", ".join(keys), "CORS_ORIGINS": ORIGIN}
    url, web = web_process(env, logs / "web.log")
    web.start()
    worker = worker_node(TURN_POOL, env, logs / "worker.log", Celery(broker=env["REDIS_URL"]), name="identity")
    try:
        web.wait_ready()
        assert worker.ready()
        yield House(url, env, (logs / "web.log", logs / "worker.log"))
    finally:
        worker.teardown()
        web.stop()


@pytest.fixture
def alice(house: House) -> Iterator[httpx.Client]:
    with house.client(ALICE) as client:
        yield client


@pytest.fixture
def bob(house: House) -> Iterator[httpx.Client]:
    with house.client(BOB) as client:
        yield client


def ok(answer: httpx.Response) -> Any:
    assert answer.status_code < 300, f"{answer.request.method} {answer.request.url}: {answer.text}"
    return answer.json() if answer.content else None


def new_agent(client: httpx.Client, **config: Any) -> str:
    """Gives the path of a session of a new agent."""
    fields = {"model": "scripted", "instructions": "You are helpful", **config}
    agent_id = ok(client.post("/v1/agents", json={"agent_config": fields}))["agent_id"]
    session = ok(client.post(f"/v1/agents/{agent_id}/session", json={"session_name": "s"}))["session_id"]
    return f"/v1/agents/{agent_id}/session/{session}"


def run(client: httpx.Client, session: str, text: str, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **more}
    return client.post(f"{session}/turn", json=body)


# --- keys -------------------------------------------------------------------------------------------------------------

PATHS = ["/v1/agents", "/v1alpha/agents", "/v1/models", "/v1/responses", "/docs", "/openapi.json", "/v1/version", "/no"]


@pytest.mark.parametrize("path", PATHS)
def test_a_missing_or_wrong_key_is_refused_everywhere(house: House, path: str) -> None:
    wrong = [{"Authorization": text} for text in ("", "Bearer", "Bearer wrong", f"Bearer {ALICE}x", ALICE)]
    with house.client(None) as client:
        for headers in [{}, *wrong, {"Authorization": f"Basic {ALICE}"}, {"X-Api-Key": ALICE}]:
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            openai = path in ("/v1/models", "/v1/responses")
            assert set(answer.json()) == ({"detail", "error"} if openai else {"detail"})
            assert not openai or answer.json()["error"]["code"] == "invalid_api_key"
            assert "key" in answer.json()["detail"].lower()


def test_the_hash_of_a_key_is_no_key(house: House) -> None:
    with house.client(hashlib.sha256(ALICE.encode()).hexdigest()) as client:
        assert client.get("/v1/agents").status_code == 401


def test_health_needs_no_key(house: House) -> None:
    with house.client(None) as client:
        assert ok(client.get("/v1/health")) == {"status": "OK"}


def test_the_sdk_sends_its_key_and_sees_a_refusal_as_such(house: House) -> None:
    with LlamaStackClient(base_url=house.url, api_key=ALICE, max_retries=0) as sdk:
        assert sdk.models.list()
    with (
        LlamaStackClient(base_url=house.url, api_key="wrong", max_retries=0) as sdk,
        pytest.raises(AuthenticationError, match="not known"),
    ):
        sdk.models.list()


def test_a_principal_may_have_several_keys(house: House, alice: httpx.Client) -> None:
    """Rotation: what was made with the old key is there with the new one."""
    session = new_agent(alice)
    with house.client(ALICES_NEXT) as again:
        assert ok(again.get(session))["session_id"] == session.rpartition("/")[2]


def test_a_browsers_preflight_needs_no_key_and_it_may_read_a_refusal(house: House) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with house.client(None) as client:
        preflight = client.options("/v1/agents", headers=asked)
        assert preflight.status_code == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        refused = client.get("/v1/agents", headers={"Origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN


def test_no_key_is_ever_logged(house: House, alice: httpx.Client, bob: httpx.Client) -> None:
    """Right or wrong, at the level DEBUG, by web or worker."""
    wrong = make_key()
    with house.client(wrong) as client:
        assert client.get("/v1/agents").status_code == 401
        assert client.post("/v1/responses", json={"model": "scripted", "input": "SAY hi"}).status_code == 401
    ok(run(alice, new_agent(alice), "SAY hi"))
    ok(alice.post("/v1/responses", json={"model": "scripted", "input": "SAY hi"}))
    assert bob.get(f"/v1/agents/{uuid.uuid4()}").status_code == 404
    logged = "".join(log.read_text(errors="replace") for log in house.logs)
    assert "GET /v1/agents HTTP/1.1" in logged
    for key in (ALICE, BOB, wrong):
        assert key not in logged
        assert key.removeprefix("caravan_") not in logged


# --- without keys -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyless(keyless_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a web process without keys that listens on every address."""
    port = free_port()
    command = ["uvicorn", "app:main", "--host", "0.0.0.0", "--port", str(port)]
    env = {**keyless_environment, "FORWARDED_ALLOW_IPS": "*"}
    log = tmp_path_factory.mktemp("keyless") / "web.log"
    with Process("keyless", command, env, log, "Uvicorn running on"):
        yield port


def beyond_loopback() -> list[str]:
    """Addresses of this machine from which a request does not count as local."""
    addresses = [address for each in psutil.net_if_addrs().values() for address in each]
    return [each.address for each in addresses if each.family.name == "AF_INET" and each.address[:4] != "127."]


def refused_as_beyond(answer: httpx.Response) -> bool:
    told = answer.json()["detail"] if answer.status_code == 401 else ""
    return "API_KEYS" in told and "caravan keys" in told and answer.headers["www-authenticate"] == "Bearer"


def test_without_keys_this_machine_is_served_as_one_principal(keyless: int) -> None:
    for host in ("127.0.0.1", "localhost"):
        with httpx.Client(base_url=f"http://{host}:{keyless}", timeout=60) as client:
            assert client.get(new_agent(client)).status_code == 200
            assert client.get("/docs").status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For: 203.0.113.7", "X-Forwarded-For: 127.0.0.1", "Forwarded: for=a"])
def test_without_keys_what_a_proxy_passes_on_is_refused(keyless: int, header: str) -> None:
    """Even if it claims to come from here: uvicorn was told to believe every such claim."""
    name, _, value = header.partition(": ")
    answer = httpx.get(f"http://127.0.0.1:{keyless}/v1/agents", headers={name: value}, timeout=60)
    assert refused_as_beyond(answer)


def test_without_keys_requests_from_beyond_the_loopback_are_refused(keyless: int) -> None:
    for address in beyond_loopback():
        url = f"http://{address}:{keyless}"
        assert refused_as_beyond(httpx.get(f"{url}/v1/agents", timeout=60))
        assert refused_as_beyond(httpx.get(f"{url}/v1/agents", headers={"Host": "localhost"}, timeout=60))
        assert refused_as_beyond(
            httpx.get(f"{url}/v1/agents", headers={"Authorization": f"Bearer {ALICE}"}, timeout=60)
        )
        assert httpx.get(f"{url}/v1/health", timeout=60).status_code == 200


def test_without_keys_a_name_of_somewhere_else_is_refused(keyless: int) -> None:
    """DNS rebinding: a page's own name is made to lead here, so that the browser lets the page read the answers."""
    for host in ("page.example", f"page.example:{keyless}", "127.0.0.1.page.example"):
        assert refused_as_beyond(httpx.get(f"http://127.0.0.1:{keyless}/v1/agents", headers={"Host": host}, timeout=60))


def test_without_keys_a_unix_socket_is_served(
    keyless_environment: dict[str, str], tmp_path: Path, open_path: Path
) -> None:
    socket = open_path / "web.sock"
    command = ["uvicorn", "app:main", "--uds", str(socket)]
    with Process("web", command, keyless_environment, tmp_path / "web.log", "Uvicorn running on"):
        wait_until(socket.exists)
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://anything", timeout=60
        ) as client:
            assert client.get("/v1/agents").status_code == 200


def test_a_wrong_entry_is_one_line_without_its_text(keyless_environment: dict[str, str]) -> None:
    env = {**os.environ, **keyless_environment, "API_KEYS": f"{entry('alice', ALICE)},bob:{BOB}"}
    command = [sys.executable, "-m", "uvicorn", "app:main", "--port", str(free_port())]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"caravan: API_KEYS must be name:sha256 .*; entry 2 is none\n", done.stderr)


# --- the command line -------------------------------------------------------------------------------------------------


def caravan(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "CARAVAN_API_KEY"} | env
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_key_that_the_command_makes_is_accepted() -> None:
    """Each has 256 bits of its own, and the entry names whom it was made for."""
    made = [caravan({}, "keys", "carol@example.org").stdout for _ in range(2)]
    found = [re.fullmatch(r"key    (caravan_[\w-]{43})\nentry  (carol@example\.org:[0-9a-f]{64})\n", it) for it in made]
    assert found[0]
    assert found[1]
    assert found[0][1] != found[1][1]
    assert found[0][2] == entry("carol@example.org", found[0][1])
    Settings(_env_file=None, database_url="postgresql://x/y", api_keys=f"{found[0][2]},{found[1][2]}")


def test_commands_send_the_key_of_the_environment(house: House) -> None:
    env = {**house.env, "CARAVAN_URL": house.url}
    said = caravan({**env, "CARAVAN_API_KEY": ALICE}, "chat", "SAY hello alice")
    assert said.stdout.strip() == "hello alice"
    turn_id = caravan(env, "turns", "list", "--limit", "1").stdout.splitlines()[1].split()[0]
    followed = caravan({**env, "CARAVAN_API_KEY": ALICE}, "turns", "follow", turn_id)
    assert followed.stdout.strip() == "hello alice"
    for command in (["chat", "SAY hello"], ["turns", "follow", turn_id]):
        refused = caravan(env, *command)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert "CARAVAN_API_KEY" in refused.stderr
    assert "CARAVAN_API_KEY" in caravan(env, "turns", "follow", "--help").stdout


# --- every route ------------------------------------------------------------------------------------------------------


@dataclass
class Belongings:
    """What alice has: an id for each name of a path parameter, by the route's prefix where the name means several."""

    agent_id: str
    session_id: str
    turn_id: str
    step_id: str
    response_id: str
    conversation_id: str
    item_id: str
    prompt_id: str
    toolgroup_id: str
    tool_name: str
    shield_id: str
    vector_store_id: str
    file_id: str
    batch_id: str
    attachment_name: str
    awaiting: str = field(default="")

    def ids(self) -> dict[str, str]:
        """Of shields' routes the parameter is called `identifier`; a vector store is a vector database, too."""
        return {**vars(self), "identifier": self.shield_id, "vector_db_id": self.vector_store_id}


@pytest.fixture(scope="module")
def mcp() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


@pytest.fixture(scope="module")
def embedding(house: House) -> str:
    with house.client(ALICE) as alice:
        new = {"model_id": "embed", "model_type": "embedding", "provider_id": "model-server"}
        ok(alice.post("/v1/models", json={**new, "metadata": {"embedding_dimension": DIMENSIONS}}))
    return "embed"


def new_toolgroup(client: httpx.Client, server: McpServer) -> str:
    group = f"mcp::{uuid.uuid4().hex[:8]}"
    body = {"toolgroup_id": group, "provider_id": "model-context-protocol", "mcp_endpoint": {"uri": server.url}}
    ok(client.post("/v1/toolgroups", json=body))
    return group


def new_store(client: httpx.Client, embedding: str, text: str) -> str:
    body = {"name": "s", "embedding_model": embedding, "embedding_dimension": DIMENSIONS}
    store = str(ok(client.post("/v1/vector_stores", json=body))["id"])
    chunk = {"content": text, "metadata": {"document_id": "d"}, "chunk_metadata": {"chunk_id": "c", "document_id": "d"}}
    ok(client.post("/v1/vector-io/insert", json={"vector_db_id": store, "chunks": [chunk]}))
    return store


def new_file(client: httpx.Client) -> str:
    sent = {"file": ("a.txt", b"camels drink water")}
    return str(ok(client.post("/v1/files", files=sent, data={"purpose": "assistants"}))["id"])


def leave_file(house: House, session_id: str, name: str) -> None:
    """As the code of the session's first turn would."""
    store = Store(sqlalchemy_url(house.env["DATABASE_URL"]), pool_size=1, name="tests")
    store.transact(session_files.leave, session_id, 1, {name: b"hers"})
    store.close()


@pytest.fixture(scope="module")
def belongings(house: House, mcp: McpServer, embedding: str) -> Belongings:
    with house.client(ALICE) as alice:
        session = new_agent(alice, client_tools=[CLIENT_TOOL])
        turn = ok(run(alice, session, "CALL ask_user {}"))
        store = new_store(alice, embedding, "camels")
        file_id = new_file(alice)
        ok(alice.post(f"/v1/vector_stores/{store}/files", json={"file_id": file_id}))
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        conversation = ok(alice.post("/v1/conversations", json={"items": []}))["id"]
        items = ok(alice.post(f"/v1/conversations/{conversation}/items", json={"items": [item]}))["data"]
        group = new_toolgroup(alice, mcp)
        ok(alice.get("/v1/tools", params={"toolgroup_id": group}))
        leave_file(house, session.split("/")[5], "alices.txt")
        shield = {"shield_id": "guard", "provider_id": "llama-guard", "provider_shield_id": "scripted"}
        batches = f"/v1/vector_stores/{store}/file_batches"
        batch_id = ok(alice.post(batches, json={"file_ids": [file_id]}))["id"]
        wait_until(lambda: ok(alice.get(f"{batches}/{batch_id}"))["status"] != "in_progress")
        return Belongings(
            agent_id=session.split("/")[3],
            session_id=session.split("/")[5],
            turn_id=turn["turn_id"],
            step_id=turn["steps"][0]["step_id"],
            response_id=ok(alice.post("/v1/responses", json={"model": "scripted", "input": "SAY hi"}))["id"],
            conversation_id=conversation,
            item_id=items[0]["id"],
            prompt_id=ok(alice.post("/v1/prompts", json={"prompt": "Say hi"}))["prompt_id"],
            toolgroup_id=group,
            tool_name="count",
            shield_id=ok(alice.post("/v1/shields", json=shield))["identifier"],
            vector_store_id=store,
            file_id=file_id,
            batch_id=batch_id,
            attachment_name="alices.txt",
        )


# What a request needs besides the ids in its path, so that it fails for nothing else.
BODIES: dict[str, dict[str, Any]] = {
    "POST /agents/{agent_id}/session": {"session_name": "mine"},
    "POST /agents/{agent_id}/session/{session_id}/turn": {"messages": [{"role": "user", "content": "SAY hi"}]},
    "POST /agents/{agent_id}/session/{session_id}/turn/{turn_id}/resume": {
        "tool_responses": [{"call_id": "x", "tool_name": "ask_user", "content": "yes"}]
    },
    "POST /v1/conversations/{conversation_id}": {"metadata": {"mine": "now"}},
    "POST /v1/conversations/{conversation_id}/items": {
        "items": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "mine"}]}]
    },
    "POST /v1/prompts/{prompt_id}": {"prompt": "mine", "version": 1},
    "POST /v1/prompts/{prompt_id}/set-default-version": {"version": 1},
    "POST /v1/vector_stores/{vector_store_id}": {"name": "mine"},
    "POST /v1/vector_stores/{vector_store_id}/search": {"query": "camels"},
    "POST /v1/vector_stores/{vector_store_id}/files": {"file_id": "file-x"},
    "POST /v1/vector_stores/{vector_store_id}/files/{file_id}": {"attributes": {"mine": "now"}},
    "POST /v1/vector_stores/{vector_store_id}/file_batches": {"file_ids": ["file-x"]},
}

NOT_OURS = {
    # The model server's names, for everyone; who registered one may remove it (its own test below).
    "GET /v1/models/{model_id}",
    "GET /v1/models/{model_id:path}",
    "DELETE /v1/models/{model_id:path}",
    # Of the configuration.
    "GET /v1/providers/{provider_id}",
    # Nothing is stored of completions: 501 for every id.
    "GET /v1/chat/completions/{completion_id}",
}


def our_routes(client: httpx.Client) -> list[tuple[str, str]]:
    """(method, path), of the agents routes under both prefixes."""
    described = ok(client.get("/openapi.json"))["paths"]
    found = [(method.upper(), path) for path, methods in described.items() for method in methods]
    return found + [(method, path.replace("/v1alpha/", "/v1/", 1)) for method, path in found]


def mounted_routes() -> list[tuple[str, str]]:
    settings = Settings(_env_file=None, database_url="postgresql://x/y", inference_model="scripted")
    found = [(method, path) for method, path, _, _ in routes(build_run_config(settings, vectors=True), {})]
    return [(method.upper(), path) for method, path in [*found, *((method, path) for method, path, _ in VECTOR_DBS)]]


def plain(path: str) -> str:
    """As the tables above write it."""
    path = path.replace("/v1/openai/v1/", "/v1/", 1)
    return re.sub(r"^/v1(alpha)?(?=/agents)", "", path)


def filled(path: str, ids: dict[str, str]) -> str:
    return re.sub(r"{(\w+)(:path)?}", lambda found: ids[found[1]], path)


def send(client: httpx.Client, method: str, path: str, ids: dict[str, str]) -> tuple[int, str]:
    """The status, and the body with no id in it. A stream is not read."""
    body = BODIES.get(f"{method} {plain(path)}", {}) if method in ("POST", "PUT", "PATCH") else None
    with client.stream(method, filled(path, ids), json=body) as answer:
        text = "" if "event-stream" in answer.headers.get("content-type", "") else answer.read().decode()
    for name in sorted(ids.values(), key=len, reverse=True):
        text = text.replace(name, "…") if name else text
    return answer.status_code, text


def with_ids(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(method, path) for method, path in found if "{" in path and f"{method} {plain(path)}" not in NOT_OURS]


def test_every_route_denies_that_there_is_anything_of_anothers(
    alice: httpx.Client, bob: httpx.Client, belongings: Belongings
) -> None:
    """Bob gets, word for word, what he gets for ids that do not exist, and nothing of alice's changes by his trying."""
    ids = belongings.ids()
    nothing = {name: re.sub(r"[0-9a-f]", "0", value) if "-" in value else f"{value}-no" for name, value in ids.items()}
    everything = with_ids(our_routes(alice) + mounted_routes())
    assert len(everything) > 60
    readable = [path for method, path in everything if method == "GET"]
    before = {path: send(alice, "GET", path, ids) for path in readable}
    assert {path: status for path, (status, _) in before.items() if status != 200} == {}

    wrong = {}
    for method, path in everything:
        denied, missing = send(bob, method, path, ids), send(bob, method, path, nothing)
        if denied != missing or denied[0] != 404:
            wrong[f"{method} {path}"] = (denied, missing)
    assert wrong == {}

    after = {path: send(alice, "GET", path, ids) for path in readable}
    assert after == before


def test_every_list_shows_only_ones_own(alice: httpx.Client, bob: httpx.Client, belongings: Belongings) -> None:
    own_agent = new_agent(bob).split("/")[3]
    lists = {path for method, path in our_routes(alice) + mounted_routes() if method == "GET" and "{" not in path}
    shared = {"/v1/health", "/v1/version", "/v1/models", "/v1/openai/v1/models", "/v1/providers", "/v1/inspect/routes"}
    stored = {path for path in lists - shared if "completions" not in path}  # completions: 501, nothing is stored
    shown = {path: json.dumps(ok(bob.get(path))) for path in stored}
    ids = [value for name, value in belongings.ids().items() if value and name not in ("tool_name", "attachment_name")]
    assert {(path, name) for path, text in shown.items() for name in ids if name in text} == set()
    assert own_agent in shown["/v1/agents"]
    for path in stored:
        assert any(name in alice.get(path).text for name in ids), path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/vector-io/query", {"vector_db_id": "{vector_store_id}", "query": "camels"}),
        ("/v1/vector-io/insert", {"vector_db_id": "{vector_store_id}", "chunks": []}),
        ("/v1/tool-runtime/rag-tool/query", {"content": "camels", "vector_store_ids": ["{vector_store_id}"]}),
        ("/v1/tool-runtime/invoke", {"tool_name": "count", "kwargs": {"key": "bob"}}),
        ("/v1/safety/run-shield", {"shield_id": "{shield_id}", "messages": [], "params": {}}),
        ("/v1/moderations", {"input": "hi", "model": "{shield_id}"}),
        ("/v1/responses", {"model": "scripted", "input": "HISTORY", "previous_response_id": "{response_id}"}),
        ("/v1/responses", {"model": "scripted", "input": "HISTORY", "conversation": "{conversation_id}"}),
    ],
)
def test_an_id_in_a_body_names_nothing_of_anothers(
    alice: httpx.Client, bob: httpx.Client, belongings: Belongings, path: str, body: dict[str, Any]
) -> None:
    """The answer is the one for an id that does not exist, and an error where alice's is none."""
    ok(bob.get("/v1/tools", params={"toolgroup_id": "builtin::rag"}))
    given = {name: value for name, value in belongings.ids().items() if value}

    def ask(client: httpx.Client, change: Callable[[str], str]) -> tuple[int, str]:
        text = json.dumps(body)
        for name, value in given.items():
            text = text.replace(f"{{{name}}}", change(value))
        answer = client.post(path, content=text, headers={"content-type": "application/json"})
        told = answer.text
        for value in sorted(given.values(), key=len, reverse=True):  # a short one may be part of a long one
            told = told.replace(change(value), "…").replace(value, "…")
        return answer.status_code, told

    def missing(value: str) -> str:
        return value[:-4] + ("0000" if value[-4:] != "0000" else "1111")

    denied = ask(bob, lambda value: value)
    assert denied[0] >= 400, denied
    if "{" in json.dumps(body).replace('{"', ""):
        assert denied == ask(bob, missing)


def test_documents_cannot_be_inserted_into_a_store_of_anothers(
    alice: httpx.Client, bob: httpx.Client, belongings: Belongings
) -> None:
    """It is 404, as for a store that does not exist."""
    ok(bob.get("/v1/tools", params={"toolgroup_id": "builtin::rag"}))
    search, query = f"/v1/vector_stores/{belongings.vector_store_id}/search", {"query": "mine", "max_num_results": 50}
    before = ok(alice.post(search, json=query))
    document = {"document_id": "x", "content": "mine", "metadata": {}}
    body = {"documents": [document], "vector_store_id": belongings.vector_store_id}
    assert bob.post("/v1/tool-runtime/rag-tool/insert", json=body).status_code == 404
    assert ok(alice.post(search, json=query)) == before
    ok(alice.post("/v1/tool-runtime/rag-tool/insert", json=body))
    assert ok(alice.post(search, json=query)) != before


def test_a_file_of_anothers_cannot_be_taken_into_a_store(
    house: House, bob: httpx.Client, belongings: Belongings, embedding: str
) -> None:
    store = new_store(bob, embedding, "dates")
    attached = bob.post(f"/v1/vector_stores/{store}/files", json={"file_id": belongings.file_id})
    assert attached.status_code >= 400 or attached.json()["status"] == "failed"
    batch = ok(bob.post(f"/v1/vector_stores/{store}/file_batches", json={"file_ids": [belongings.file_id]}))

    def ended() -> bool:
        counts = ok(bob.get(f"/v1/vector_stores/{store}/file_batches/{batch['id']}"))["file_counts"]
        return bool(counts["in_progress"] == 0)

    wait_until(ended)
    found = ok(bob.post(f"/v1/vector_stores/{store}/search", json={"query": "camels drink water"}))
    assert "camels" not in json.dumps(found["data"])


def test_an_item_of_anothers_cannot_be_taken_over_by_its_id(
    alice: httpx.Client, bob: httpx.Client, belongings: Belongings
) -> None:
    own = ok(bob.post("/v1/conversations", json={"items": []}))["id"]
    content = [{"type": "input_text", "text": "overwritten"}]
    item = {"type": "message", "role": "user", "id": belongings.item_id, "content": content}
    ok(bob.post(f"/v1/conversations/{own}/items", json={"items": [item]}))
    kept = ok(alice.get(f"/v1/conversations/{belongings.conversation_id}/items/{belongings.item_id}"))
    assert "overwritten" not in json.dumps(kept)


def test_a_cursor_names_nothing_of_anothers(bob: httpx.Client, belongings: Belongings) -> None:
    own = f"/v1/conversations/{ok(bob.post('/v1/conversations', json={}))['id']}/items"
    theirs = (("/v1/files", belongings.file_id), ("/v1/responses", belongings.response_id), (own, belongings.item_id))
    for path, after in theirs:
        denied = bob.get(path, params={"after": after})
        missing = bob.get(path, params={"after": "nothing"})
        assert (denied.status_code, denied.text.replace(after, "nothing")) == (missing.status_code, missing.text)


def test_a_streamed_response_is_its_principals(alice: httpx.Client, bob: httpx.Client) -> None:
    """The principal lasts as long as the stream, in which the response is stored."""
    streamed = alice.post("/v1/responses", json={"model": "scripted", "input": "SAY hi", "stream": True}).text
    last = json.loads([line for line in streamed.splitlines() if line.startswith("data: ")][-1].removeprefix("data: "))
    path = f"/v1/responses/{last['response']['id']}"
    assert ok(alice.get(path))["status"] == "completed"
    assert bob.get(path).status_code == 404


def test_a_header_cannot_name_the_principal(bob: httpx.Client, belongings: Belongings) -> None:
    """llama_stack takes its user from the same place as what this header brings."""
    claimed = {"__authenticated_user": {"principal": "alice", "attributes": {"principals": ["alice"]}}}
    headers = {"X-LlamaStack-Provider-Data": json.dumps(claimed)}
    for path in (f"/v1/files/{belongings.file_id}", f"/v1/toolgroups/{belongings.toolgroup_id}"):
        assert bob.get(path, headers=headers).status_code == 404


def test_what_the_configuration_names_is_everyones_to_use_and_nobodys_to_remove(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    for client in (alice, bob):
        assert ok(client.get("/v1/toolgroups/builtin::rag"))["provider_id"] == "rag-runtime"
        assert ok(client.get("/v1/models/scripted"))["identifier"] == "scripted"
        for path in ("/v1/toolgroups/builtin::rag", "/v1/models/scripted"):
            assert client.delete(path).status_code == 403


def test_models_are_everyones_and_removed_by_who_registered_them(alice: httpx.Client, bob: httpx.Client) -> None:
    ok(alice.post("/v1/models", json={"model_id": "alices", "provider_id": "model-server"}))
    asked = {"model": "alices", "messages": [{"role": "user", "content": "SAY hi"}]}
    assert ok(bob.get("/v1/models/alices"))["identifier"] == "alices"
    assert ok(bob.post("/v1/chat/completions", json=asked))["choices"][0]["message"]["content"]
    assert bob.delete("/v1/models/alices").status_code == 403
    ok(alice.delete("/v1/models/alices"))
    assert bob.get("/v1/models/alices").status_code == 404


def test_a_name_that_another_has_taken_cannot_be_registered(
    alice: httpx.Client, bob: httpx.Client, belongings: Belongings, mcp: McpServer
) -> None:
    """Names of toolgroups and shields are one space: the one thing that shows of another's."""
    body = {"toolgroup_id": belongings.toolgroup_id, "provider_id": "model-context-protocol"}
    answer = bob.post("/v1/toolgroups", json={**body, "mcp_endpoint": {"uri": "http://127.0.0.1:1/mcp"}})
    assert answer.status_code == 400
    assert ok(alice.get(f"/v1/toolgroups/{belongings.toolgroup_id}"))["mcp_endpoint"]["uri"] == mcp.url


def test_anothers_shield_shields_no_agent(alice: httpx.Client, bob: httpx.Client, belongings: Belongings) -> None:
    """It is as if it were not there."""
    config = {"model": "scripted", "instructions": "", "input_shields": [belongings.shield_id]}
    ok(alice.post("/v1/agents", json={"agent_config": config}))
    denied = bob.post("/v1/agents", json={"agent_config": config})
    config["input_shields"] = ["nothing"]
    missing = bob.post("/v1/agents", json={"agent_config": config})
    assert denied.status_code == 400
    assert denied.text.replace(belongings.shield_id, "nothing") == missing.text


# --- a turn's tools ---------------------------------------------------------------------------------------------------


def test_a_turns_tools_are_its_owners(alice: httpx.Client, bob: httpx.Client) -> None:
    """Toolgroups of two principals with tools of the same names: each turn calls its own; neither may name the other's.

    The worker has both groups' tools listed, and is the same.
    """
    with McpServer() as alices, McpServer() as bobs:
        groups = {alice: new_toolgroup(alice, alices), bob: new_toolgroup(bob, bobs)}
        sessions = {client: new_agent(client, toolgroups=[group]) for client, group in groups.items()}
        for round_ in range(2):
            for client, key in ((alice, "alice"), (bob, "bob")):
                turn = ok(run(client, sessions[client], f'CALL count {{"key":"{key}"}} | SAY done'))
                response = turn["steps"][1]["tool_responses"][0]
                assert str(round_ + 1) in json.dumps(response["content"]), response
        assert [call["arguments"]["key"] for call in alices.calls()] == ["alice", "alice"]
        assert [call["arguments"]["key"] for call in bobs.calls()] == ["bob", "bob"]

        named = run(bob, sessions[bob], 'CALL count {"key":"bob"} | SAY done', toolgroups=[groups[alice]])
        assert named.status_code == 424
        assert "not found" in named.json()["error"]["message"]
        configured = run(bob, new_agent(bob, toolgroups=[groups[alice]]), 'CALL count {"key":"bob"} | SAY done')
        assert configured.status_code == 424
        assert len(alices.calls()) == 2


def test_a_tool_that_is_invoked_by_its_name_is_ones_own(alice: httpx.Client, bob: httpx.Client) -> None:
    """Over HTTP a call names no group: llama_stack takes the one that anybody listed last."""
    with McpServer() as alices, McpServer() as bobs:
        for client, server in ((bob, bobs), (alice, alices)):
            ok(client.get("/v1/tools", params={"toolgroup_id": new_toolgroup(client, server)}))
        ok(bob.post("/v1/tool-runtime/invoke", json={"tool_name": "count", "kwargs": {"key": "bob"}}))
        assert [call["arguments"]["key"] for call in bobs.calls()] == ["bob"]
        assert alices.calls() == []


def test_a_turn_calls_the_tool_of_its_own_group(alice: httpx.Client) -> None:
    """Where one principal has two groups with tools of the same names."""
    with McpServer() as first, McpServer() as second:
        groups = [new_toolgroup(alice, server) for server in (first, second)]
        for group in groups * 2:  # the second time, the worker knows the tools of both
            ok(run(alice, new_agent(alice, toolgroups=[group]), f'CALL count {{"key":"{group}"}} | SAY done'))
        for group, server in zip(groups, (first, second), strict=True):
            assert [call["arguments"]["key"] for call in server.calls()] == [group, group]


def test_a_turn_searches_only_its_owners_vector_stores(alice: httpx.Client, bob: httpx.Client, embedding: str) -> None:
    store = new_store(alice, embedding, "the oasis is called Siwa")
    tools = [{"name": "builtin::rag/knowledge_search", "args": {"vector_db_ids": [store]}}]
    script = 'CALL knowledge_search {"query":"oasis"} | SAY done'
    found, denied = (
        json.dumps(ok(run(client, new_agent(client, toolgroups=tools), script))["steps"][1]) for client in (alice, bob)
    )
    assert "Siwa" in found
    assert "Siwa" not in denied


def test_owners_outlive_a_restart_and_reach_other_web_processes(
    house: House, belongings: Belongings, tmp_path: Path
) -> None:
    """The registry is read from Postgres by another web process, and what it registers is read here."""
    url, web = web_process(house.env, tmp_path / "web.log")
    with web, contextlib.ExitStack() as opened:
        other = House(url, house.env, ())
        alice, bob = (opened.enter_context(other.client(key)) for key in (ALICE, BOB))
        bob_here = opened.enter_context(house.client(BOB))
        for path in (f"/v1/toolgroups/{belongings.toolgroup_id}", f"/v1/vector_stores/{belongings.vector_store_id}"):
            assert alice.get(path).status_code == 200
            assert bob.get(path).status_code == 404
        with McpServer() as server:
            group = new_toolgroup(alice, server)
            with house.client(ALICE) as alice_here:
                wait_until(lambda: alice_here.get(f"/v1/toolgroups/{group}").status_code == 200)
            assert bob_here.get(f"/v1/toolgroups/{group}").status_code == 404
