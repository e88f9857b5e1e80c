"""The processes, as an operator starts them, and clients of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from celery import Celery
from llama_stack_client import LlamaStackClient
from pytest_celery import CeleryTestWorker

from tests.support.nodes import PREFORK, TURN_POOL, Process, web_process, worker_node


@dataclass(frozen=True)
class Caravan:
    """One running system: `url` of its web process."""

    url: str
    env: dict[str, str]
    web: Process
    worker: CeleryTestWorker


def queue(environment: dict[str, str], number: int) -> str:
    """The URL of a database of the common Redis. Who has a Postgres database of his own needs one: `caravan`, which may
    run beside him, would take his doorbells, and find no such turns."""
    return f"{environment['REDIS_URL'].rpartition('/')[0]}/{number}"


@pytest.fixture(scope="package", params=["turn-pool", "prefork"])
def caravan(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Caravan]:
    """Web and one worker; every test that uses it runs with both pools."""
    logs = tmp_path_factory.mktemp(f"caravan-{request.param}")
    pool = TURN_POOL if request.param == "turn-pool" else PREFORK
    url, web = web_process(environment, logs / "web.log")
    web.start()
    worker = worker_node(pool, environment, logs / "worker.log", Celery(broker=environment["REDIS_URL"]))
    try:
        web.wait_ready()
        assert worker.ready()
        yield Caravan(url, environment, web, worker)
    finally:
        worker.teardown()
        web.stop()


@pytest.fixture
def client(caravan: Caravan) -> Iterator[LlamaStackClient]:
    """The real SDK, unmodified."""
    with LlamaStackClient(base_url=caravan.url, max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def http(caravan: Caravan) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=caravan.url, timeout=60) as plain:
        yield plain


AgentMaker = Callable[..., "Agent"]


class Agent:
    """An agent with one session, used through the SDK's raw routes."""

    def __init__(self, client: LlamaStackClient, **config: Any) -> None:
        self.client = client
        fields: Any = {"model": "scripted", "instructions": "You are helpful", **config}
        self.agent_id = client.alpha.agents.create(agent_config=fields).agent_id
        self.session_id = client.alpha.agents.session.create(self.agent_id, session_name="test").session_id

    @property
    def path(self) -> str:
        return f"/v1/agents/{self.agent_id}/session/{self.session_id}"

    def turn(self, script: str, **more: Any) -> list[Any]:
        """Creates a turn and gives the chunks of its stream."""
        stream = self.client.alpha.agents.turn.create(
            self.session_id,
            agent_id=self.agent_id,
            messages=[{"role": "user", "content": script}],
            stream=True,
            **more,
        )
        return list(stream)

    def answer(self, script: str) -> str:
        """The text that a turn ends with."""
        return str(self.turn(script)[-1].event.payload.turn.output_message.content)


@pytest.fixture
def make_agent(client: LlamaStackClient, model: object) -> AgentMaker:
    """Makes agents; the scripted model remembers nothing of earlier tests."""

    def make(**config: Any) -> Agent:
        return Agent(client, **config)

    return make
