"""What one worker process has once: an event loop in a thread, the Llama Stack on it, a lease, upkeep, running turns.

Both pools use it: a prefork child waits for its one turn in its main thread, the turn pool for hundreds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import uvloop
from redis.exceptions import RedisError

from app.dispatch import Doorbell
from app.domain.errors import CaravanError, Unavailable
from app.domain.turns import isolated_from
from app.endings import Endings
from app.events.cancellations import hear_cancellations
from app.events.log import EventLog, SyncLog
from app.settings import Settings
from app.store import Store, claims, workers
from app.store.claims import Claim
from app.store.tool_requests import Answer, ToolRequest
from app.store.workers import Renewal
from app.telemetry import settle_memory, turn_context
from app.upkeep import Upkeep
from tasks import tool_requests
from tasks.engine import attempt_of
from tasks.engine.attempt import Attempt, Tools
from tasks.isolation import OwnProcesses
from tasks.lease import Lease
from tasks.stack import LlamaStack
from tasks.tools.sandbox import Limits, Sandbox

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 30
HAND_OVER_SECONDS = 8


class Runtime:
    """Start it in the process that runs turns, never before a fork. `limit`: how many turns it may run at once.

    `own_processes`: run turns that may have crashed their workers. Without it all run here: there are no neighbours.
    """

    def __init__(
        self,
        settings: Settings,
        limit: Callable[[], int] = lambda: 1,
        own_processes: OwnProcesses | None = None,
        *,
        upkeep: bool = True,
    ) -> None:
        self._settings = settings
        self._limit = limit
        self._own_processes = own_processes
        self._isolated_from = isolated_from(settings.max_worker_losses)
        self._does_upkeep = upkeep
        self._upkeep: Upkeep | None = None
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="turns", daemon=True)
        self._running: dict[str, Attempt] = {}
        self._tool_requests: dict[str, asyncio.Task[Answer]] = {}
        self._claiming: Counter[str] = Counter()  # a turn may be asked for twice at once
        self._calls: set[Future[str]] = set()
        self._owned_unknown: set[str] = set()
        self._stopping = False
        self._draining: asyncio.Task[None] | None = None
        self._to_ring: list[Callable[[], object]] | None = None
        self._hurry = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._disowning: set[asyncio.Task[None]] = set()
        self._registry_version = -1
        self._refreshing = asyncio.Lock()

    def start(self) -> None:
        """Comes up wholly, Llama Stack included. Raises Unavailable, or what the Llama Stack raises."""
        self._thread.start()
        self._store = Store(self._settings.sqlalchemy_url, pool_size=self._settings.database_pool_size, name="worker")
        self._doorbell = Doorbell()
        self._sync_log = SyncLog(self._settings.redis_url.get_secret_value())
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_TIMEOUT_SECONDS)
        settle_memory()  # takes a good part of a short lease
        self._lease = Lease(self._settings, self._loop, on_renewed=self._renewed, on_lost=self._drop_all)
        self._lease.register()
        self._lease.start()
        if self._does_upkeep:
            self._upkeep_store = Store(
                self._settings.sqlalchemy_url,
                pool_size=1,
                name="worker-upkeep",
                transaction_seconds=Upkeep.TRANSACTION_SECONDS,
            )
            self._upkeep = Upkeep(self._settings, Endings(self._upkeep_store, self._sync_log, self._doorbell), self)
            self._upkeep.start()
        logger.info("worker process %s is ready", self._lease.name_of_process)

    async def _start(self) -> None:
        self._log = EventLog(self._settings.redis_url.get_secret_value())
        self._stack = await LlamaStack.start(self._settings)
        self._sandbox = Sandbox(Limits.of(self._settings), self._settings.sandbox_max_at_once)
        self._background = [
            asyncio.create_task(self._touch(), name="touch"),
            asyncio.create_task(hear_cancellations(self._log, self._cancel), name="cancellations"),
        ]

    def run(self, turn_id: str) -> str:
        """Runs a turn if it can be claimed, and waits for it; gives how that went, for the task's log line."""
        return self._wait_for(self._run(turn_id))

    def run_tool_request(self, request_id: str) -> str:
        """The same, for a request to the tool runtime."""
        return self._wait_for(self._run_tool_request(request_id))

    def _wait_for(self, run: Coroutine[Any, Any, str]) -> str:
        call = asyncio.run_coroutine_threadsafe(run, self._loop)
        self._calls.add(call)
        try:
            return call.result()
        except CancelledError:
            return "left behind: this worker has stopped"
        finally:
            self._calls.discard(call)

    def room(self) -> int:
        """How many more turns this process may run now."""
        return 0 if self._stopping else max(0, self._limit() - self._claiming.total())

    def run_unrung(self, turn_id: str) -> None:
        """Claims and runs a turn that no message came for, and does not wait for it."""
        logger.info("turn %s is taken without a message: the broker is down (CELERY_BROKER_URL)", turn_id)
        asyncio.run_coroutine_threadsafe(self._run(turn_id), self._loop)

    def run_tool_unrung(self, request_id: str) -> None:
        """The same, for a request to the tool runtime."""
        logger.info("tool request %s is taken without a message: the broker is down (CELERY_BROKER_URL)", request_id)
        asyncio.run_coroutine_threadsafe(self._run_tool_request(request_id), self._loop)

    def drain(self, *, at_once: bool = False, ring_at_stop: bool = False) -> None:
        """Takes no more turns, and hands over each running one at the end of its step, at the latest after
        `DRAIN_SECONDS`, or all at once. Returns before that is done (`stop` waits); may be called in a signal handler.

        `ring_at_stop`: this process still gets messages, so nobody is rung before it gets no more.
        """
        self._loop.call_soon_threadsafe(self._start_draining, at_once, ring_at_stop)

    def stop(self) -> None:
        """Drains, then ends everything."""
        self.drain()
        try:
            if self._upkeep is not None:
                self._upkeep.stop()
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(
                self._settings.drain_seconds + STOP_TIMEOUT_SECONDS
            )
        finally:
            self._close()

    def _close(self) -> None:
        self._lease.stop()
        self._store.close()
        if self._upkeep is not None:
            self._upkeep_store.close()
        self._sync_log.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        for call in list(self._calls):
            call.cancel()  # nothing runs it any more, and a thread waits for it

    async def _stop(self) -> None:
        assert self._draining is not None
        await self._draining
        for ring in self._to_ring or ():
            await asyncio.to_thread(ring)
        for task in self._background:
            task.cancel()
        await self._stack.close()
        await self._log.close()

    def _start_draining(self, at_once: bool, ring_at_stop: bool) -> None:
        if at_once:
            self._hurry.set()
        if ring_at_stop and self._to_ring is None:
            self._to_ring = []
        if self._draining is None:
            self._stopping = True
            self._draining = asyncio.create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        count, within = self._claiming.total(), self._settings.drain_seconds
        logger.info("draining: %d turns are handed over within %g s (DRAIN_SECONDS)", count, within)
        self._hand_over(signal.SIGTERM)
        if await self._is_idle(self._settings.drain_seconds, unless=self._hurry):
            return
        self._hand_over(signal.SIGQUIT, now=True)
        if await self._is_idle(HAND_OVER_SECONDS):
            return
        logger.warning("%d turns cannot be handed over: others take them when the lease is over", len(self._running))
        self._drop_all()
        if self._own_processes is not None:
            self._own_processes.stop(signal.SIGKILL)
        await self._is_idle(HAND_OVER_SECONDS)

    def _hand_over(self, to_own_processes: signal.Signals, *, now: bool = False) -> None:
        for attempt in self._running.values():
            attempt.hand_over(now=now)
        if now:
            self._leave_tool_requests()
        if self._own_processes is not None:
            self._own_processes.stop(to_own_processes)

    async def _is_idle(self, within_seconds: float, *, unless: asyncio.Event | None = None) -> bool:
        """Waits until nothing is claimed or run here, or `unless` is set."""
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, unless) if event is not None]
        await asyncio.wait(waits, timeout=within_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return not self._claiming

    async def _run(self, turn_id: str) -> str:
        if self._stopping:
            return await self._leave_to_others(turn_id)
        with self._counted(turn_id):
            return await self._claim_and_run(turn_id)

    @contextlib.contextmanager
    def _counted(self, identifier: str) -> Iterator[None]:
        self._claiming[identifier] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._claiming -= Counter([identifier])  # drops what is at 0
            if not self._claiming:
                self._idle.set()

    async def _run_tool_request(self, request_id: str) -> str:
        if self._stopping:
            await self._ring(partial(self._doorbell.ring_for_tool, request_id))
            return "not claimable: this worker stops"
        if request_id in self._claiming:
            return "not claimable"
        with self._counted(request_id):
            request = await tool_requests.claim(self._store, request_id, self._lease.worker_id)
            if request is None:
                return "not claimable"
            await self._keep_registry_current(request.registry_version)
            return await self._answer_tool_request(request)

    async def _answer_tool_request(self, request: ToolRequest) -> str:
        """A request that this worker cannot finish stays with it: its client is told when the lease is over.

        Whatever else happens is answered: as long as this worker lives, nobody takes the request for lost.
        """
        running = asyncio.create_task(tool_requests.answer(self._settings, self._stack, request))
        self._tool_requests[request.request_id] = running
        try:
            answer = await running
        except (Exception, asyncio.CancelledError):
            if request.request_id not in self._tool_requests:
                logger.warning("tool request %s, %s: left behind", request.request_id, request.method)
                return "left behind"
            logger.exception("tool request %s, %s: a fault of this program", request.request_id, request.method)
            answer = tool_requests.FAILED
        finally:
            self._tool_requests.pop(request.request_id, None)
        logger.info("tool request %s, %s: %d", request.request_id, request.method, answer.status)
        await tool_requests.finish(self._store, request, answer)
        return str(answer.status)

    async def _claim_and_run(self, turn_id: str) -> str:
        with turn_context(turn_id):
            claim = await self._claim(turn_id)
            if claim is None:
                return await self._run_in_own_process(turn_id)
            logger.info("claimed, attempt %d", claim.fence)
            await self._keep_registry_current(claim.registry_version)
            may_write = partial(self._lease.valid, claim.worker_id)
            tools = Tools(self._settings, self._store, self._log, self._stack, self._sandbox, may_write)
            try:
                attempt = self._running[turn_id] = attempt_of(tools, claim)
            except Exception:
                logger.exception("the turn cannot be read; it is put back, at the cost of one of its failures")
                await self._disown(turn_id, broken=True)
                return "broken"
            if self._stopping:
                attempt.hand_over()
            try:
                outcome = await attempt.run()
            finally:
                # After a lost lease this process may have claimed the turn again while the old attempt ended.
                if self._running.get(turn_id) is attempt:
                    del self._running[turn_id]
            logger.info("attempt %d: %s", claim.fence, outcome)
            if outcome == "broken":
                await self._disown(turn_id, broken=True)
            to_ring = turn_id if outcome == "handed over" else attempt.following
            if to_ring is not None:
                await self._ring(partial(self._doorbell.ring, to_ring))
            return outcome

    async def _claim(self, turn_id: str) -> Claim | None:
        limit = {} if self._own_processes is None else {"fewer_failures_than": self._isolated_from}
        timeout = self._settings.turn_timeout_seconds
        return await self._store.run(claims.claim, turn_id, self._lease.worker_id, timeout, **limit)

    async def _run_in_own_process(self, turn_id: str) -> str:
        """For a turn that cannot be claimed here: perhaps because it may have crashed its workers."""
        if self._own_processes is None or not await self._wants_process(turn_id):
            return "not claimable"
        outcome = await self._own_processes.run(turn_id, partial(self._wants_process, turn_id))
        if outcome is None and self._stopping:
            return await self._leave_to_others(turn_id)
        return outcome or "not claimable"

    async def _wants_process(self, turn_id: str) -> bool:
        return await self._store.run(claims.wants_process, turn_id, self._isolated_from)

    async def _leave_to_others(self, turn_id: str) -> str:
        """This worker got the message, so others did not."""
        await self._ring(partial(self._doorbell.ring, turn_id))
        return "not claimable: this worker stops"

    async def _ring(self, ring: Callable[[], object]) -> None:
        if self._to_ring is not None:
            self._to_ring.append(ring)
        else:
            await asyncio.to_thread(ring)

    async def _keep_registry_current(self, version: int) -> None:
        """Models, toolgroups and the like that the web process registered since are usable by this very turn."""
        async with self._refreshing:
            if version == self._registry_version:
                return
            try:
                await self._stack.refresh_registry()
                self._registry_version = version
            except Exception as error:
                logger.warning("the Llama Stack's registry cannot be read, the next turn tries again: %s", error)

    async def _touch(self) -> None:
        while True:
            await asyncio.sleep(60)
            with contextlib.suppress(RedisError, OSError):
                await self._log.touch(list(self._running))

    def _reconcile(self, owned: set[str]) -> None:
        """Puts back turns that this worker owns without running them, as after the reply to a claim was lost.

        Seen so at two renewals in a row, so that a turn that is just being claimed or has just ended is left alone.
        """
        unknown = owned - self._running.keys() - self._claiming.keys()
        for turn_id in unknown & self._owned_unknown:
            task = asyncio.create_task(self._disown(turn_id))
            self._disowning.add(task)
            task.add_done_callback(self._disowning.discard)
        self._owned_unknown = unknown

    async def _disown(self, turn_id: str, *, broken: bool = False) -> None:
        with contextlib.suppress(Unavailable):  # the next renewals try again
            queued, ended = await self._store.run(
                workers.disown,
                turn_id,
                self._lease.worker_id,
                self._settings.max_worker_losses,
                self._sync_log.raise_fence,
                broken=broken,
            )
            logger.warning("turn %s was claimed here and is not run here", turn_id)
            if queued:
                await asyncio.to_thread(self._doorbell.ring, turn_id)
            if ended:
                endings = Endings(self._store, self._sync_log, self._doorbell)
                await asyncio.to_thread(endings.announce, [ended])

    def _cancel(self, turn_id: str) -> None:
        if turn_id in self._running:
            self._running[turn_id].cancel()

    def _renewed(self, renewal: Renewal) -> None:
        for turn_id in renewal.overdue & self._running.keys():
            self._running[turn_id].expire()
        for turn_id in renewal.cancelled:
            self._cancel(turn_id)
        self._reconcile(renewal.owned)

    def _drop_all(self) -> None:
        for attempt in self._running.values():
            attempt.drop()
        self._leave_tool_requests()

    def _leave_tool_requests(self) -> None:
        while self._tool_requests:
            self._tool_requests.popitem()[1].cancel()


_current: Runtime | None = None


def start(settings: Settings, limit: Callable[[], int] = lambda: 1, own_processes: OwnProcesses | None = None) -> None:
    """Starts this process's runtime, which runs up to `limit()` turns at once."""
    global _current
    runtime = Runtime(settings, limit, own_processes)
    runtime.start()
    _current = runtime


def current() -> Runtime:
    if _current is None:
        raise CaravanError("this process runs no turns: start it as `celery -A tasks worker`")
    return _current


def drain(*, at_once: bool = False, ring_at_stop: bool = False) -> None:
    """Lets this process's runtime hand its turns over, if it has one; may be called in a signal handler."""
    if _current is not None:
        _current.drain(at_once=at_once, ring_at_stop=ring_at_stop)


def stop() -> None:
    """Stops this process's runtime, if it has one."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def info() -> dict[str, Any]:
    """For `celery inspect stats`."""
    return {"threads": threading.active_count(), "turns": len(current()._running) if _current else 0}
