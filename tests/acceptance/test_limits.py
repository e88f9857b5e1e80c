"""Limits, as clients meet them: what is over one is refused or ends with an error that names the setting."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, Self

import httpx
import psycopg2
import pytest
import redis
from celery import Celery
from llama_stack_client import LlamaStackClient

from app.events.writer import SEGMENT_BYTES
from app.identity.keys import entry, make_key
from tests.acceptance.conftest import Agent, Caravan, queue
from tests.acceptance.test_turns import BOILING_POINT
from tests.support import wait_until
from tests.support.nodes import PREFORK, TURN_POOL, web_process, worker_node
from tests.support.scripted_model import ScriptedModel

ONE, TWO = make_key(), make_key()
LIMITS = {
    "EVENT_LOG_MAX_BYTES": "2000000",
    "MAX_TURNS_PER_SESSION": "2",
    "MAX_TURNS_PER_PRINCIPAL": "3",
    "MAX_TURNS": "4",
    "DOCUMENT_MAX_BYTES": "1000",
    "REQUEST_MAX_BYTES": "5000",
    "API_KEYS": f"{entry('one', ONE)}, {entry('two', TWO)}",
}
SHORT_TIMES = {"MODEL_CALL_TIMEOUT_SECONDS": "4", "TURN_TIMEOUT_SECONDS": "9"}
"""Of a worker of their own: other tests may take their time."""


@pytest.fixture(scope="module", params=["turn-pool", pytest.param("prefork", marks=pytest.mark.thorough)])
def caravan(
    request: pytest.FixtureRequest,
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Caravan]:
    """A system with small limits."""
    logs = tmp_path_factory.mktemp("limits")
    own = {"DATABASE_URL": migrated_database("caravan_limits"), "REDIS_URL": queue(environment, 2)}
    env = {**environment, **LIMITS, **own}
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
def http(caravan: Caravan) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=caravan.url, headers=bearer(ONE), timeout=60) as plain:
        yield plain


@pytest.fixture
def agent(caravan: Caravan, model: ScriptedModel) -> Iterator[Agent]:
    with LlamaStackClient(base_url=caravan.url, api_key=ONE, max_retries=0) as client:
        yield Agent(client)


@pytest.fixture
def patient_agent(caravan: Caravan, model: ScriptedModel) -> Iterator[Agent]:
    """Its SDK tries again by itself, as it does unless it is told not to. It makes more inferences than by default."""
    with LlamaStackClient(base_url=caravan.url, api_key=ONE, max_retries=10) as client:  # the machine may be slow
        yield Agent(client, max_infer_iters=100)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


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


def test_redis_holds_a_bounded_part_of_a_running_turn(agent: Agent, http: httpx.Client, caravan: Caravan) -> None:
    """A long step is recorded while it goes on: at no moment has Redis much more than a segment of it (here: three, on
    a busy machine; it says over four). Followers get it all."""
    parts, over, most = 6000, threading.Event(), [0]
    body = {"messages": [{"role": "user", "content": f"PARTS {parts} 2 | SAY x"}], "stream": True}

    def sample(key: str) -> None:
        with redis.Redis.from_url(caravan.env["REDIS_URL"]) as server:
            while not over.wait(0.01):
                most.append(int(server.memory_usage(key) or 0))

    with http.stream("POST", f"{agent.path}/turn", json=body) as stream, ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(sample, f"caravan:{{{stream.headers['x-turn-id']}}}:tail")
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        over.set()
        sampling.result(60)
    assert "turn_complete" in lines[-1]
    assert sum('"step_progress"' in line for line in lines) == parts + 1
    print(f"{max(most)} bytes at most, in {len(most)} looks; {sum(map(len, lines))} were said")
    assert SEGMENT_BYTES < max(most) < 3 * SEGMENT_BYTES
    assert sum(map(len, lines)) > 4 * SEGMENT_BYTES


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
    """Of a session, of a principal, and of all; nothing is stored, and there is room again when turns have ended. A
    turn that awaits input has no room to go on either."""
    gate, asking = uuid.uuid4().hex, Agent(agent.client, client_tools=[BOILING_POINT])
    asked = asking.turn('CALL get_boiling_point {"liquid": "x"}')[-1].event.payload.turn
    [call] = asked.output_message.tool_calls
    resume = {"tool_responses": [{"call_id": call.call_id, "tool_name": call.tool_name, "content": "7"}]}
    with Holding(caravan.url, gate) as holding, LlamaStackClient(base_url=caravan.url, api_key=TWO) as client:
        other, anothers = Agent(agent.client), Agent(client)
        holding.post(agent, ONE, 2)
        refuses(http.post(f"{agent.path}/turn", json=holding.body), "MAX_TURNS_PER_SESSION")
        holding.post(other, ONE)
        refuses(http.post(f"{other.path}/turn", json=holding.body), "MAX_TURNS_PER_PRINCIPAL")
        refuses(http.post(f"{asking.path}/turn/{asked.turn_id}/resume", json=resume), "MAX_TURNS_PER_PRINCIPAL")
        holding.post(anothers, TWO)
        refused = httpx.post(f"{caravan.url}{anothers.path}/turn", json=holding.body, headers=bearer(TWO), timeout=60)
        refuses(refused, "(MAX_TURNS)")
        counts = [holding.turns(each, key) for each, key in ((agent, ONE), (other, ONE), (anothers, TWO))]
        assert counts == [2, 1, 1]
        model.release(gate)
        assert holding.ended() == [200] * 4
        assert http.post(f"{agent.path}/turn", json=holding.body).status_code == 200
        assert http.post(f"{asking.path}/turn/{asked.turn_id}/resume", json=resume).status_code == 200


def test_what_was_refused_and_tried_again_is_a_new_turn(
    agent: Agent, patient_agent: Agent, http: httpx.Client, caravan: Caravan, model: ScriptedModel
) -> None:
    """Somebody says "yes" for the second time, minutes after the first; 429, and the SDK sends it again: the answer is
    not that of the first one."""
    gate = uuid.uuid4().hex
    first = patient_agent.turn("SAY yes")[-1].event.payload.turn.turn_id
    with closing(psycopg2.connect(caravan.env["DATABASE_URL"])) as connection, connection.cursor() as cursor:
        times = "completed_at = completed_at - interval '2 min', created_at = created_at - interval '2 min'"
        cursor.execute(f"UPDATE turns SET {times} WHERE turn_id = %s", [first])
        connection.commit()
    with Holding(caravan.url, gate) as holding, ThreadPoolExecutor(1) as thread:
        holding.post(agent, ONE, 2)
        holding.post(Agent(agent.client), ONE)
        refused = caravan.web.output().count('HTTP/1.1" 429')
        again = thread.submit(patient_agent.turn, "SAY yes")
        wait_until(lambda: caravan.web.output().count('HTTP/1.1" 429') > refused, 60)
        model.release(gate)
        assert again.result(60)[-1].event.payload.turn.turn_id != first
        holding.ended()
    assert len(http.get(patient_agent.path).json()["turns"]) == 2


class Holding:
    """Turns that wait for a gate, posted in the background."""

    def __init__(self, url: str, gate: str) -> None:
        self.body = {"messages": [{"role": "user", "content": f"HOLD {gate} | SAY x"}], "stream": False}
        self._url = url
        self._threads = ThreadPoolExecutor(4)
        self._posted: list[Future[httpx.Response]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False)

    def post(self, agent: Agent, key: str, count: int = 1) -> None:
        """Returns when they are accepted."""
        for _ in range(count):
            post = partial(httpx.post, json=self.body, headers=bearer(key), timeout=60)
            self._posted.append(self._threads.submit(post, f"{self._url}{agent.path}/turn"))
        wait_until(lambda: self.turns(agent, key) == count, 60)

    def turns(self, agent: Agent, key: str) -> int:
        """How many the agent's session has."""
        return len(httpx.get(f"{self._url}{agent.path}", headers=bearer(key), timeout=60).json()["turns"])

    def ended(self) -> list[int]:
        """The status of each answer."""
        return [one.result(60).status_code for one in self._posted]


def refuses(answer: httpx.Response, setting: str) -> None:
    assert (answer.status_code, answer.headers.get("retry-after")) == (429, "2"), answer.text
    assert setting in answer.json()["detail"]


# --- with short times: last, since the worker is started anew for them ---


@pytest.fixture(scope="module")
def short_times(caravan: Caravan) -> None:
    """The worker has SHORT_TIMES from here on."""
    process = caravan.worker.container.process
    process.env |= SHORT_TIMES
    caravan.worker.restart()


@pytest.mark.usefixtures("short_times")
def test_a_model_call_that_takes_too_long_fails_its_turn(agent: Agent) -> None:
    """Though it streams all the while."""
    error = error_of(agent.turn("CHUNKS 1000 20"))
    assert (error["code"], "MODEL_CALL_TIMEOUT_SECONDS" in error["message"]) == ("model_timeout", True)


@pytest.mark.usefixtures("short_times")
def test_a_guard_that_takes_too_long_fails_its_turn(agent: Agent) -> None:
    """A question to a guard is a model call; nothing passes because there was no answer."""
    agent.client.shields.register(shield_id="slow", provider_id="llama-guard", provider_shield_id="second-model")
    error = error_of(Agent(agent.client, input_shields=["slow"]).turn("SAY x\nGUARD User HANG"))
    assert (error["code"], "MODEL_CALL_TIMEOUT_SECONDS" in error["message"]) == ("shield_error", True)


@pytest.mark.usefixtures("short_times")
def test_a_turn_that_takes_too_long_fails(patient_agent: Agent, model: ScriptedModel) -> None:
    """Its steps are short, but there are many; what is recorded stays."""
    error = error_of(patient_agent.turn("\n".join('PARTS 2 100\nCALL nothing {"a": 1}' for _ in range(90))))
    assert (error["code"], "TURN_TIMEOUT_SECONDS" in error["message"]) == ("turn_timeout", True)
    wait_until(lambda: model.open_streams() == 0)
