"""Postgres is killed, stopped, unreachable or cut off in mid-turn: turns wait and go on, new ones are refused whole."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg2
import pytest
from celery import Celery
from sqlalchemy.engine import make_url

from app.local.postgres import Postgres
from app.store import migrate
from tests.acceptance.conftest import Agent, AgentMaker, Caravan, queue
from tests.acceptance.test_turns import BOILING_POINT
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import PREFORK, TURN_POOL, web_process, worker_node
from tests.support.proxy import TcpProxy
from tests.support.scripted_model import ScriptedModel

OUTAGE_SECONDS = 10
BURST = 200
REFUSED_WITHIN_SECONDS = 60
"""What a client waits for its 503 at most, on a busy machine; on an idle one it is about 10 s. (One after the other
over five connections, they would take 200 s.)"""


@dataclass(frozen=True)
class Fragile(Caravan):
    """A system whose Postgres is its own, and whose processes reach it through proxies."""

    postgres: Postgres
    to_web: TcpProxy
    to_worker: TcpProxy

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(self.postgres.url)
        try:
            with connection.cursor() as cursor:
                cursor.execute(query, arguments)
                return cursor.fetchall()
        finally:
            connection.close()


@pytest.fixture(scope="module", params=["turn-pool"])
def caravan(request: pytest.FixtureRequest, environment: dict[str, str], server_directory: Path) -> Iterator[Fragile]:
    directory = server_directory / f"outage-{request.param}"
    with ExitStack() as running:
        postgres = running.enter_context(Postgres(directory, fsync=False))
        url = make_url(postgres.url)
        migrate.upgrade(url)
        proxies = [running.enter_context(TcpProxy("127.0.0.1", postgres.port)) for _ in range(2)]
        settings = []
        for proxy in proxies:
            behind = url.set(port=proxy.port).update_query_dict({"sslmode": "disable"})
            own = {
                "DATABASE_URL": behind.render_as_string(hide_password=False),
                "REDIS_URL": queue(environment, 7),
            }
            settings.append(environment | own)
        base, web = web_process(settings[0], directory / "web.log")
        worker = worker_node(
            TURN_POOL if request.param == "turn-pool" else PREFORK, settings[1], directory / "worker.log", Celery()
        )
        running.callback(worker.teardown)
        with web:
            assert worker.ready()
            yield Fragile(base, settings[0], web, worker, postgres, *proxies)


@contextmanager
def killed(caravan: Fragile) -> Iterator[None]:
    caravan.postgres.kill()
    try:
        yield
    finally:
        caravan.postgres.start()


@contextmanager
def stopped(caravan: Fragile) -> Iterator[None]:
    """SIGSTOP: the kernel goes on acknowledging, so that nothing below the application notices."""
    server = psutil.Process(caravan.postgres.pid)
    for process in [server, *server.children(recursive=True)]:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in [*server.children(recursive=True), server]:
            process.send_signal(signal.SIGCONT)


@contextmanager
def stalled(caravan: Fragile) -> Iterator[None]:
    for proxy in (caravan.to_web, caravan.to_worker):
        proxy.stall()
    try:
        yield
    finally:
        for proxy in (caravan.to_web, caravan.to_worker):
            proxy.flow()


OUTAGES = {"killed": killed, "stopped": stopped, "stalled": stalled}


@dataclass
class Following:
    """A turn that a client created and whose stream it reads, in a thread."""

    caravan: Caravan
    agent: Agent
    script: str
    ids: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    turn_id: str = ""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {"messages": [{"role": "user", "content": self.script}], "stream": True}
        url = f"{self.caravan.url}{self.agent.path}/turn"
        with httpx.stream("POST", url, json=body, timeout=120) as stream:
            self.turn_id = stream.headers["x-turn-id"]
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(line.removeprefix("id: "))
                elif line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))

    def text(self) -> str:
        return "".join(re.findall(r'"type":"text","text":"([^"]*)"', "".join(self.events)))

    def assert_went_on(self, caravan: Fragile, text: str) -> None:
        """To its end, in its first attempt; no event is missing or repeated; the replay is the same."""
        self.thread.join(120)
        assert not self.thread.is_alive(), caravan.worker.logs()
        assert '"turn_complete"' in self.events[-1]
        assert self.ids == [f"1-{n}" for n in range(1, len(self.ids) + 1)]
        assert self.text() == text, self.events
        state = caravan.rows("SELECT status, fence, failures FROM turns WHERE turn_id = %s", self.turn_id)
        assert state == [("completed", 1, 0)]
        replay = httpx.get(f"{caravan.url}{self.agent.path}/turn/{self.turn_id}/events", timeout=60).text
        assert re.findall(r"^data: (.*)$", replay, re.MULTILINE) == self.events


class Mounted:
    """The Llama Stack's own routes on Postgres: the registry, vectors (psycopg2), conversations (asyncpg)."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        model = {"model_id": "embed", "provider_id": "model-server", "model_type": "embedding"}
        http.post("/v1/models", json=model | {"metadata": {"embedding_dimension": 8}}).raise_for_status()
        store = {"name": "notes", "embedding_model": "embed", "embedding_dimension": 8}
        self.store = http.post("/v1/vector_stores", json=store).raise_for_status().json()["id"]
        self.conversation = http.post("/v1/conversations", json={}).raise_for_status().json()["id"]

    def use(self) -> set[int]:
        """The statuses of reading and writing each."""
        return {
            self.http.get("/v1/models").status_code,
            self.http.get(f"/v1/vector_stores/{self.store}").status_code,
            self.http.post(f"/v1/vector_stores/{self.store}/search", json={"query": "camels"}).status_code,
            self.http.get(f"/v1/conversations/{self.conversation}").status_code,
            self.http.post("/v1/conversations", json={}).status_code,
        }


def words(count: int) -> str:
    return "".join(f"w{n} " for n in range(count))


def post_turns(caravan: Caravan, agent: Agent, count: int) -> list[httpx.Response]:
    """Creates many turns at once."""

    async def post() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=caravan.url, timeout=120, limits=limits) as client:
            body = {"messages": [{"role": "user", "content": "SAY no"}], "stream": True}
            return list(await asyncio.gather(*(client.post(f"{agent.path}/turn", json=body) for _ in range(count))))

    return asyncio.run(post())


def turns_wait_and_go_on(
    caravan: Fragile, make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel, outage: str
) -> None:
    """One streams throughout, one is to record its end meanwhile, one waits for its model: none costs an attempt.

    New turns get 503 and Retry-After in bounded time, and do not exist afterwards. Health answers. Then everything
    works again, without a restart of anything: turns, and the mounted Llama Stack's registry, vectors, conversations.
    """
    gate = uuid.uuid4().hex
    refused = make_agent()
    stack = Mounted(http)
    scripts = ("PARTS 150 100 | SAY on", "PART here | HOLD end | SAY over", f"HOLD {gate} | SAY late")
    running = [Following(caravan, make_agent(), script) for script in scripts]
    wait_until(lambda: model.held("end") and model.held(gate) and len(running[0].ids) > 5)

    with ThreadPoolExecutor(20) as pool:  # so that all connections are open, and break in use
        assert {answer.status_code for answer in pool.map(http.get, [refused.path] * 100)} == {200}

    with OUTAGES[outage](caravan):
        began = time.monotonic()
        model.release("end")
        used = threading.Thread(target=stack.use)
        used.start()
        answers = post_turns(caravan, refused, BURST)
        assert time.monotonic() - began < REFUSED_WITHIN_SECONDS
        assert {answer.status_code for answer in answers} == {503}
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
        assert http.get("/v1/health").status_code == 200
        while time.monotonic() - began < OUTAGE_SECONDS:
            assert post_turns(caravan, refused, 1)[0].status_code == 503
        assert all(follower.thread.is_alive() for follower in running)

    wait_until(lambda: http.get(refused.path).status_code == 200)
    assert http.get(refused.path).json()["turns"] == []
    assert refused.answer("SAY yes") == "yes "
    model.release(gate)
    for follower, text in zip(running, (words(150) + "on ", "here over ", "late "), strict=True):
        follower.assert_went_on(caravan, text)
    assert [turn["output_message"]["content"] for turn in http.get(refused.path).json()["turns"]] == ["yes "]
    used.join(60)
    assert stack.use() == {200}
    assert caravan.web.running()
    assert caravan.worker.container.process.running()


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
@pytest.mark.parametrize(
    "outage", ["killed", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("stopped", "stalled"))]
)
def test_turns_wait_for_postgres_and_go_on(
    caravan: Fragile, make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel, outage: str
) -> None:
    """Killed and restarted, stopped with SIGSTOP and continued, unreachable: each for ten seconds."""
    turns_wait_and_go_on(caravan, make_agent, http, model, outage)


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
def test_a_tool_request_is_answered_after_the_outage(caravan: Fragile) -> None:
    """The web process goes on asking, and the worker goes on answering; the tool is called once."""
    with McpServer() as mcp, ThreadPoolExecutor(1) as threads:
        group = {"toolgroup_id": "mcp::outage", "provider_id": "model-context-protocol"}
        endpoint = {"mcp_endpoint": {"uri": mcp.url}}
        httpx.post(f"{caravan.url}/v1/toolgroups", json=group | endpoint, timeout=30).raise_for_status()
        call = {"tool_name": "order", "kwargs": {"key": "k", "hold": "outage"}}
        answer = threads.submit(httpx.post, f"{caravan.url}/v1/tool-runtime/invoke", json=call, timeout=120)
        mcp.wait_held("outage", timeout=60)
        with killed(caravan):
            mcp.release("outage")
            wait_until(lambda: "the answers of tools wait" in caravan.web.output(), 60)
            wait_until(lambda: "the answer of tool request" in str(caravan.worker.logs()), 60)
        assert answer.result().status_code == 200
        assert mcp.counts() == {"k": 1}
        wait_until(lambda: caravan.rows("SELECT count(*) FROM tool_requests") == [(0,)], 30)
        httpx.delete(f"{caravan.url}/v1/toolgroups/mcp::outage", timeout=30).raise_for_status()


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
def test_the_workers_connections_alone_are_cut(caravan: Fragile, make_agent: AgentMaker, model: ScriptedModel) -> None:
    """All at once, in mid-stream, again and again: the worker connects anew, and keeps its lease and its turn."""
    gates = [uuid.uuid4().hex for _ in range(3)]
    script = " | ".join(f"PARTS 20 50 | HOLD {gate}" for gate in gates)
    follower = Following(caravan, make_agent(), f"{script} | SAY end")
    for gate in gates:
        seen = len(follower.ids)
        wait_until(lambda: len(follower.ids) > seen + 5)  # noqa: B023
        caravan.to_worker.cut()
        model.release(gate)
    follower.assert_went_on(caravan, words(20) * 3 + "end ")


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
def test_the_reply_to_a_record_is_lost(caravan: Fragile, make_agent: AgentMaker, model: ScriptedModel) -> None:
    """The end of the turn was committed, and the worker cannot know: it asks again, and the end is there once."""
    gate = uuid.uuid4().hex
    follower = Following(caravan, make_agent(), f"PART a | HOLD {gate} | SAY b")
    wait_until(lambda: model.held(gate))
    caravan.to_worker.lose_reply_after(b"COMMIT", since=b"INSERT INTO journal")
    model.release(gate)
    caravan.to_worker.wait_lost()
    follower.assert_went_on(caravan, "a b ")


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
@pytest.mark.parametrize("key", ["with a key", "without a key"])
def test_the_reply_to_an_acceptance_is_lost(
    caravan: Fragile, make_agent: AgentMaker, http: httpx.Client, key: str
) -> None:
    """The web process asks until it knows: the turn was accepted, once, and its client never hears of the trouble."""
    agent = make_agent()
    headers = {"Idempotency-Key": uuid.uuid4().hex} if key == "with a key" else {}
    body = {"messages": [{"role": "user", "content": "SAY once"}], "stream": False}
    caravan.to_web.lose_reply_after(b"COMMIT", since=b"INSERT INTO turns")
    first = http.post(f"{agent.path}/turn", json=body, headers=headers, timeout=60)
    caravan.to_web.wait_lost()
    assert (first.status_code, first.json()["output_message"]["content"]) == (200, "once ")
    again = http.post(f"{agent.path}/turn", json=body, headers={**headers, "x-stainless-retry-count": "1"})
    assert again.json() == first.json()
    assert len(http.get(agent.path).json()["turns"]) == 1


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
def test_the_reply_to_a_resume_is_lost(caravan: Fragile, make_agent: AgentMaker, http: httpx.Client) -> None:
    """The same for the next leg."""
    agent = make_agent(client_tools=[BOILING_POINT])
    asked = agent.turn('CALL get_boiling_point {"liquid": "x"}')[-1].event.payload.turn
    call = asked.output_message.tool_calls[0]
    response = {"call_id": call.call_id, "tool_name": call.tool_name, "content": "7"}
    caravan.to_web.lose_reply_after(b"COMMIT", since=b"tool_responses=")
    resumed = http.post(f"{agent.path}/turn/{asked.turn_id}/resume", json={"tool_responses": [response]}, timeout=60)
    caravan.to_web.wait_lost()
    assert (resumed.status_code, resumed.json()["output_message"]["content"]) == (200, "The tool said: 7 ")


@pytest.mark.thorough
@pytest.mark.parametrize("caravan", ["prefork"], indirect=True)
def test_turns_in_prefork_children_wait_for_postgres_and_go_on(
    caravan: Fragile, make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel
) -> None:
    """Each child has connections and a lease of its own."""
    turns_wait_and_go_on(caravan, make_agent, http, model, "killed")
