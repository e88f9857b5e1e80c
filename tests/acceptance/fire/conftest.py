"""Two web processes and two workers on a database and a Valkey of their own.

The web processes live as long as the session; workers as long as the tests of one pool, unless a test kills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from app.local.valkey import Valkey
from tests.acceptance.fire.system import System
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL
from tests.support.proxy import TcpProxy

POOLS = {"turn-pool": TURN_POOL, "prefork": ("-c", "3")}


@pytest.fixture(scope="package")
def fire_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey that tests may flush, stop and kill."""
    with Valkey(tmp_path_factory.mktemp("fire-valkey")) as server:
        yield server


@pytest.fixture(scope="package")
def events_proxy(fire_valkey: Valkey) -> Iterator[TcpProxy]:
    """Between worker `a` and Redis, as far as events go; its doorbells come directly."""
    with TcpProxy("127.0.0.1", fire_valkey.port) as proxy:
        yield proxy


@pytest.fixture(scope="package")
def web_system(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    fire_valkey: Valkey,
    events_proxy: TcpProxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[System]:
    env = {**environment, "DATABASE_URL": migrated_database("caravan_fire"), "REDIS_URL": fire_valkey.url}
    proxied = {"REDIS_URL": f"redis://127.0.0.1:{events_proxy.port}/0", "CELERY_BROKER_URL": fire_valkey.url}
    system = System(env, tmp_path_factory.mktemp("fire"), {"a": proxied})
    try:
        system.start_webs(2)
        yield system
    finally:
        system.stop()


@pytest.fixture(scope="package", params=["turn-pool", pytest.param("prefork", marks=pytest.mark.thorough)])
def pool(request: pytest.FixtureRequest) -> str:
    """Tests that ask for the system run with both pools, unless they name one."""
    return str(request.param)


@pytest.fixture(scope="package")
def pool_system(web_system: System, pool: str) -> Iterator[System]:
    web_system.pool = POOLS[pool]
    yield web_system
    web_system.stop_workers()


@pytest.fixture
def system(pool_system: System, fire_valkey: Valkey, model: object) -> System:
    """The system with two workers, `a` and `b`, that are up and both consume."""
    pool_system.start_workers("a", "b")
    for name in ("a", "b"):
        pool_system.consume(name)
    return pool_system


@pytest.fixture(scope="package")
def mcp_server() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


@pytest.fixture
def mcp(mcp_server: McpServer) -> McpServer:
    """The MCP server, with no calls remembered."""
    mcp_server.reset()
    return mcp_server
