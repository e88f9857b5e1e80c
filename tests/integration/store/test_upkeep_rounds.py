"""A round of upkeep, on a real database and a real queue."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from app.dispatch import QUEUE, Doorbell
from app.domain.turns import TurnStatus
from app.endings import Endings
from app.events.log import SyncLog
from app.settings import Settings, get_settings
from app.store import workers
from app.upkeep import Upkeep
from tests.integration.store.seeds import Seeds
from tests.support import wait_until


@pytest.fixture
def settings(store_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Of this process; with a queue of its own, which no worker empties."""
    monkeypatch.setenv("DATABASE_URL", store_url)
    monkeypatch.setenv("REDIS_URL", redis_url.rpartition("/")[0] + "/9")
    monkeypatch.setenv("INFERENCE_MODEL", "scripted")
    monkeypatch.setenv("LEASE_SECONDS", "1")
    monkeypatch.setenv("HEARTBEAT_SECONDS", "0.5")
    monkeypatch.delitem(sys.modules, "celeryconfig", raising=False)
    get_settings.cache_clear()
    yield get_settings()
    sys.modules.pop("celeryconfig", None)
    get_settings.cache_clear()


@pytest.fixture
def endings(seeds: Seeds, settings: Settings) -> Iterator[Endings]:
    log, doorbell = SyncLog(settings.redis_url.get_secret_value()), Doorbell()
    yield Endings(seeds.store, log, doorbell)
    doorbell.close()
    log.close()


def test_one_round_takes_and_rings_every_turn_of_a_dead_worker(
    seeds: Seeds, settings: Settings, endings: Endings
) -> None:
    """However many there are; each has lost one worker. It trusts itself to reap in the next round as well."""
    upkeep = Upkeep(settings, endings)
    worker_id = seeds.worker()
    lost = [seeds.claimed(worker_id=worker_id).turn_id for _ in range(2 * workers.BATCH + 1)]
    seeds.store.transact(workers.retire, worker_id)
    wait_until(lambda: time.monotonic() > upkeep._trust_after)
    before = endings.doorbell.waiting() or 0
    upkeep.once()
    assert seeds.store.transact(workers.orphans) == []
    assert {seeds.row(turn_id).status for turn_id in lost} == {TurnStatus.QUEUED}
    assert {seeds.column(turn_id, "failures") for turn_id in lost} == {1}
    assert (endings.doorbell.waiting() or 0) - before >= len(lost), QUEUE
