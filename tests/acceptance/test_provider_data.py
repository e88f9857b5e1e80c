"""Provider data (`X-LlamaStack-Provider-Data`): keys and headers for a turn's tools reach these and nobody else, and
are gone when the turn has ended. And the tools that need them: web search, and MCP servers."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from llama_stack_client import AuthenticationError, LlamaStackClient
from openai import OpenAI
from redis import Redis
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from app.domain.events import unpack
from app.identity.secrets import HIDDEN
from app.local.valkey import Valkey
from app.settings import sqlalchemy_url
from tests.acceptance.conftest import Agent
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL, web_process, worker_process
from tests.support.scripted_model import ScriptedModel
from tests.support.search_server import SearchServer

HEADER = "X-LlamaStack-Provider-Data"
OPERATORS_KEY = "tvly-of-the-worker"
ASK: Any = {"name": "ask_user", "description": "Asks.", "input_schema": {"type": "object", "properties": {}}}
SEARCH = ["builtin::websearch"]


@dataclass(frozen=True)
class System:
    """Processes of their own, so that all that they keep can be looked through; only the worker has a key."""

    url: str
    without_sealing: str
    """A web process that has no SEALING_KEYS."""
    engine: Engine
    redis: Redis
    logs: Path

    def client(self, **provider_data: Any) -> LlamaStackClient:
        return LlamaStackClient(base_url=self.url, max_retries=0, provider_data=provider_data or None)

    def column(self, turn_id: str, name: str) -> Any:
        """None: there is no such turn."""
        with self.engine.connect() as connection:
            return connection.execute(text(f"SELECT {name} FROM turns WHERE turn_id = :id"), {"id": turn_id}).scalar()

    def run(self, statement: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def kept(self) -> str:
        """All that Postgres, Redis and the logs have, as text."""
        return "\n".join(
            [
                *self._rows(),
                *map(repr, self._values()),
                *(log.read_text(errors="replace") for log in self.logs.iterdir()),
            ]
        )

    def _rows(self) -> Iterator[str]:
        tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        with self.engine.connect() as connection:
            for table in connection.scalars(text(tables)).all():
                for row in connection.execute(text(f'SELECT * FROM "{table}"')).mappings():
                    if table == "event_segments":
                        yield str(unpack(bytes(row["events"])))
                    yield str([bytes(value) if isinstance(value, memoryview) else value for value in row.values()])

    def _values(self) -> Iterator[Any]:
        readers: dict[Any, Callable[[Any], Any]] = {
            b"string": self.redis.get,
            b"stream": self.redis.xrange,
            b"list": lambda key: self.redis.lrange(key, 0, -1),
            b"hash": self.redis.hgetall,
            b"set": self.redis.smembers,
            b"zset": lambda key: self.redis.zrange(key, 0, -1, withscores=True),
        }
        for key in self.redis.scan_iter():
            value = readers.get(self.redis.type(key), repr)(key)  # b"none": it is gone
            yield key, value
            for part in re.findall(rb"[A-Za-z0-9+/]{40,}", repr(value).encode()):
                with contextlib.suppress(binascii.Error):  # it was none
                    yield base64.b64decode(part + b"==")


@pytest.fixture(scope="module")
def search_server() -> Iterator[SearchServer]:
    with SearchServer() as server:
        yield server


@pytest.fixture
def search(search_server: SearchServer) -> SearchServer:
    search_server.reset()
    return search_server


@pytest.fixture(scope="module")
def system(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    search_server: SearchServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[System]:
    logs = tmp_path_factory.mktemp("provider-data-logs")
    with Valkey(tmp_path_factory.mktemp("provider-data-valkey")) as valkey:
        database = migrated_database("caravan_provider_data")
        env = environment | {"DATABASE_URL": database, "REDIS_URL": valkey.url, "WEB_SEARCH_URL": search_server.url}
        env |= {"LOG_LEVEL": "DEBUG"}
        url, web = web_process(env, logs / "web.log")
        other_url, other = web_process(env | {"SEALING_KEYS": ""}, logs / "other.log")
        worker = worker_process(TURN_POOL, env | {"TAVILY_SEARCH_API_KEY": OPERATORS_KEY}, logs / "worker.log")
        engine = create_engine(sqlalchemy_url(database), poolclass=NullPool)
        try:
            for process in (web, other, worker):
                process.start()
            for process in (web, other, worker):
                process.wait_ready()
            yield System(url, other_url, engine, Redis.from_url(valkey.url), logs)
        finally:
            for process in (worker, other, web):
                process.stop()


@pytest.fixture(scope="module")
def own_mcp() -> Iterator[McpServer]:
    with McpServer(token=TOKEN) as server:
        yield server


TOKEN = f"mcp-token-{uuid.uuid4().hex}"


@pytest.fixture
def mcp(own_mcp: McpServer) -> McpServer:
    """It wants TOKEN."""
    own_mcp.reset()
    return own_mcp


@pytest.fixture
def group(system: System, mcp: McpServer) -> str:
    return registered(system, mcp)


def registered(system: System, server: McpServer) -> str:
    """A toolgroup of its own for an MCP server."""
    name = f"mcp::{uuid.uuid4().hex[:8]}"
    fields: Any = {"toolgroup_id": name, "provider_id": "model-context-protocol", "mcp_endpoint": {"uri": server.url}}
    with system.client() as client:
        client.toolgroups.register(**fields)
    return name


def headers(server: McpServer, token: str = TOKEN) -> dict[str, Any]:
    return {"mcp_headers": {server.url: {"Authorization": f"Bearer {token}"}}}


def told(chunks: list[Any]) -> list[Any]:
    """The contents of the tool responses of a turn, which has completed."""
    last = chunks[-1].event.payload
    assert last.event_type == "turn_complete"
    steps = [step for step in last.turn.steps if step.step_type == "tool_execution"]
    return [step.tool_responses[0].content for step in steps]


def words(content: Any) -> str:
    return content if isinstance(content, str) else "".join(item.text for item in content)


def called(query: str) -> str:
    return f"CALL web_search {json.dumps({'query': query})}"


# --- web search ---


def test_an_agent_searches_the_web(system: System, search: SearchServer, model: ScriptedModel) -> None:
    """With the worker's key, which the web process does not have: it lists the tool all the same."""
    with system.client() as client:
        assert "builtin::websearch" in {each.identifier for each in client.toolgroups.list()}
        [tool] = client.tools.list(toolgroup_id="builtin::websearch")
        assert tool.name == "web_search"
        [found] = told(Agent(client, toolgroups=SEARCH).turn(f"{called('camels')} | SAY done"))
    assert [row["url"] for row in json.loads(found)["top_k"]] == ["https://one.example/", "https://two.example/"]
    assert [(one["query"], one["key"]) for one in search.searches()] == [("camels", OPERATORS_KEY)]
    assert "What two says about camels" in model.requests()[-1]["body"]["messages"][-1]["content"]


@pytest.fixture(scope="module")
def elsewhere(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    search_server: SearchServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, dict[str, str]]]:
    """A web process with what it shares with its workers: their provider is not that of `system`."""
    folder = tmp_path_factory.mktemp("provider-data-elsewhere")
    with Valkey(folder) as valkey:
        env = environment | {"DATABASE_URL": migrated_database("caravan_web_search"), "REDIS_URL": valkey.url}
        env |= {"WEB_SEARCH_URL": search_server.url}
        url, web = web_process(env, folder / "web.log")
        with web:
            yield url, env


@pytest.mark.parametrize("provider", ["brave", "bing"])
def test_an_agent_searches_by_another_provider(
    elsewhere: tuple[str, dict[str, str]], search: SearchServer, model: ScriptedModel, tmp_path: Path, provider: str
) -> None:
    url, env = elsewhere
    own = {"WEB_SEARCH_PROVIDER": provider, f"{provider.upper()}_SEARCH_API_KEY": OPERATORS_KEY}
    worker = worker_process(TURN_POOL, env | own, tmp_path / "worker.log")
    with worker, LlamaStackClient(base_url=url, max_retries=0) as client:
        [found] = told(Agent(client, toolgroups=SEARCH).turn(f"{called('camels')} | SAY done"))
    assert [(one["shape"], one["query"], one["key"]) for one in search.searches()] == [
        (provider, "camels", OPERATORS_KEY)
    ]
    assert "What two says about camels" in found
    assert model.requests()[-1]["body"]["messages"][-1]["content"] == found


def test_a_search_that_fails_is_told_to_the_model(system: System, search: SearchServer, model: ScriptedModel) -> None:
    """No key, a key that is refused, a server that fails: what to do about it, and the turn goes on."""
    with system.client() as client:
        client.toolgroups.register(toolgroup_id="mine::brave", provider_id="brave-search")
        keyless = Agent(client, toolgroups=["mine::brave"])
        [missing] = told(keyless.turn(f"{called('camels')} | SAY done"))
        assert "set BRAVE_SEARCH_API_KEY" in missing
        assert '{"brave_search_api_key": "…"}' in missing
        client.toolgroups.unregister("mine::brave")
        failing = Agent(client, toolgroups=SEARCH)
        for query, said in (
            ("STATUS 401", "refused the key"),
            ("STATUS 500", "status 500"),
            ("OTHER", "not understood"),
        ):
            [found] = told(failing.turn(f"{called(query)} | SAY done"))
            assert said in found
            assert model.requests()[-1]["body"]["messages"][-1]["content"] == found


def test_a_response_searches_the_web(system: System, search: SearchServer, model: ScriptedModel) -> None:
    """With the request's key, through the openai SDK."""
    with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as sdk:
        response: Any = sdk.responses.create(
            model="scripted",
            input=f"{called('camels')} | SAY done",
            tools=[{"type": "web_search"}],
            extra_headers={HEADER: json.dumps({"tavily_search_api_key": "tvly-of-the-user"})},
        )
    [item, message] = response.output
    assert (item.type, item.status, item.action.query) == ("web_search_call", "completed", "camels")
    assert message.type == "message"
    assert [(one["query"], one["key"]) for one in search.searches()] == [("camels", "tvly-of-the-user")]
    assert "What two says about camels" in model.requests()[-1]["body"]["messages"][-1]["content"]


def test_a_tool_is_called_by_hand(system: System, search: SearchServer, mcp: McpServer) -> None:
    """Outside any turn, with what the request brings, or else the worker has; a tool is known by its name alone."""
    group = registered(system, mcp)
    with system.client(tavily_search_api_key="tvly-of-the-user", **headers(mcp)) as client:
        found = client.tool_runtime.invoke_tool(tool_name="web_search", kwargs={"query": "camels"})
        assert "What two says about camels" in str(found.content)
        summed = client.tool_runtime.invoke_tool(tool_name="add", kwargs={"a": 1, "b": 2})
        assert "3" in str(summed.content)
        assert {"add", "echo_header"} <= {tool.name for tool in client.tools.list(toolgroup_id=group)}
    with system.client() as client:
        client.tool_runtime.invoke_tool(tool_name="web_search", kwargs={"query": "camels"})
        assert [one["key"] for one in search.searches()] == ["tvly-of-the-user", OPERATORS_KEY]
        with pytest.raises(AuthenticationError):
            client.tool_runtime.invoke_tool(tool_name="no_such_tool", kwargs={})
    assert httpx.get(f"{system.url}/v1/tools", params={"toolgroup_id": group}, timeout=60).status_code == 401
    call = {"tool_name": "web_search", "kwargs": {"query": "camels"}}
    given = {HEADER: json.dumps({"tavily_search_api_key": "tvly-of-the-user"})}
    refused = httpx.post(f"{system.without_sealing}/v1/tool-runtime/invoke", json=call, headers=given, timeout=60)
    assert (refused.status_code, "SEALING_KEYS" in refused.text) == (400, True)
    nothing = {HEADER: json.dumps({"tavily_search_api_key": "", "mcp_headers": {}})}
    served = httpx.post(f"{system.without_sealing}/v1/tool-runtime/invoke", json=call, headers=nothing)
    assert served.status_code == 200, served.text


# --- MCP servers ---


def test_a_turn_has_one_session_with_an_mcp_server(
    system: System, mcp: McpServer, group: str, model: ScriptedModel
) -> None:
    """For listing the tools and for all calls, at once or one after the other, with the headers of the request."""
    calls = 'CALL count {"key": "a"} & CALL count {"key": "b"}'
    with system.client(**headers(mcp)) as client:
        agent = Agent(client, toolgroups=[group])
        assert [words(each) for each in told(agent.turn(f"{calls} | {calls} | SAY done"))] == ["1", "1", "2", "2"]
        assert mcp.sessions() == 1
        assert {call["authorization"] for call in mcp.calls()} == {f"Bearer {TOKEN}"}
        agent.turn(f"{calls} | SAY done")
        assert mcp.sessions() == 2


def test_a_tool_that_is_added_is_there_for_the_next_turn(
    system: System, mcp: McpServer, group: str, model: ScriptedModel
) -> None:
    """And in the web process's list."""
    name = f"tool_{uuid.uuid4().hex[:8]}"
    with system.client(**headers(mcp)) as client:
        agent = Agent(client, toolgroups=[group])
        assert name not in agent.answer("TOOLS")
        assert name not in {tool.name for tool in client.tools.list(toolgroup_id=group)}
        mcp.add_tool(name)
        assert name in agent.answer("TOOLS")
        assert name in {tool.name for tool in client.tools.list(toolgroup_id=group)}


def test_what_an_mcp_server_gives_never_fails_a_turn(
    system: System, mcp: McpServer, group: str, model: ScriptedModel
) -> None:
    """An image is the user's, and the model is told of it; also in the next turn."""
    with system.client(**headers(mcp)) as client:
        agent = Agent(client, toolgroups=[group])
        picture, media, failed = told(
            agent.turn('CALL picture | CALL media | CALL fail {"message": "no luck"} | SAY x')
        )
        assert [item.type for item in picture] == ["text", "image"]
        assert "an image that cannot be read" in words(media)
        assert "no luck" in words(failed)
        history = json.loads(agent.answer("HISTORY"))
    [shown] = [message["content"] for message in history if "a picture" in str(message["content"])]
    assert [part["text"] for part in shown] == ["a picture", "[an image, which the user is shown and you are not]"]


def test_an_mcp_server_that_goes_away(system: System, model: ScriptedModel) -> None:
    """Before the turn: it fails, naming the toolgroup. Before a call, or in it: the model is told, and goes on."""
    with McpServer() as mcp, system.client() as client:
        agent = Agent(client, toolgroups=[registered(system, mcp)])
        with ThreadPoolExecutor(1) as posting:
            turn = posting.submit(agent.turn, 'CALL order {"key": "a", "hold": "gate"} | HOLD down | CALL look | SAY x')
            mcp.wait_held("gate")
            mcp.kill()
            model.wait_held("down")
            model.release("down")
            in_call, before_call = map(words, told(turn.result(60)))
        assert "whether the call had an effect is not known" in in_call
        assert "cannot be reached" in before_call
        error = agent.turn("SAY never")[-1].error
        assert error["code"] == "invalid_request"
        assert re.search(r"Toolgroup mcp::\w+ cannot be used: the MCP server cannot be reached", error["message"])


def test_a_missing_credential_is_told(system: System, mcp: McpServer, group: str, model: ScriptedModel) -> None:
    """Which one, and how to send it."""
    with system.client() as client:
        error = Agent(client, toolgroups=[group]).turn("SAY never")[-1].error
    assert error["code"] == "invalid_request"
    assert f"Toolgroup {group} cannot be used" in error["message"]
    assert f'status 401: send it credentials that it accepts, by {HEADER}: {{"mcp_headers"' in error["message"]


# --- provider data ---


def test_a_resume_may_bring_another_key(system: System, search: SearchServer, model: ScriptedModel) -> None:
    """Else what the turn was created with holds on."""
    script = f"CALL ask_user | {called('camels')} | SAY done"
    with system.client(tavily_search_api_key="tvly-first") as client:
        agent = Agent(client, toolgroups=SEARCH, client_tools=[ASK])
        brought: list[Any] = [{}, {"extra_headers": {HEADER: json.dumps({"tavily_search_api_key": "tvly-second"})}}]
        for more in brought:
            turn = agent.turn(script)[-1].event.payload.turn
            [call] = turn.output_message.tool_calls
            answer: Any = [{"call_id": call.call_id, "tool_name": "ask_user", "content": "go on"}]
            with LlamaStackClient(base_url=system.url, max_retries=0) as plain:
                ids: Any = {"agent_id": agent.agent_id, "session_id": agent.session_id, "tool_responses": answer}
                list(plain.alpha.agents.turn.resume(turn.turn_id, **ids, **more, stream=True))
    assert [one["key"] for one in search.searches()] == ["tvly-first", "tvly-second"]


def test_secrets_that_cannot_be_opened_fail_the_turn(system: System, model: ScriptedModel) -> None:
    """They were sealed with another key, or for another turn; an operator is told where to look."""
    with system.client(tavily_search_api_key="tvly-x") as client:
        agent = Agent(client, client_tools=[ASK])
        turn = agent.turn("CALL ask_user | SAY done")[-1].event.payload.turn
        system.run("UPDATE turns SET sealed = decode('00', 'hex') WHERE turn_id = :id", id=turn.turn_id)
        [call] = turn.output_message.tool_calls
        answer: Any = [{"call_id": call.call_id, "tool_name": "ask_user", "content": "go on"}]
        with LlamaStackClient(base_url=system.url, max_retries=0) as plain:
            ids: Any = {"agent_id": agent.agent_id, "session_id": agent.session_id, "tool_responses": answer}
            *_, last = plain.alpha.agents.turn.resume(turn.turn_id, **ids, stream=True)
    error: Any = last
    assert error.error["code"] == "internal_error"
    assert "SEALING_KEYS" in error.error["message"]


def test_another_key_does_not_make_another_request(system: System, search: SearchServer, model: ScriptedModel) -> None:
    """A token may have been renewed before a client tries again: the turn is the first one, with its key."""
    with system.client() as client, httpx.Client(base_url=system.url, timeout=60) as http:
        agent = Agent(client, toolgroups=SEARCH)
        message = {"role": "user", "content": f"{called('camels')} | SAY done"}
        tool = {"type": "mcp", "server_label": "s", "server_url": "http://127.0.0.1:1/mcp"}
        for path, body in (
            (f"{agent.path}/turn", {"messages": [message]}),
            ("/v1/responses", {"model": "scripted", "input": "SAY x", "tools": [tool], "background": True}),
        ):
            ids = set()
            key = uuid.uuid4().hex
            for secret in ("tvly-first", "tvly-second"):
                more = {"tools": [tool | {"authorization": secret}]} if "tools" in body else {}
                given = {"Idempotency-Key": key, HEADER: json.dumps({"tavily_search_api_key": secret})}
                answered = http.post(path, json=body | more, headers=given).raise_for_status()
                ids.add(answered.headers["x-turn-id"])
            assert len(ids) == 1
    assert [one["key"] for one in search.searches()] == ["tvly-first"]


def test_what_is_no_provider_data_is_refused(system: System) -> None:
    """Wherever it is read, by the name of the header; and where it cannot be sealed."""
    with system.client() as client, httpx.Client(timeout=60) as http:
        agent = Agent(client)
        turn = {"messages": [{"role": "user", "content": "SAY x"}]}
        response = {"model": "scripted", "input": "SAY x"}
        posts: list[tuple[str, dict[str, Any]]] = [(f"{agent.path}/turn", turn), ("/v1/responses", response)]
        resume: Any = (f"{agent.path}/turn/{uuid.uuid4()}/resume", {"tool_responses": []})
        invoke = ("/v1/tool-runtime/invoke", {"tool_name": "web_search", "kwargs": {}})
        for path, body in [*posts, resume, invoke]:
            for wrong in ("sekret", '["sekret"]', '{"mcp_headers": {"sekret": 1}}'):
                refused = http.post(system.url + path, json=body, headers={HEADER: wrong})
                assert (refused.status_code, HEADER in refused.text, "sekret" in refused.text) == (400, True, False)
        for path, body in posts:
            given = {HEADER: '{"tavily_search_api_key": "sekret"}'}
            refused = http.post(system.without_sealing + path, json=body, headers=given)
            assert refused.status_code == 400
            assert "SEALING_KEYS is not set" in refused.text
            none = {HEADER: '{"tavily_search_api_key": null}'}
            assert http.post(system.without_sealing + path, json=body, headers=none).status_code == 200


def _held(agent: Agent, posting: ThreadPoolExecutor, model: ScriptedModel, gate: str, then: str) -> str:
    """A turn that is running, and waits in the model; its id."""
    before = {turn["turn_id"] for turn in httpx.get(f"{agent.client.base_url}{agent.path}", timeout=60).json()["turns"]}
    posting.submit(agent.turn, f"HOLD {gate} | {then}")
    model.wait_held(gate)
    after = {turn["turn_id"] for turn in httpx.get(f"{agent.client.base_url}{agent.path}", timeout=60).json()["turns"]}
    [turn_id] = after - before
    return str(turn_id)


def _awaiting(agent: Agent) -> str:
    return str(agent.turn("CALL ask_user | SAY done")[-1].event.payload.turn.turn_id)


@pytest.mark.parametrize(
    "way", ["completed", "failed", "cancelled", "timed out", "superseded", "cancelled waiting", "waited", "deleted"]
)
def test_secrets_are_gone_when_the_turn_has_ended(system: System, model: ScriptedModel, way: str) -> None:
    """However it ends; until then they are there, sealed."""
    with system.client(tavily_search_api_key="tvly-x") as client, ThreadPoolExecutor(2) as posting:
        agent, gate = Agent(client, client_tools=[ASK]), uuid.uuid4().hex
        runs = way in ("completed", "failed", "cancelled", "timed out")
        then = "ERR 400 no" if way == "failed" else "SAY done"
        turn_id = _held(agent, posting, model, gate, then) if runs else _awaiting(agent)
        assert system.column(turn_id, "sealed")
        path = f"{system.url}{agent.path}"
        if way in ("completed", "failed"):
            model.release(gate)
        elif way.startswith("cancelled"):
            httpx.post(f"{path}/turn/{turn_id}/cancel", timeout=60).raise_for_status()
        elif way in ("timed out", "waited"):
            system.run("UPDATE turns SET deadline_at = clock_timestamp() WHERE turn_id = :id", id=turn_id)
        elif way == "superseded":
            agent.turn("SAY next")
        else:
            httpx.delete(path, timeout=60).raise_for_status()
        wait_until(lambda: system.column(turn_id, "sealed") is None)
        ended = {"completed": "completed", "failed": "failed", "timed out": "failed", "waited": "failed"}
        assert system.column(turn_id, "status") in (ended.get(way, "cancelled"), None if way == "deleted" else "")


def test_a_secret_is_kept_nowhere(
    system: System, search: SearchServer, mcp: McpServer, group: str, model: ScriptedModel
) -> None:
    """Neither in Postgres nor in Redis nor in a log, at whatever level, nor in what a client or the model is told:
    while its turn runs and after it, whether that succeeds or fails, and though servers repeat it."""
    key = f"tvly-{uuid.uuid4().hex}"
    data = {"tavily_search_api_key": key, "other_api_key": f"o-{key}", **headers(mcp)}
    queries = ("camels", "LEAK", "STATUS 401", "STATUS 500", "GARBAGE", "OTHER")
    searching = " & ".join(called(query) for query in queries)
    echoes = 'CALL echo_header {"name": "Authorization"} & CALL echo_header {"name": "Authorization", "fail": true}'
    mcp.add_tool(f"tool_{uuid.uuid4().hex[:8]}", f"Needs {TOKEN}.")
    with system.client(**data) as client, ThreadPoolExecutor(2) as posting:
        agent = Agent(client, toolgroups=[*SEARCH, group])
        turn = posting.submit(agent.turn, f"{searching} | HOLD gate | {echoes} | SAY done")
        model.wait_held("gate")
        kept = system.kept()
        assert key not in kept
        assert TOKEN not in kept
        model.release("gate")
        heard = turn.result(60)
        assert HIDDEN in str(told(heard))
        failed = agent.turn(f"{called('LEAK')} | ERR 400 no")
        assert failed[-1].error["code"] == "model_error"
        keyless = Agent(client, toolgroups=SEARCH)
        client.toolgroups.register(toolgroup_id="mine::bing", provider_id="bing-search")
        brief = uuid.uuid4().hex[:10]  # pydantic's errors would show it whole
        other = client.with_options(default_headers={HEADER: json.dumps({"a_key": brief})})
        Agent(other, toolgroups=["mine::bing"]).turn(f"{called('camels')} | SAY done")
        client.toolgroups.unregister("mine::bing")
        wrong = client.with_options(default_headers={HEADER: json.dumps({**data, **headers(mcp, f"bad-{key}")})})
        refused = Agent(wrong, toolgroups=[group]).turn("SAY never")
        assert refused[-1].error["code"] == "invalid_request"
        tool: Any = {"type": "mcp", "server_label": "s", "server_url": mcp.url, "authorization": TOKEN}
        with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as sdk:
            response: Any = sdk.responses.create(
                model="scripted",
                input=f"{searching} & {echoes} | SAY done",
                tools=[{"type": "web_search"}, tool],
                extra_headers={HEADER: json.dumps(data)},
            )
        assert HIDDEN in response.model_dump_json(warnings=False)
        client.tool_runtime.invoke_tool(tool_name="web_search", kwargs={"query": "LEAK"})
        for query in queries[2:]:
            with pytest.raises(Exception, match="Tavily"):
                client.tool_runtime.invoke_tool(tool_name="web_search", kwargs={"query": query})
    assert {one["key"] for one in search.searches()} == {key}
    kept = system.kept()
    assert keyless.agent_id in kept
    for where in (
        kept,
        str(model.requests()),
        str(heard),
        str(failed),
        str(refused),
        response.model_dump_json(warnings=False),
    ):
        assert not [secret for secret in (key, brief, TOKEN) if secret in where]
