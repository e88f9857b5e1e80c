"""Tool calls across the death of their worker: what was recorded is reused, what was in flight is made again only where
that is safe. And the bounds of one call."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

from app.local.server import free_port
from app.local.valkey import Valkey
from app.settings import sqlalchemy_url
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import PREFORK, TURN_POOL, Process, wait_for_children
from tests.support.scripted_model import ScriptedModel

KEY = "caravan/idempotencyKey"
GROUP = "mcp::shop"
CONFIGURED = "mcp::configured"
TOOL_SECONDS = 10
RESULT_BYTES = 100_000


class System:
    """A web process and a worker, on servers of their own: nobody else may claim a turn here."""

    def __init__(self, pool: tuple[str, ...], env: dict[str, str], logs: Path) -> None:
        self.env = env
        self._prefork = pool == PREFORK
        port = free_port()
        web = ["uvicorn", "app:main", "--port", str(port)]
        self._web = Process("web", web, env, logs / "web.log", "Uvicorn running on")
        custom = {"CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TurnPool"} if "custom" in pool else {}
        command = ["celery", "-A", "tasks", "worker", *pool, "-l", "info"]
        self.worker = Process("worker", command, env | custom, logs / "worker.log", "ready.")
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        self._posting = ThreadPoolExecutor(8)

    def start(self, mcp: McpServer) -> None:
        for process in (self._web, self.worker):
            process.start()
        for process in (self._web, self.worker):
            process.wait_ready()
        wait_for_children(self.worker, 2 if self._prefork else 1)
        for group in (GROUP, CONFIGURED):
            given = {"toolgroup_id": group, "provider_id": "model-context-protocol", "mcp_endpoint": {"uri": mcp.url}}
            self.http.post("/v1/toolgroups", json=given).raise_for_status()

    def stop(self) -> None:
        for process in (self.worker, self._web):
            process.stop()
        self._posting.shutdown()
        self.http.close()

    def post(self, script: str, group: str = GROUP) -> Turn:
        config = {"model": "scripted", "instructions": "", "toolgroups": [group]}
        agent = self.http.post("/v1/agents", json={"agent_config": config}).json()["agent_id"]
        session = self.http.post(f"/v1/agents/{agent}/session", json={"session_name": "s"}).json()["session_id"]
        path = f"/v1/agents/{agent}/session/{session}"
        body = {"messages": [{"role": "user", "content": script}], "stream": True}
        stream = self._posting.submit(self.http.post, f"{path}/turn", json=body)
        wait_until(lambda: self.http.get(path).json()["turns"])
        return Turn(self, f"{path}/turn/{self.http.get(path).json()['turns'][0]['turn_id']}", stream)

    def recorded(self, turn: Turn) -> int:
        """How many results the turn's ledger holds."""
        query = text("SELECT count(*) FROM tool_calls WHERE turn_id = :turn AND result::text <> 'null'")
        engine = create_engine(sqlalchemy_url(self.env["DATABASE_URL"]))
        with engine.connect() as connection:
            count: int = connection.execute(query, {"turn": turn.turn_id}).scalar_one()
        engine.dispose()
        return count


class Turn:
    """A posted turn, whose stream is open until the turn ends."""

    def __init__(self, system: System, path: str, stream: Future[httpx.Response]) -> None:
        self._http = system.http
        self.path = path
        self.turn_id = path.rpartition("/")[2]
        self._stream = stream

    def completed(self) -> list[Any]:
        """The contents of the tool responses of the turn, which has completed, for the client of its stream too."""
        lines = [line for line in self._stream.result(120).content.split(b"\n") if line.startswith(b"data: ")]
        payload = json.loads(lines[-1].removeprefix(b"data: "))["event"]["payload"]
        assert payload["event_type"] == "turn_complete"
        assert self._http.get(self.path).json() == payload["turn"]
        steps = [step for step in payload["turn"]["steps"] if step["step_type"] == "tool_execution"]
        return [_text(step["tool_responses"][0]["content"]) for step in steps]

    def status(self) -> str:
        return str(self._http.get(self.path).headers["x-turn-status"])

    def cancel(self) -> None:
        self._http.post(f"{self.path}/cancel").raise_for_status()


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(item["text"] for item in content)


@pytest.fixture(scope="module")
def own_mcp() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


@pytest.fixture
def mcp(own_mcp: McpServer) -> McpServer:
    own_mcp.reset()
    return own_mcp


@pytest.fixture(scope="module")
def own_environment(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    with Valkey(tmp_path_factory.mktemp("ledger-valkey")) as valkey:
        yield environment | {
            "DATABASE_URL": migrated_database("caravan_ledger"),
            "REDIS_URL": valkey.url,
            "TOOLS_SAFE_TO_REPEAT": f"nothing, {CONFIGURED}/order",
            "TOOL_TIMEOUT_SECONDS": str(TOOL_SECONDS),
            "TOOL_RESULT_MAX_BYTES": str(RESULT_BYTES),
        }


@pytest.fixture(scope="module", params=["turn-pool", pytest.param("prefork", marks=pytest.mark.thorough)])
def system(
    request: pytest.FixtureRequest,
    own_environment: dict[str, str],
    own_mcp: McpServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[System]:
    pool = TURN_POOL if request.param == "turn-pool" else PREFORK
    running = System(pool, own_environment, tmp_path_factory.mktemp(f"ledger-{request.param}"))
    try:
        running.start(own_mcp)
        yield running
    finally:
        running.stop()


@pytest.fixture
def gate() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Killed:
    """A turn whose worker was killed while calls of its were in flight, and which completed then."""

    turn_id: str
    responses: dict[str, Any]
    keys: dict[str, list[str]]
    """By tool: the idempotency keys of the calls that the MCP server got."""
    counts: dict[str, int]
    """By tool: how often its side effect happened."""
    requests: list[dict[str, Any]]
    """To the model."""


TOOLS = {GROUP: ("look", "count", "put", "order"), CONFIGURED: ("count", "order")}


@pytest.fixture(scope="module")
def killed(system: System, own_mcp: McpServer, scripted_model: ScriptedModel) -> dict[str, Killed]:
    """A turn of each toolgroup, in its tools when SIGKILL hit all processes of the worker; then another one came.

    The calls of `count` were recorded by then, the others in flight, behind their side effect.
    """
    own_mcp.reset()
    scripted_model.reset()
    gate, turns = uuid.uuid4().hex, {}
    for group, tools in TOOLS.items():
        keys = {tool: {"key": f"{group} {tool}"} | ({} if tool == "count" else {"hold": gate}) for tool in tools}
        calls = " & ".join(f"CALL {tool} {json.dumps(arguments)}" for tool, arguments in keys.items())
        turns[group] = system.post(f"{calls} | SAY done", group)
    own_mcp.wait_held(gate, 4)
    wait_until(lambda: all(system.recorded(turn) == 1 for turn in turns.values()))
    system.worker.kill_all()
    own_mcp.release(gate)
    system.worker.start()
    return {group: _killed(group, turn, own_mcp, scripted_model) for group, turn in turns.items()}


def _killed(group: str, turn: Turn, mcp: McpServer, model: ScriptedModel) -> Killed:
    responses = dict(zip(TOOLS[group], turn.completed(), strict=True))
    made = {tool: [one for one in mcp.calls() if one["arguments"]["key"] == f"{group} {tool}"] for tool in responses}
    return Killed(
        turn.turn_id,
        responses,
        {tool: [one["_meta"][KEY] for one in calls] for tool, calls in made.items()},
        {tool: mcp.counts().get(f"{group} {tool}", 0) for tool in responses},
        [one for one in model.requests() if f"{group} order" in one["body"]["messages"][0]["content"]],
    )


@pytest.mark.parametrize(
    ("group", "tool", "index", "effects"),
    [(GROUP, "look", 0, 0), (GROUP, "put", 2, 2), (CONFIGURED, "order", 1, 2)],
    ids=["readOnlyHint", "idempotentHint", "TOOLS_SAFE_TO_REPEAT"],
)
def test_a_call_that_is_safe_to_repeat_is_made_again(
    killed: dict[str, Killed], group: str, tool: str, index: int, effects: int
) -> None:
    """It was in flight when its worker died: it is made twice, with one key, and the turn completes with its result."""
    turn = killed[group]
    assert turn.keys[tool] == [f"{turn.turn_id}:0:{index}"] * 2
    assert turn.counts[tool] == effects
    assert turn.responses[tool] == ("0" if tool == "look" else f"{group} {tool}")


def test_a_call_that_may_have_had_an_effect_is_not_made_again(killed: dict[str, Killed]) -> None:
    """It was in flight when its worker died: the effect is there once, the model is told that the outcome is unknown,
    and the turn completes."""
    turn = killed[GROUP]
    assert (len(turn.keys["order"]), turn.counts["order"]) == (1, 1)
    assert "outcome of this tool call is unknown" in turn.responses["order"]
    assert turn.requests[-1]["body"]["messages"][-1]["content"] == turn.responses["order"]


@pytest.mark.parametrize("group", TOOLS)
def test_a_recorded_call_is_not_made_again(killed: dict[str, Killed], group: str) -> None:
    """Whether it was recorded with its step, or while one before it was in flight: its result is reused."""
    turn = killed[group]
    assert (len(turn.keys["count"]), turn.counts["count"]) == (1, 1)
    assert turn.responses["count"] == "1"


@pytest.mark.parametrize("group", TOOLS)
def test_a_finished_inference_is_not_asked_again(killed: dict[str, Killed], group: str) -> None:
    """One request before the kill and one after it, both answered in full."""
    assert [request["ended"] for request in killed[group].requests] == ["finished", "finished"]


def test_calls_of_one_turn_have_different_keys(system: System, mcp: McpServer, model: ScriptedModel) -> None:
    """Parallel ones, and the same call in a later step."""
    again = 'CALL count {"key": "a"}'
    turn = system.post(f"{again} & {again} | {again} | SAY done")
    assert len(turn.completed()) == 3
    keys = {call["_meta"][KEY] for call in mcp.calls()}
    assert keys == {f"{turn.turn_id}:{place}" for place in ("0:0", "0:1", "3:0")}


def test_cancelling_a_turn_stops_its_call(system: System, mcp: McpServer, model: ScriptedModel, gate: str) -> None:
    """The server is told, and knows the call as cancelled."""
    turn = system.post(f'CALL order {{"key": "{gate}", "hold": "{gate}"}} | SAY done')
    mcp.wait_held(gate)
    turn.cancel()
    wait_until(lambda: mcp.calls()[0]["ended"] == "cancelled")
    wait_until(lambda: turn.status() == "cancelled")


@pytest.mark.parametrize("system", ["turn-pool"], indirect=True)
def test_a_call_that_takes_too_long_is_stopped(system: System, mcp: McpServer, model: ScriptedModel, gate: str) -> None:
    """The model is told of the limit, the server that the call is cancelled."""
    asked_at = time.monotonic()
    turn = system.post(f'CALL order {{"key": "{gate}", "hold": "{gate}"}} | SAY done')
    assert turn.completed() == [f"The tool gave no result within {TOOL_SECONDS} s (TOOL_TIMEOUT_SECONDS)."]
    assert time.monotonic() - asked_at >= TOOL_SECONDS
    wait_until(lambda: mcp.calls()[0]["ended"] == "cancelled")


@pytest.mark.parametrize("system", ["turn-pool"], indirect=True)
def test_a_result_that_is_too_large_is_an_error(system: System, mcp: McpServer, model: ScriptedModel) -> None:
    """It names the limit and the setting; the turn goes on."""
    turn = system.post('CALL big {"n": 200000} | SAY done')
    [told] = turn.completed()
    assert f"more than the {RESULT_BYTES} allowed (TOOL_RESULT_MAX_BYTES)" in told
