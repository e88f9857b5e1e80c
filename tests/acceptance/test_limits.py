"""Limits, as clients meet them: what is over one is refused or ends with an error that names the setting."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis
from celery import Celery
from llama_stack_client import LlamaStackClient

from app.events.writer import SEGMENT_BYTES
from tests.acceptance.conftest import Agent, Caravan
from tests.support import wait_until
from tests.support.nodes import PREFORK, TURN_POOL, web_process, worker_node
from tests.support.scripted_model import ScriptedModel

LIMITS = {
    "EVENT_LOG_MAX_BYTES": "2000000",
    "MODEL_CALL_TIMEOUT_SECONDS": "2",
    "TURN_TIMEOUT_SECONDS": "4",
    "MAX_TURNS_PER_SESSION": "2",
    "MAX_TURNS_PER_PRINCIPAL": "3",
    "DOCUMENT_MAX_BYTES": "1000",
    "REQUEST_MAX_BYTES": "5000",
}


@pytest.fixture(scope="module", params=["turn-pool", pytest.param("prefork", marks=pytest.mark.thorough)])
def caravan(
    request: pytest.FixtureRequest,
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Caravan]:
    """A system with small limits."""
    logs = tmp_path_factory.mktemp("limits")
    env = {**environment, **LIMITS, "DATABASE_URL": migrated_database("caravan_limits")}
    url, web = web_process(env, logs / "web.log")
    web.start()
    pool = TURN_POOL if request.param == "turn-pool" else PREFORK
    worker = worker_node(pool, env, logs / "worker.log", Celery(broker=env["REDIS_URL"]))
    try:
        web.wait_ready()
        assert worker.ready()
        yield Caravan(url, env, web, worker)
    finally:
        worker.teardown()
        web.stop()


@pytest.fixture
def agent(caravan: Caravan, model: ScriptedModel) -> Iterator[Agent]:
    with LlamaStackClient(base_url=caravan.url, max_retries=0) as client:
        yield Agent(client)


def error_of(chunks: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = chunks[-1].error
    return found


def test_a_turn_that_says_too_much_fails(agent: Agent, http: httpx.Client) -> None:
    """Its log is over EVENT_LOG_MAX_BYTES; what it said until then can be read."""
    error = error_of(agent.turn("PARTS 20000 | HANG"))
    assert (error["code"], "EVENT_LOG_MAX_BYTES" in error["message"]) == ("event_log_exceeded", True)
    turn = http.get(agent.path).json()["turns"][0]["turn_id"]
    assert 1_900_000 < len(http.get(f"{agent.path}/turn/{turn}/events").content) < 3_000_000
    assert agent.answer("SAY next") == "next "


def test_redis_holds_a_bounded_part_of_a_running_turn(
    agent: Agent, http: httpx.Client, model: ScriptedModel, redis_url: str
) -> None:
    """A long step is recorded while it goes on: Redis keeps at most two segments' bytes, followers get it all."""
    gate, parts = uuid.uuid4().hex, 5000
    body = {"messages": [{"role": "user", "content": f"PARTS {parts} | HOLD {gate} | SAY x"}], "stream": True}
    with redis.Redis.from_url(redis_url) as server, http.stream("POST", f"{agent.path}/turn", json=body) as stream:
        tail = f"caravan:{{{stream.headers['x-turn-id']}}}:tail"
        model.wait_held(gate)
        lines, deltas = stream.iter_lines(), 0
        while deltas < parts:
            deltas += '"step_progress"' in next(lines)
        wait_until(lambda: int(server.memory_usage(tail) or 0) < 2 * SEGMENT_BYTES)
        model.release(gate)
        assert "turn_complete" in [line for line in lines if line.startswith("data: ")][-1]


def test_a_model_call_that_takes_too_long_fails_its_turn(agent: Agent) -> None:
    """Though it streams all the while."""
    error = error_of(agent.turn("CHUNKS 1000 20"))
    assert (error["code"], "MODEL_CALL_TIMEOUT_SECONDS" in error["message"]) == ("model_timeout", True)


def test_a_turn_that_takes_too_long_fails(agent: Agent, model: ScriptedModel) -> None:
    """Its steps are short, but there are many; what is recorded stays."""
    script = "\n".join('PARTS 10 100\nCALL nothing {"a": 1}' for _ in range(9))
    error = error_of(agent.turn(script))
    assert (error["code"], "TURN_TIMEOUT_SECONDS" in error["message"]) == ("turn_timeout", True)
    assert model.open_streams() == 0


def test_a_document_or_a_body_that_is_too_large_is_refused(agent: Agent, http: httpx.Client) -> None:
    """The document fails its turn, the body is 413; each names its setting."""
    document = {"content": "x" * 1001, "mime_type": "text/plain"}
    error = error_of(agent.turn("SAY x", documents=[document]))
    assert (error["code"], "DOCUMENT_MAX_BYTES" in error["message"]) == ("invalid_request", True)
    refused = http.post(f"{agent.path}/turn", json={"messages": [{"role": "user", "content": "x" * 6000}]})
    assert (refused.status_code, "REQUEST_MAX_BYTES" in refused.text) == (413, True)


def test_caps_are_429_with_retry_after(
    agent: Agent, http: httpx.Client, caravan: Caravan, model: ScriptedModel
) -> None:
    """Of a session, then of a principal; nothing is stored, and there is room again when turns have ended."""
    gate = uuid.uuid4().hex
    body = {"messages": [{"role": "user", "content": f"HOLD {gate} | SAY x"}], "stream": False}
    with LlamaStackClient(base_url=caravan.url) as client, ThreadPoolExecutor(3) as pool:
        other = Agent(client)
        posted = [pool.submit(httpx.post, f"{caravan.url}{agent.path}/turn", json=body, timeout=60) for _ in range(2)]
        wait_until(lambda: len(http.get(agent.path).json()["turns"]) == 2)
        refused = http.post(f"{agent.path}/turn", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert "MAX_TURNS_PER_SESSION" in refused.json()["detail"]
        posted.append(pool.submit(httpx.post, f"{caravan.url}{other.path}/turn", json=body, timeout=60))
        wait_until(lambda: len(http.get(other.path).json()["turns"]) == 1)
        refused = http.post(f"{other.path}/turn", json=body)
        assert (refused.status_code, "MAX_TURNS_PER_PRINCIPAL" in refused.json()["detail"]) == (429, True)
        assert len(http.get(agent.path).json()["turns"]) == 2
        model.release(gate)
        assert [one.result(60).status_code for one in posted] == [200, 200, 200]
        assert http.post(f"{agent.path}/turn", json=body).status_code == 200
