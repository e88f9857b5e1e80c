"""Real servers for every test: Postgres, Valkey, the scripted model, and our own processes. None is ever skipped."""

from __future__ import annotations

import base64
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from app.local import server
from app.local.postgres import Postgres
from app.local.valkey import Valkey
from app.store import migrate
from tests.support.scripted_model import ScriptedModel

SHARE_PROCESSES = (
    "test_agents.py",
    "test_cancel.py",
    "test_compat.py",
    "test_conversations.py",
    "test_openapi.py",
    "test_responses.py",
    "test_shields.py",
    "test_tool_calls.py",
    "test_turn_pool.py",
    "test_turns.py",
)
"""They use the same web process and workers, which are slow to start."""

# What a run finds, the next one finds: hypothesis says the same each time, however slow the machine is.
settings.register_profile("same", derandomize="RANDOMIZE" not in os.environ, database=None, deadline=None)
settings.load_profile("same")

_HELD = socket.socket()


def _own_ports() -> range:
    """Of this process alone, of all that run tests on this machine: it holds the first. Whoever gets one listens there
    only later; none are those of `caravan up` under test."""
    for first in range(19_000, 9_000, -1000):
        try:
            _HELD.bind((server.HOST, first))
        except OSError:
            continue  # another's
        return range(first + 1, first + 1000)
    return range(10_000, 20_000)


server.PORTS = _own_ports()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who runs together with `pytest -n`: files, and what shares processes. What does not depend on the pool
    (`pytest.mark.pools`) runs in the others only where everything runs."""
    for item in items:
        folder, file = item.path.parent.name, item.path.name
        pool = "prefork" if "prefork" in item.name else "turn-pool"
        marked = item.get_closest_marker("pools")
        if marked and pool not in marked.args:
            item.add_marker("thorough")
        if folder in ("fire", "chaos", "demos"):
            group = f"{folder} {pool}"
        else:
            group = f"shared {pool}" if file in SHARE_PROCESSES else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def open_path() -> Iterator[Path]:
    """As `tmp_path`, but below a folder that all may enter, and that no other pytest closes."""
    with tempfile.TemporaryDirectory(prefix="caravan-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A folder that all may enter: as root, Postgres has an account of its own; pytest's folders are private."""
    with tempfile.TemporaryDirectory(prefix="caravan-tests-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="session")
def postgres(server_directory: Path) -> Iterator[Postgres]:
    with Postgres(server_directory / "postgres") as server:
        yield server


@pytest.fixture(scope="session")
def empty_database(postgres: Postgres) -> str:
    """A database without a schema, for whoever migrates."""
    return create_database(postgres.url, "empty")


@pytest.fixture(scope="session")
def migrated_database(postgres: Postgres) -> Callable[[str], str]:
    """Makes a database with the schema. Processes under test get one of their own: a worker runs whatever it finds."""

    def make(name: str) -> str:
        url = create_database(postgres.url, name)
        migrate.upgrade(url)
        return url

    return make


@pytest.fixture(scope="session")
def postgres_url(migrated_database: Callable[[str], str]) -> str:
    """The database of tests without processes."""
    return migrated_database("caravan_tests")


def create_database(server_url: str, name: str) -> str:
    """Creates a database; gives its URL."""
    url = make_url(server_url).set(drivername="postgresql+psycopg2")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    return url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(valkey: Valkey) -> str:
    return valkey.url


@pytest.fixture(scope="session")
def scripted_model() -> Iterator[ScriptedModel]:
    with ScriptedModel() as server:
        yield server


@pytest.fixture
def model(scripted_model: ScriptedModel) -> ScriptedModel:
    """The scripted model, with nothing remembered of earlier tests."""
    scripted_model.reset()
    return scripted_model


@pytest.fixture(scope="session")
def environment(
    migrated_database: Callable[[str], str], redis_url: str, scripted_model: ScriptedModel, data_home: Path
) -> dict[str, str]:
    """The settings of processes under test: short leases, so that recovery is quick."""
    return {
        "DATABASE_URL": migrated_database("caravan_processes"),
        "REDIS_URL": redis_url,
        "INFERENCE_URL": scripted_model.url,
        "INFERENCE_MODEL": "scripted,second-model",
        "MODEL_ALIASES": "meta-llama/Llama-3.2-3B-Instruct=scripted",
        "LEASE_SECONDS": "4",
        "HEARTBEAT_SECONDS": "0.5",
        "UPKEEP_SECONDS": "0.5",
        "SILENCE_SECONDS": "1",
        "DRAIN_SECONDS": "2",
        "XDG_DATA_HOME": str(data_home),
        "SEALING_KEYS": base64.b64encode(bytes(32)).decode(),
    }


@pytest.fixture(scope="session")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")
