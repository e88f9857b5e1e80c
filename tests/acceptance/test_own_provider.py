"""The tool provider that `docs/tools.md` shows, as it stands there: listed by web, called by a worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from celery import Celery
from llama_stack_client import LlamaStackClient
from sqlalchemy import make_url

from tests.acceptance.conftest import Agent, queue
from tests.support.nodes import ROOT, TURN_POOL, web_process, worker_node
from tests.support.scripted_model import ScriptedModel

PAGE = ROOT / "docs" / "tools.md"
FILES = ("weather_tools/provider.py", "weather_tools/weather.py", "run.yaml")


def blocks() -> list[str]:
    """The page's code blocks that follow its mention of each of the files."""
    page = PAGE.read_text()
    found = []
    for name in FILES:
        block = re.search(rf"^`{re.escape(name)}` .*?```\w+\n(.*?)```", page, re.MULTILINE | re.DOTALL)
        assert block, name
        found.append(block[1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    (made / "weather_tools").mkdir()
    for name, content in zip(FILES, blocks(), strict=True):
        (made / name).write_text(content)
    return made


@pytest.fixture(scope="module")
def client(
    folder: Path, environment: dict[str, str], migrated_database: Callable[[str], str], scripted_model: ScriptedModel
) -> Iterator[LlamaStackClient]:
    database = migrated_database("own_provider")
    url = make_url(database)
    own = environment | {
        "DATABASE_URL": database,
        "REDIS_URL": queue(environment, 3),
        "LLAMA_STACK_CONFIG": str(folder / "run.yaml"),
        "PYTHONPATH": str(folder),
        "INFERENCE_MODEL": "scripted",
        "MODEL_ALIASES": "",
        "POSTGRES_HOST": str(url.query.get("host", url.host)),
        "POSTGRES_PORT": str(url.query.get("port", url.port or 5432)),
        "POSTGRES_DB": str(url.database),
        "POSTGRES_USER": str(url.username),
        "POSTGRES_PASSWORD": url.password or "",
    }
    base_url, web = web_process(own, folder / "web.log")
    web.start()
    worker = worker_node(TURN_POOL, own, folder / "worker.log", Celery(broker=own["REDIS_URL"]))
    try:
        web.wait_ready()
        assert worker.ready()
        with LlamaStackClient(base_url=base_url, max_retries=0) as sdk:
            yield sdk
    finally:
        worker.teardown()
        web.stop()


def test_a_provider_of_ones_own_is_listed_and_called(client: LlamaStackClient) -> None:
    """Beside MCP servers, in the run.yaml of the page."""
    listed = httpx.get(client.base_url.join("/v1/tools"), params={"toolgroup_id": "mine::weather"}, timeout=60).json()
    assert [tool["name"] for tool in listed["data"]] == ["temperature"]
    agent = Agent(client, toolgroups=["mine::weather"])
    chunks = agent.turn('CALL temperature {"place": "Fez"}')
    steps = chunks[-1].event.payload.turn.steps
    assert [step.step_type for step in steps] == ["inference", "tool_execution", "inference"]
    assert steps[1].tool_responses[0].content == "31 °C in Fez"


def test_what_the_worker_says_of_a_missing_argument_is_the_calls_response(client: LlamaStackClient) -> None:
    """The turn goes on."""
    agent = Agent(client, toolgroups=["mine::weather"])
    steps = agent.turn("CALL temperature {}")[-1].event.payload.turn.steps
    assert "The tool failed: 'place'" in str(steps[1].tool_responses[0].content)
