"""What a web process tells a client of its request to the tool runtime, by what stands in Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from sqlalchemy import text

from app.api.service import Service
from app.api.tool_requests import NO_RETRY, ToolRequests
from app.dispatch import Doorbell
from app.settings import Settings
from app.stack.tool_requests import INSERT, INVOKE, NoAnswer
from app.store import Store, tool_requests
from app.store.tool_requests import Answer
from tests.integration.store.seeds import Seeds
from tests.support import wait_until


class Unheard:
    """A doorbell that no worker hears."""

    def __init__(self) -> None:
        self.rung: asyncio.Queue[str] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def ring_for_tool(self, request_id: str) -> bool:
        self._loop.call_soon_threadsafe(self.rung.put_nowait, request_id)
        return True


def web(store: Store, doorbell: Unheard) -> ToolRequests:
    settings, none = Settings(_env_file=None, database_url="postgresql://localhost/x"), cast(Any, None)
    return ToolRequests(Service(settings, store, none, cast(Doorbell, doorbell), none))


Ask = Callable[[str], Awaitable[tuple[str, asyncio.Task[bytes]]]]


@pytest.fixture
async def doorbell() -> Unheard:
    return Unheard()


@pytest.fixture
async def tools(store: Store, doorbell: Unheard) -> AsyncIterator[ToolRequests]:
    made = web(store, doorbell)
    yield made
    await made.close()


@pytest.fixture
async def ask(tools: ToolRequests, doorbell: Unheard) -> Ask:
    """Makes a request: its id, once it is stored and rung for, and its answer."""

    async def asked(method: str) -> tuple[str, asyncio.Task[bytes]]:
        answer = asyncio.create_task(tools.run(method, b"{}", "alice", {}))
        return await doorbell.rung.get(), answer

    return asked


def rows(seeds: Seeds, request_id: str) -> Any:
    return seeds.scalar(f"SELECT count(*) FROM tool_requests WHERE request_id = '{request_id}'")


@pytest.mark.parametrize(
    ("method", "status", "headers"),
    [(INVOKE, 504, NO_RETRY), (INVOKE, 500, NO_RETRY), (INVOKE, 404, None), (INSERT, 504, None)],
)
async def test_sdks_do_not_call_a_tool_again_that_failed(
    ask: Ask, seeds: Seeds, method: str, status: int, headers: dict[str, str] | None
) -> None:
    """By themselves, as they do with 5xx: it may have done its work. Documents may be inserted again."""
    request_id, answer = await ask(method)
    worker = seeds.worker()
    seeds.store.transact(tool_requests.claim, request_id, worker)
    seeds.store.transact(tool_requests.finish, request_id, worker, Answer(status, b'"why"'))
    with pytest.raises(NoAnswer, match="why") as told:
        await answer
    assert (told.value.status_code, told.value.headers) == (status, headers)


async def test_a_request_that_is_taken_at_the_last_moment_is_waited_for(
    tools: ToolRequests, ask: Ask, seeds: Seeds
) -> None:
    """A worker takes it between the web process's look and its withdrawal."""
    worker = seeds.worker()
    request_id, answer = await ask(INVOKE)
    with seeds.store.engine.begin() as taking:
        assert tool_requests.claim(taking, request_id, worker)
        taking.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        tools.max_wait_seconds = 0
        withdrawing = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%DELETE%'"
        await asyncio.to_thread(wait_until, lambda: seeds.scalar(withdrawing))
    seeds.store.transact(tool_requests.finish, request_id, worker, Answer(200, b"1"))
    assert await answer == b"1"
    await asyncio.to_thread(wait_until, lambda: not rows(seeds, request_id))


async def test_without_postgres_a_client_is_told_when_to_try_again() -> None:
    store = Store("postgresql+psycopg2://nobody@127.0.0.1:1/none", pool_size=1, name="tests")
    with pytest.raises(NoAnswer, match="DATABASE_URL") as told:
        await web(store, Unheard()).run(INVOKE, b"{}", "alice", {})
    assert (told.value.status_code, told.value.headers) == (503, {"Retry-After": "2"})
    store.close()
