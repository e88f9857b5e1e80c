"""A round of upkeep, on a real database and a real queue."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import text

from app.dispatch import QUEUE, Doorbell
from app.domain.turns import TurnStatus
from app.endings import Endings
from app.events.log import SyncLog
from app.local.valkey import Valkey
from app.settings import Settings, get_settings
from app.store import tool_requests, workers
from app.upkeep import Upkeep
from tests.integration.store.seeds import NO_CAPS, Seeds, unhurried
from tests.support import wait_until
from tests.support.proxy import TcpProxy

NEVER_SLOW = {"heartbeat_seconds": 600}
"""A query that took longer would be a reason not to reap."""


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


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few turns are many."""
    monkeypatch.setattr(workers, "BATCH", 5)


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
    upkeep = Upkeep(settings.model_copy(update=NEVER_SLOW), endings)
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


@pytest.fixture
def stalled(valkey: Valkey, endings: Endings) -> Iterator[Endings]:
    """Those of a process whose Redis hangs, as far as events go."""
    with TcpProxy("127.0.0.1", valkey.port) as proxy, closing(SyncLog(f"redis://127.0.0.1:{proxy.port}/9")) as log:
        proxy.stall()
        yield Endings(endings.store, log, endings.doorbell)
        proxy.flow()


def test_one_round_ends_every_turn_that_waited_too_long_or_is_unwanted(
    seeds: Seeds, settings: Settings, stalled: Endings
) -> None:
    """However many there are, and though Redis hangs, which says nothing of Postgres: it reaps in the next round. A
    turn that somebody else ends at this moment is left to him."""
    upkeep = Upkeep(settings.model_copy(update={"upkeep_seconds": 60, **NEVER_SLOW}), stalled)
    overdue, unwanted = ([seeds.turn() for _ in range(workers.BATCH + 1)] for _ in range(2))
    for turn_id in overdue:
        seeds.age(turn_id, "queued_at", settings.max_queue_wait_seconds)
    for turn_id in unwanted:
        seeds.scalar("UPDATE turns SET cancel_requested_at = now() WHERE turn_id = :id RETURNING 1", id=turn_id)
    trust_after = upkeep._trust_after
    with unhurried(seeds.store) as other:
        taken = [overdue.pop(), unwanted.pop()]
        other.execute(text("SELECT 1 FROM turns WHERE turn_id::text = ANY(:ids) FOR UPDATE"), {"ids": taken})
        upkeep.once()
    assert {seeds.row(turn_id).status for turn_id in overdue} == {TurnStatus.FAILED}
    assert {seeds.row(turn_id).status for turn_id in unwanted} == {TurnStatus.CANCELLED}
    assert {seeds.row(turn_id).status for turn_id in taken} == {TurnStatus.QUEUED}
    assert upkeep._trust_after == trust_after
    upkeep.once()
    assert {seeds.row(turn_id).status for turn_id in taken} == {TurnStatus.FAILED, TurnStatus.CANCELLED}


def test_a_slow_query_makes_a_process_distrust_itself(seeds: Seeds, settings: Settings, endings: Endings) -> None:
    """Somebody has the table of turns for longer than a heartbeat: whoever seems dead may be as slow as this."""
    upkeep = Upkeep(settings, endings)
    trust_after = upkeep._trust_after
    with ThreadPoolExecutor(1) as thread:
        with unhurried(seeds.store) as other:
            other.execute(text("LOCK TABLE turns"))
            round_ = thread.submit(upkeep.once)
            wait_until(lambda: time.monotonic() > trust_after)
        round_.result(60)
    assert upkeep._trust_after > trust_after


class Room:
    """A worker's runtime with room for one, which has not begun yet what it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def room(self) -> int:
        return 1

    def run_unrung(self, turn_id: str) -> None:
        self.given.append(turn_id)

    def run_tool_unrung(self, request_id: str) -> None:
        self.given.append(request_id)


def test_without_the_broker_a_worker_takes_no_more_than_it_has_room_for(
    seeds: Seeds, settings: Settings, endings: Endings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn and a tool request wait."""
    request_id = str(uuid.uuid4())
    seeds.age(seeds.turn(), "rung_at", 10)
    seeds.store.transact(tool_requests.add, request_id, "alice", "invoke_tool", b"{}", None, NO_CAPS)
    with seeds.store.engine.begin() as connection:
        connection.execute(text("UPDATE tool_requests SET rung_at = rung_at - interval '10 s'"))
    with monkeypatch.context() as broken:
        broken.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
        broken.delitem(sys.modules, "celeryconfig", raising=False)
        get_settings.cache_clear()
        doorbell, runner = Doorbell(), Room()
        Upkeep(settings, Endings(seeds.store, endings.log, doorbell), runner)._ring()
        doorbell.close()
    seeds.store.transact(tool_requests.withdraw, request_id)
    assert len(runner.given) == 1
