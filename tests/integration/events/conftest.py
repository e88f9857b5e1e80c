"""A Valkey of these tests' own: they flush, stop and restart it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from app.events.follow import Relay
from app.events.log import EventLog
from app.local.valkey import Valkey
from tests.integration.events.feeds import MemoryRecords, Owner, subscriptions, until


@pytest.fixture(scope="package")
def own_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("events")) as server:
        yield server


@pytest.fixture
def redis(own_valkey: Valkey) -> Valkey:
    """Up, whatever the test before did."""
    if own_valkey.pid is None:
        own_valkey.start()
    return own_valkey


@pytest.fixture
async def log(redis: Valkey) -> AsyncIterator[EventLog]:
    opened = EventLog(redis.url)
    yield opened
    await opened.close()


@pytest.fixture
def records() -> MemoryRecords:
    return MemoryRecords()


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
async def relay(log: EventLog, records: MemoryRecords) -> AsyncIterator[Relay]:
    """Looks for what it missed after 0.2 s of silence."""
    async with Relay(log, records, silence_seconds=0.2, buffer_bytes=1_000_000) as opened:
        await listening(log)
        yield opened


@pytest.fixture
async def patient_relay(log: EventLog, records: MemoryRecords) -> AsyncIterator[Relay]:
    """Never looks by itself: what its followers get, they got live or at their start."""
    async with Relay(log, records, silence_seconds=1000, buffer_bytes=1_000_000) as opened:
        await listening(log)
        yield opened


async def listening(log: EventLog) -> None:
    """Waits until the relay has its connection."""
    await until(lambda: subscriptions(log, "caravan:relay"))
