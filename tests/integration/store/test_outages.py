"""The store when Postgres goes away or stops answering: every caller hears in bounded time, and hears the truth."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL, make_url

from app.domain.errors import OutcomeUnknown, Unavailable
from app.store import Store, tool_requests
from app.store.store import CONNECT_TIMEOUT_SECONDS, IDLE_SECONDS, THREAD_WAIT_SECONDS
from tasks.tool_requests import claim
from tests.integration.store.seeds import NO_CAPS, Seeds
from tests.support import wait_until
from tests.support.proxy import TcpProxy

QUICK_SECONDS = 1.0
MARGIN_SECONDS = 10.0
"""For a busy machine; without its bound, each would take for ever, or minutes."""


@pytest.fixture
def proxy(store_url: str) -> Iterator[TcpProxy]:
    url = make_url(store_url)
    assert url.host
    assert url.port
    with TcpProxy(url.host, url.port) as made:
        yield made


@pytest.fixture
def through(store_url: str, proxy: TcpProxy) -> URL:
    behind = make_url(store_url).set(drivername="postgresql+psycopg2", port=proxy.port)
    return behind.update_query_dict({"sslmode": "disable"})


@pytest.fixture
def quick(through: URL) -> Iterator[Store]:
    """A store whose transactions may take a second, with a connection that is open."""
    store = Store(through, pool_size=2, name="quick", transaction_seconds=QUICK_SECONDS)
    store.transact(ping)
    yield store
    store.close()


@pytest.fixture
def mark(seeds: Seeds) -> Iterator[str]:
    """A row's id, for `write` to insert and `written` to look for."""
    create = text("CREATE TABLE IF NOT EXISTS marks (mark text PRIMARY KEY)")
    seeds.store.transact(lambda connection: connection.execute(create))
    yield "here"
    seeds.store.transact(lambda connection: connection.execute(text("DROP TABLE marks")))


def ping(connection: Connection) -> int:
    return int(connection.scalar(text("SELECT 1")) or 0)


def write(connection: Connection, mark: str) -> None:
    connection.execute(text("INSERT INTO marks VALUES (:mark)"), {"mark": mark})


def written(seeds: Seeds, mark: str) -> bool:
    return bool(seeds.scalar(f"SELECT count(*) FROM marks WHERE mark = '{mark}'"))


def sessions(seeds: Seeds) -> int:
    """How many of the quick store's connections Postgres has."""
    return int(seeds.scalar("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'caravan-quick'"))


def test_a_lost_commit_reply_is_an_unknown_outcome(quick: Store, seeds: Seeds, proxy: TcpProxy, mark: str) -> None:
    """The server committed, and the connection broke before it could say so."""
    proxy.lose_reply_after(b"COMMIT")
    with pytest.raises(OutcomeUnknown, match="DATABASE_URL"):
        quick.transact(write, mark)
    proxy.wait_lost()
    assert written(seeds, mark)
    assert quick.transact(ping) == 1


def test_a_reply_lost_before_the_commit_is_done_again(quick: Store, seeds: Seeds, proxy: TcpProxy, mark: str) -> None:
    """Surely nothing was committed, so the transaction is done once more, on a new connection."""
    proxy.lose_reply_after(b"INSERT")
    quick.transact(write, mark)
    proxy.wait_lost()
    assert written(seeds, mark)


def test_a_stall_before_the_commit_never_commits(quick: Store, seeds: Seeds, proxy: TcpProxy, mark: str) -> None:
    """The statement reaches the server when the network is back, long after its caller heard that it failed."""
    proxy.stall_at(b"INSERT")
    started = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer within 1 s") as raised:
        quick.transact(write, mark)
    assert time.monotonic() - started < QUICK_SECONDS + MARGIN_SECONDS
    assert not isinstance(raised.value, OutcomeUnknown)
    proxy.flow()
    wait_until(lambda: sessions(seeds) == 0)
    assert not written(seeds, mark)
    assert quick.transact(ping) == 1


def test_a_stall_in_the_commit_is_unknown_and_commits_late(
    quick: Store, seeds: Seeds, proxy: TcpProxy, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mere look says "no" before the COMMIT arrives; whoever waits for the transaction's lock is not misled."""
    monkeypatch.setattr("app.store.store._LIMIT_IDLING", "SET LOCAL idle_in_transaction_session_timeout = 0; ")
    proxy.stall_at(b"COMMIT")
    with pytest.raises(OutcomeUnknown, match="did not answer within 1 s"):
        quick.transact(write, mark)
    assert not written(seeds, mark)
    asked = text("INSERT INTO marks VALUES (:mark) ON CONFLICT DO NOTHING RETURNING mark")
    found: list[object] = []

    def resolve(connection: Connection) -> None:
        found.append(connection.execute(asked, {"mark": mark}).all())

    resolving = threading.Thread(target=seeds.store.transact, args=(resolve,))
    resolving.start()
    proxy.flow()
    resolving.join(60)
    assert found == [[]]
    assert written(seeds, mark)


def test_a_client_that_vanishes_in_mid_transaction_frees_its_locks(
    quick: Store, seeds: Seeds, proxy: TcpProxy, mark: str
) -> None:
    """Its machine is gone without a word (here: a stall that goes on); Postgres ends the transaction after 3 s."""
    proxy.stall_at(b"COMMIT")
    with pytest.raises(OutcomeUnknown):
        quick.transact(write, mark)
    started = time.monotonic()
    seeds.store.transact(write, mark)
    assert time.monotonic() - started < IDLE_SECONDS + MARGIN_SECONDS


def test_an_unreachable_server_while_connecting(through: URL, proxy: TcpProxy) -> None:
    """The connection is accepted and then nothing comes: in the handshake, to SQLAlchemy's first questions, to ours."""
    for pattern in (b"user", b"version()", b"SET LOCAL idle"):
        store = Store(through, pool_size=1, name="quick", transaction_seconds=QUICK_SECONDS)
        proxy.stall_at(pattern)
        started = time.monotonic()
        with pytest.raises(Unavailable):
            store.transact(ping)
        assert time.monotonic() - started < CONNECT_TIMEOUT_SECONDS + QUICK_SECONDS + MARGIN_SECONDS
        proxy.wait_stalled()
        proxy.flow()
        assert store.transact(ping) == 1
        store.close()


@pytest.mark.parametrize("outage", ["refused", "stalled"])
async def test_a_burst_hears_in_bounded_time(through: URL, proxy: TcpProxy, outage: str, seeds: Seeds) -> None:
    """200 transactions over 5 connections do not wait for one another's time-outs."""
    store = Store(through, pool_size=5, name="quick")
    await asyncio.gather(*(store.run(ping) for _ in range(20)))
    if outage == "refused":
        proxy.refuse()
        proxy.cut()
    else:
        proxy.stall()
    started = time.monotonic()
    answers = await asyncio.gather(*(store.run(ping) for _ in range(200)), return_exceptions=True)
    took = time.monotonic() - started
    assert {type(answer) for answer in answers} == {Unavailable}
    assert took < THREAD_WAIT_SECONDS + CONNECT_TIMEOUT_SECONDS + MARGIN_SECONDS
    proxy.accept()
    proxy.flow()
    assert await store.run(ping) == 1
    store.close()


async def test_what_was_withdrawn_never_runs(through: URL, proxy: TcpProxy, seeds: Seeds, mark: str) -> None:
    """Its caller was told that it failed; that stays so when there are threads and connections again."""
    store = Store(through, pool_size=1, name="quick", transaction_seconds=2 * THREAD_WAIT_SECONDS)
    await store.run(ping)
    proxy.stall()
    first = asyncio.create_task(store.run(ping))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="has not answered others"):
        await store.run(write, mark)
    proxy.flow()
    assert await first == 1
    assert await store.run(ping) == 1
    assert not written(seeds, mark)
    store.close()


async def test_a_queue_that_is_merely_long_goes_on(through: URL) -> None:
    """Postgres answers, each time slowly: nobody is turned away, however long it takes."""
    store = Store(through, pool_size=1, name="quick")
    asked = [store.run(lambda connection: connection.scalar(text("SELECT pg_sleep(1.2)"))) for _ in range(6)]
    assert len(await asyncio.gather(*asked)) == 6
    store.close()


async def test_a_cancelled_caller_is_cancelled(quick: Store, proxy: TcpProxy) -> None:
    """Not told that Postgres is away."""
    proxy.stall()
    asking = asyncio.create_task(quick.run(ping))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    proxy.flow()


@pytest.mark.parametrize("query", ["add", "claim"])
async def test_a_tool_request_whose_commit_reply_was_lost(
    through: URL, seeds: Seeds, proxy: TcpProxy, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres then refuses connections for a while: what may have been done is not given up, or said to have failed.

    Otherwise a client makes its request again beside the one that runs, or waits for a worker that does not know of it.
    """
    request_id, worker = str(uuid.uuid4()), seeds.worker()
    asked: Any = (request_id, "alice", "invoke_tool", b"{}", None, NO_CAPS)
    if query == "claim":
        seeds.store.transact(tool_requests.add, *asked)
    store = Store(through, pool_size=1, name="quick")
    store.transact(ping)
    run, refused = store.run, asyncio.Event()

    async def watched(*args: Any) -> Any:
        try:
            return await run(*args)
        except Unavailable as error:
            if not isinstance(error, OutcomeUnknown):
                refused.set()
            raise

    monkeypatch.setattr(store, "run", watched)
    proxy.refuse()  # connections that come
    proxy.lose_reply_after(b"COMMIT")
    twice: Any = (
        store.run_until_known(tool_requests.add, *asked) if query == "add" else claim(store, request_id, worker)
    )
    asking = asyncio.create_task(twice)
    await asyncio.wait_for(refused.wait(), 30)
    proxy.accept()
    claimed = await asking
    assert seeds.scalar(f"SELECT count(*) FROM tool_requests WHERE request_id = '{request_id}'") == 1
    assert query == "add" or claimed.worker_id == worker
    store.close()


async def test_a_tool_request_that_was_never_stored_is_refused(through: URL, proxy: TcpProxy) -> None:
    store = Store(through, pool_size=1, name="quick")
    proxy.refuse()
    asked = (str(uuid.uuid4()), "alice", "invoke_tool", b"{}", None, NO_CAPS)
    with pytest.raises(Unavailable):
        await store.run_until_known(tool_requests.add, *asked)
    store.close()
