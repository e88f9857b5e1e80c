"""A store over a database of these tests' own, because upkeep's queries look at every turn there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
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
    opened = Store(make_url(store_url).set(drivername="postgresql+psycopg2"), pool_size=16, name="tests")
    yield opened
    opened.close()


@pytest.fixture
def seeds(store: Store) -> Seeds:
    return Seeds(store)
