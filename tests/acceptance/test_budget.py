"""The Postgres connections of each process stay within the table of docs/operations.md, under 500 turns at once."""

from __future__ import annotations

import asyncio
import re
import uuid

import httpx
import psycopg2
import pytest

from tests.acceptance.conftest import AgentMaker, Caravan
from tests.support import ROOT
from tests.support.scripted_model import ScriptedModel

TURNS = 500
POOL_SIZE = 5
"""DATABASE_POOL_SIZE by default."""

BUDGET = {
    "caravan-web": POOL_SIZE,
    "caravan-web-upkeep": 1,
    "caravan-stack-sql": POOL_SIZE,
    "caravan-worker": POOL_SIZE,
    "caravan-worker-upkeep": 1,
    "caravan-lease": 1,
    "caravan-stack": 2,
}
"""By application_name: one web process and one worker process in steady state; the stack's psycopg2 is one of each."""

pytestmark = pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)


def connections(database_url: str) -> dict[str, int]:
    """By application_name, those of our own, and what Postgres itself runs there, aside."""
    connection = psycopg2.connect(database_url, application_name="counting")
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT application_name, count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND backend_type = 'client backend' AND state IS NOT NULL "
                "AND application_name <> 'counting' GROUP BY 1"
            )
            return dict(cursor.fetchall())
    finally:
        connection.close()


def test_500_turns_in_one_worker(
    caravan: Caravan, make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel
) -> None:
    """While all of them wait for the model, and while all of them end at once; then all have completed."""
    agent = make_agent()
    gate = uuid.uuid4().hex
    most: dict[str, int] = {}

    def count() -> None:
        for name, number in connections(caravan.env["DATABASE_URL"]).items():
            most[name] = max(number, most.get(name, 0))

    async def run(client: httpx.AsyncClient) -> str:
        path = f"/v1/agents/{agent.agent_id}/session"
        session = (await client.post(path, json={"session_name": "one of many"})).json()["session_id"]
        body = {"messages": [{"role": "user", "content": f"HOLD {gate} | SAY done"}], "stream": False}
        answer = await client.post(f"{path}/{session}/turn", json=body)
        return str(answer.raise_for_status().json()["output_message"]["content"])

    async def run_all() -> list[str]:
        # No connection is used again: the server may be closing it at that moment, and a POST is not repeated.
        limits = httpx.Limits(max_connections=TURNS, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=caravan.url, timeout=240, limits=limits) as client:
            running = asyncio.gather(*(run(client) for _ in range(TURNS)))
            counting = asyncio.create_task(keep_counting())
            await asyncio.to_thread(model.wait_held, gate, TURNS, timeout=180)
            model.release(gate)
            answers = await running
            counting.cancel()
            return answers

    async def keep_counting() -> None:
        while True:
            await asyncio.to_thread(count)
            await asyncio.sleep(0.1)

    assert asyncio.run(run_all()) == ["done "] * TURNS
    assert most.keys() <= BUDGET.keys()
    assert {name: number for name, number in most.items() if number > BUDGET[name]} == {}
    assert most["caravan-worker"] == POOL_SIZE


def test_the_table_of_the_documents_says_the_same(caravan: Caravan) -> None:
    """`at most, in steady state`, with the default pool."""
    page = (ROOT / "docs" / "operations.md").read_text()
    [(web, worker)] = re.findall(r"with the default of 5 \| (\d+) \| (\d+) \| 0", page)
    assert int(web) + int(worker) == sum(BUDGET.values())
