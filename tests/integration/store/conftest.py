"""A store over a database of these tests' own, because upkeep's queries look at every turn there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.store import Store, migrate
from tests.conftest import create_database
from tests.integration.store.seeds import Seeds


@pytest.fixture(scope="package")
def store_url(postgres_url: str) -> str:
    url = create_database(postgres_url, "store_tests")
    migrate.upgrade(make_url(url).set(drivername="postgresql+psycopg2"))
    return url


@pytest.fixture(scope="package")
def store(store_url: str) -> Iterator[Store]:
    opened = Store(
        make_url(store_url).set(drivername="postgresql+psycopg2"), pool_size=16, name="tests", transaction_seconds=60
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_left(store: Store) -> None:
    """Of other files: which of them ran before in this database is chance, and what they left is counted, or fills the
    batches of upkeep."""
    with store.engine.begin() as connection:
        for table in ("sessions", "workers", "agents"):
            connection.execute(text(f"DELETE FROM {table}"))


@pytest.fixture
def seeds(store: Store) -> Seeds:
    return Seeds(store)
