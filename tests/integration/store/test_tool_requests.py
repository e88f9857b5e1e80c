"""Requests to the tool runtime: of those who ask for one, one gets it, and no row stays."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection, text

from app.store import Store, tool_requests, workers
from app.store.tool_requests import KEEP_SECONDS, Answer, Standing
from tests.integration.store.seeds import NO_CAPS, OWNER, Seeds

WAIT = 100.0


def request(store: Store, *, sealed: bytes | None = None) -> str:
    request_id = str(uuid.uuid4())
    store.transact(tool_requests.add, request_id, OWNER, "invoke_tool", b'{"a\\u0000": 1}', sealed, NO_CAPS)
    return request_id


def age(store: Store, seconds: float) -> None:
    columns = ("created_at", "ended_at", "rung_at")
    changes = ", ".join(f"{column} = {column} - make_interval(secs => {seconds})" for column in columns)
    store.transact(lambda connection: connection.execute(text(f"UPDATE tool_requests SET {changes}")))


def standing(store: Store, request_id: str) -> Standing | None:
    return store.transact(tool_requests.standings, [request_id], WAIT).get(request_id)


def test_one_worker_gets_a_request(store: Store, seeds: Seeds) -> None:
    """The same again, if it asks again: the reply may have been lost. None that is dead."""
    request_id, worker, other, dead = request(store, sealed=b"s"), seeds.worker(), seeds.worker(), seeds.worker()
    store.transact(workers.retire, dead)
    assert store.transact(tool_requests.claim, request_id, dead) is None
    claimed = store.transact(tool_requests.claim, request_id, worker)
    assert claimed is not None
    assert (claimed.owner, claimed.method, claimed.sealed) == (OWNER, "invoke_tool", b"s")
    assert claimed.arguments == b'{"a\\u0000": 1}'
    assert store.transact(tool_requests.claim, request_id, other) is None
    assert store.transact(tool_requests.claim, request_id, worker) == claimed
    assert not store.transact(tool_requests.withdraw, request_id)
    store.transact(tool_requests.finish, request_id, other, Answer(200, b"1"))
    assert standing(store, request_id) is None
    store.transact(tool_requests.finish, request_id, worker, Answer(404, b"none"))
    assert standing(store, request_id) == Standing(Answer(404, b"none"))
    assert store.transact(tool_requests.claim, request_id, worker) is None
    store.transact(tool_requests.forget, [request_id])
    assert standing(store, request_id) == Standing(lost=True)


def test_a_request_of_a_dead_worker_is_lost(store: Store, seeds: Seeds) -> None:
    request_id, worker = request(store), seeds.worker()
    store.transact(tool_requests.claim, request_id, worker)
    store.transact(
        lambda connection: connection.execute(
            text("UPDATE workers SET dead_at = clock_timestamp() WHERE worker_id = :id"), {"id": worker}
        )
    )
    assert standing(store, request_id) == Standing(lost=True)
    age(store, WAIT + KEEP_SECONDS)
    store.transact(tool_requests.forget_abandoned, WAIT)
    assert standing(store, request_id) == Standing(lost=True)


def test_a_request_that_no_worker_takes_is_late(store: Store) -> None:
    """It is withdrawn by who asked, or else forgotten, but no earlier."""
    first, second = request(store), request(store)
    age(store, WAIT + 1)
    assert standing(store, first) == Standing(late=True)
    assert store.transact(tool_requests.withdraw, first)
    store.transact(tool_requests.forget_abandoned, WAIT)
    assert standing(store, second) == Standing(late=True)
    age(store, KEEP_SECONDS)
    store.transact(tool_requests.forget_abandoned, WAIT)
    assert standing(store, second) == Standing(lost=True)


def test_a_request_that_somebody_holds_does_not_stop_the_others_forgetting(store: Store, seeds: Seeds) -> None:
    """Upkeep would take the wait for a slow Postgres, and for a while nobody for dead."""
    held, other, worker = request(store), request(store), seeds.worker()
    for request_id in (held, other):
        store.transact(tool_requests.claim, request_id, worker)
        store.transact(tool_requests.finish, request_id, worker, Answer(200, b"1"))
    age(store, KEEP_SECONDS + 1)
    with store.engine.begin() as holding:
        holding.execute(text("SELECT 1 FROM tool_requests WHERE request_id = :id FOR UPDATE"), {"id": held})
        store.transact(patiently, WAIT)
        assert standing(store, other) == Standing(lost=True)
    assert standing(store, held) == Standing(Answer(200, b"1"))


def patiently(connection: Connection, wait: float) -> None:
    connection.execute(text("SET LOCAL lock_timeout = '1s'"))
    tool_requests.forget_abandoned(connection, wait)


def test_what_runs_long_and_an_answer_that_is_fresh_are_kept(store: Store, seeds: Seeds) -> None:
    request_id, worker = request(store), seeds.worker()
    store.transact(tool_requests.claim, request_id, worker)
    age(store, 10 * WAIT)
    store.transact(tool_requests.forget_abandoned, WAIT)
    store.transact(tool_requests.finish, request_id, worker, Answer(200, b"1"))
    store.transact(tool_requests.forget_abandoned, WAIT)
    assert standing(store, request_id) == Standing(Answer(200, b"1"))
    age(store, KEEP_SECONDS + 1)
    store.transact(tool_requests.forget_abandoned, WAIT)
    assert standing(store, request_id) == Standing(lost=True)


def test_what_waits_is_rung_for_again(store: Store, seeds: Seeds) -> None:
    """4 s after the last time; while messages wait, later and later; never for what a worker has."""
    request_id, worker = request(store), seeds.worker()

    def rung(*, backing_off: bool) -> bool:
        return request_id in store.transact(tool_requests.to_ring, backing_off=backing_off)

    assert not rung(backing_off=False)
    age(store, 4.5)
    assert rung(backing_off=True)
    age(store, 4.5)
    assert not rung(backing_off=True)
    assert rung(backing_off=False)
    store.transact(tool_requests.claim, request_id, worker)
    age(store, 100)
    assert not rung(backing_off=False)
