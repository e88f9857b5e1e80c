"""Everything through PgBouncer in transaction mode, over a pool much smaller than the connections that it serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import psutil
import psycopg2
import pytest
from celery import Celery
from sqlalchemy import Connection, text

from app.local.postgres import Postgres
from app.settings import sqlalchemy_url
from app.store import Store
from app.store.store import IDLE_SECONDS
from tests.acceptance.conftest import AgentMaker, Caravan, queue
from tests.acceptance.test_turns import BOILING_POINT
from tests.conftest import create_database
from tests.support import ROOT, wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL, web_process, worker_node
from tests.support.pgbouncer import PgBouncer
from tests.support.scripted_model import DIMENSIONS, ScriptedModel

POOL_SIZE = 6
TURNS = 24


@pytest.fixture(scope="module")
def pgbouncer(postgres: Postgres, server_directory: Path) -> Iterator[PgBouncer]:
    directory = server_directory / "pgbouncer"
    directory.mkdir(mode=0o755)
    with PgBouncer(directory, create_database(postgres.url, "pooled"), POOL_SIZE) as server:
        yield server


@pytest.fixture(scope="module")
def caravan(environment: dict[str, str], pgbouncer: PgBouncer, server_directory: Path) -> Iterator[Caravan]:
    """Migrated and run through PgBouncer alone, by two at once each: two web processes and a worker."""
    settings = environment | {"DATABASE_URL": pgbouncer.url, "REDIS_URL": queue(environment, 8)}
    for migrating in [command(settings, "migrate") for _ in range(2)]:
        output, _ = migrating.communicate(timeout=120)
        assert migrating.returncode == 0, output
    url, web = web_process(settings, server_directory / "pooled-web.log")
    _, other = web_process(settings, server_directory / "pooled-other.log")
    other.start()
    worker = worker_node(TURN_POOL, settings, server_directory / "pooled-worker.log", Celery())
    try:
        with web:
            other.wait_ready()
            assert worker.ready()
            yield Caravan(url, settings, web, worker)
    finally:
        worker.teardown()
        other.stop()


def command(settings: dict[str, str], name: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from app.cli import main; main()", name]
    return subprocess.Popen(
        program,
        cwd=ROOT,
        env={**os.environ, **settings, "CELERY_BROKER_URL": settings["REDIS_URL"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_many_turns_at_once_and_few_connections(
    caravan: Caravan, make_agent: AgentMaker, http: httpx.Client, postgres: Postgres
) -> None:
    """24 turns of 24 sessions complete, each with its own answer, over at most 6 connections to Postgres."""
    agent = make_agent()

    def run(number: int) -> str:
        session = http.post(f"/v1/agents/{agent.agent_id}/session", json={"session_name": str(number)}).json()
        body = {"messages": [{"role": "user", "content": f"CHUNKS 20 20 | SAY {number}"}], "stream": False}
        path = f"/v1/agents/{agent.agent_id}/session/{session['session_id']}/turn"
        answer = httpx.post(caravan.url + path, json=body, timeout=60).raise_for_status().json()
        return str(answer["output_message"]["content"])

    with ThreadPoolExecutor(TURNS) as pool:
        answers = list(pool.map(run, range(TURNS)))
    assert answers == ["".join(f"w{n} " for n in range(20))] * TURNS
    connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'pooled'"
    connection = psycopg2.connect(postgres.url)
    with connection.cursor() as cursor:
        cursor.execute(connections)
        assert 1 <= (cursor.fetchone() or (0,))[0] <= POOL_SIZE
    connection.close()


def test_tools_of_the_server_and_of_the_client(make_agent: AgentMaker, model: ScriptedModel) -> None:
    """The ledger, a resume, and the registry that the worker reads again."""
    with McpServer() as server:
        agent = make_agent(client_tools=[BOILING_POINT])
        group = f"mcp::{uuid.uuid4().hex[:8]}"
        agent.client.toolgroups.register(
            provider_id="model-context-protocol", toolgroup_id=group, mcp_endpoint={"uri": server.url}
        )
        chunks = agent.turn('CALL add {"a": 2, "b": 3} | CALL get_boiling_point {"liquid": "tea"}', toolgroups=[group])
        turn = chunks[-1].event.payload.turn
        [call] = turn.output_message.tool_calls
        resumed = agent.client.alpha.agents.turn.resume(
            turn.turn_id,
            agent_id=agent.agent_id,
            session_id=agent.session_id,
            tool_responses=[{"call_id": call.call_id, "tool_name": call.tool_name, "content": "100"}],
            stream=True,
        )
        chunks = list(resumed)
        last = chunks[-1].event.payload.turn
    assert last.output_message.content == "The tool said: 100 "
    assert [step.step_type for step in last.steps].count("tool_execution") == 2


def test_the_llama_stacks_own_routes(make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel) -> None:
    """Conversations (asyncpg), many at once, so that their statements meet other server connections; vectors."""
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}]

    def converse(number: int) -> str:
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            created = client.post("/v1/conversations", json={"metadata": {"n": str(number)}}).raise_for_status().json()
            path = f"/v1/conversations/{created['id']}"
            client.post(f"{path}/items", json={"items": items}).raise_for_status()
            assert len(client.get(f"{path}/items").raise_for_status().json()["data"]) == 1
            return str(client.get(path).raise_for_status().json()["metadata"]["n"])

    with ThreadPoolExecutor(TURNS) as pool:
        assert list(pool.map(converse, range(TURNS))) == [str(number) for number in range(TURNS)]
    embedding = {"model_id": "embed", "provider_id": "model-server", "model_type": "embedding"}
    http.post("/v1/models", json=embedding | {"metadata": {"embedding_dimension": 8}}).raise_for_status()
    store = {"name": "notes", "embedding_model": "embed", "embedding_dimension": 8}
    store_id = http.post("/v1/vector_stores", json=store).raise_for_status().json()["id"]
    chunk = {"content": "camels", "metadata": {}, "chunk_metadata": {"chunk_id": "c", "document_id": "d"}}
    http.post("/v1/vector-io/insert", json={"vector_db_id": store_id, "chunks": [chunk]}).raise_for_status()
    found = http.post(f"/v1/vector_stores/{store_id}/search", json={"query": "camels and tents"})
    assert found.raise_for_status().json()["data"][0]["content"][0]["text"] == "camels"


def test_every_transaction_brings_its_limit(pgbouncer: PgBouncer) -> None:
    """Six at once meet six sessions of Postgres, of which each may serve anybody next."""
    met = Barrier(POOL_SIZE)

    def limit(connection: Connection) -> Any:
        connection.execute(text("SELECT 1"))
        met.wait(60)
        return connection.scalar(text("SHOW idle_in_transaction_session_timeout"))

    with (
        closing(Store(sqlalchemy_url(pgbouncer.url), pool_size=POOL_SIZE, name="six")) as store,
        ThreadPoolExecutor(POOL_SIZE) as threads,
    ):
        for _ in range(2):
            found = list(threads.map(lambda _: store.transact(limit), range(POOL_SIZE)))
            assert found == [f"{IDLE_SECONDS}s"] * POOL_SIZE


STOPS_IN_MID_TRANSACTION = """
import os, signal, sys
from sqlalchemy import text
from app.settings import sqlalchemy_url
from app.store import Store

def stop(connection):
    connection.execute(text("SELECT 1 FROM sessions WHERE session_id = :id FOR UPDATE"), {"id": sys.argv[2]}).one()
    os.kill(os.getpid(), signal.SIGSTOP)

store = Store(sqlalchemy_url(sys.argv[1]), pool_size=1, name="stopped")
store.transact(lambda connection: connection.execute(text("SELECT 1")))
print("connected", flush=True)
sys.stdin.readline()
store.transact(stop)
"""


def test_a_process_stopped_in_mid_transaction_holds_nobody_up(pgbouncer: PgBouncer, make_agent: AgentMaker) -> None:
    """SIGSTOP while it has a session's row, in a session of Postgres in which nothing was ever set: its transaction is
    ended, and the next turn of the agent's session is accepted."""
    agent = make_agent()
    command = [sys.executable, "-c", STOPS_IN_MID_TRANSACTION, pgbouncer.url, agent.session_id]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "connected\n"
            forget_what_was_set(pgbouncer)
            assert process.stdin
            print(file=process.stdin, flush=True)
            wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, 30)
            assert agent.answer("SAY next") == "next "
        finally:
            process.kill()


def forget_what_was_set(pgbouncer: PgBouncer) -> None:
    """In all sessions of Postgres, which are had by transactions that are open at once."""
    connections = [psycopg2.connect(pgbouncer.url) for _ in range(POOL_SIZE)]
    for connection in connections:
        connection.cursor().execute("RESET ALL")
    for connection in connections:
        connection.commit()
        connection.close()


def test_doctor_finds_nothing_wrong(caravan: Caravan) -> None:
    embeddings = {"EMBEDDING_URL": caravan.env["INFERENCE_URL"], "EMBEDDING_DIMENSION": str(DIMENSIONS)}
    checking = command(caravan.env | {"INFERENCE_MODEL": "scripted"} | embeddings, "doctor")
    output, _ = checking.communicate(timeout=60)
    assert checking.returncode == 0, output


def test_nobody_met_a_statement_of_another(caravan: Caravan, pgbouncer: PgBouncer, server_directory: Path) -> None:
    """No process logged trouble with Postgres, and PgBouncer none with a client."""
    logs = [caravan.web.output(), caravan.worker.logs(), pgbouncer.log.read_text()]
    for log in [*logs, (server_directory / "pooled-other.log").read_text()]:
        assert not re.findall(r".*(?:prepared statement|unsupported startup|Traceback|not available).*", log)
