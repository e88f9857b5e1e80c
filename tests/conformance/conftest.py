"""Real parts for our engine: Postgres, Redis, and the scripted model for both.

Nothing here imports `tasks` as the module is loaded: it makes a Celery application the current one, which
pytest-celery's fixtures would then configure, with settings that a test run does not have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from app.events.log import EventLog
from app.store import Store
from tests.conformance.world import World
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import ScriptedModel

if TYPE_CHECKING:
    from tasks.engine.attempt import Tools


@pytest.fixture(scope="package")
def store(postgres_url: str) -> Iterator[Store]:
    opened = Store(make_url(postgres_url).set(drivername="postgresql+psycopg2"), pool_size=4, name="conformance")
    yield opened
    opened.close()


@pytest.fixture
async def log(redis_url: str) -> AsyncIterator[EventLog]:
    opened = EventLog(redis_url)
    yield opened
    await opened.close()


@pytest.fixture(scope="package")
def mcp() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


@pytest.fixture
async def world(model: ScriptedModel, mcp: McpServer) -> AsyncIterator[World]:
    opened = World(model.url, mcp)
    yield opened
    await opened.close()


@pytest.fixture
def tools(store: Store, log: EventLog, world: World) -> Tools:
    from tests.conformance.engines import engine_tools

    return engine_tools(store, log, world)
