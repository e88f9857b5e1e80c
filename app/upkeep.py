"""What every process, web or worker, does every few seconds. There is no leader: rows are taken by SKIP LOCKED.

It finds dead workers and takes their turns, rings claimable turns again, ends turns that waited too long, and deletes
what was marked deleted. Nobody reaps within one lease of Postgres's start, of his own first look, or of a slow or
failed query of his own: he cannot tell a dead worker from an outage.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Concatenate, Protocol

from app.domain.errors import TurnFailure, Unavailable
from app.endings import CANCELLED, Endings
from app.settings import Settings
from app.store import Connection, admission, agents, tool_requests, workers

logger = logging.getLogger(__name__)

DELETED_GRACE_SECONDS = 30
PURGE_BATCH = 100


class Runner(Protocol):
    """Runs turns in this process: a worker's."""

    def room(self) -> int:
        """How many more turns it has room for."""

    def run_unrung(self, turn_id: str) -> None:
        """Claims and runs a turn that no message came for."""

    def run_tool_unrung(self, request_id: str) -> None:
        """The same, for a request to the tool runtime."""


class Upkeep(threading.Thread):
    """A daemon thread; `stop` ends it. `runner`: in a worker, takes turns while the broker is down.

    The store of its `endings` is its own, and has `TRANSACTION_SECONDS`.
    """

    TRANSACTION_SECONDS = 60
    """An agent with many turns takes a while to delete, and nobody waits for it."""

    def __init__(self, settings: Settings, endings: Endings, runner: Runner | None = None) -> None:
        super().__init__(name="upkeep", daemon=True)
        self._runner = runner
        self._settings = settings
        self._endings = endings
        self._store = endings.store
        self._stopping = threading.Event()
        self._trust_after = time.monotonic() + settings.lease_seconds

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=10)

    def run(self) -> None:
        while not self._stopping.wait(self._settings.upkeep_seconds * random.uniform(0.8, 1.2)):  # noqa: S311
            try:
                self.once()
            except Unavailable as error:
                self._distrust()
                logger.warning("upkeep waits: %s", error)
            except Exception:
                self._distrust()
                logger.exception("upkeep failed, and goes on")

    def once(self) -> None:
        """One round. Raises Unavailable."""
        if time.monotonic() >= self._trust_after:
            self._reap()
        self._end_unwanted()
        self._end_overdue()
        self._store.transact(agents.purge_deleted, DELETED_GRACE_SECONDS, PURGE_BATCH)
        self._ask(workers.forget_dead_workers)
        self._ask(admission.forget_keys, PURGE_BATCH)
        self._ask(tool_requests.forget_abandoned, self._settings.max_queue_wait_seconds)
        self._ring()

    def _ask[**P, R](self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A query that is slow only if Postgres is: then nobody is taken for dead for a while.

        What takes turns or ends them, or deletes, may be slow for other reasons: how much there is, or Redis.
        """
        started = time.monotonic()
        result = self._store.transact(query, *args, **kwargs)
        if time.monotonic() - started > self._settings.heartbeat_seconds:
            self._distrust()
        return result

    def _ring(self) -> None:
        """Rings again for what waits for a worker. While nobody can, workers with room take it without a message."""
        doorbell, waiting = self._endings.doorbell, self._endings.doorbell.waiting()
        if waiting is not None:
            for turn_id in self._ask(workers.to_ring, backing_off=waiting > 0):
                doorbell.ring(turn_id)
            for request_id in self._ask(tool_requests.to_ring, backing_off=waiting > 0):
                doorbell.ring_for_tool(request_id)
        elif self._runner:
            self._run_unrung(self._runner)

    def _run_unrung(self, runner: Runner) -> None:
        """As many as there is room for now: what is taken here takes its place a moment later."""
        if room := runner.room():
            turn_ids = self._ask(workers.to_ring, backing_off=False, at_most=room)
            for turn_id in turn_ids:
                runner.run_unrung(turn_id)
            for request_id in self._ask(tool_requests.to_ring, backing_off=False, at_most=room - len(turn_ids)):
                runner.run_tool_unrung(request_id)

    def _end_overdue(self) -> None:
        """As many turns that waited too long as there is time for in a round."""
        wait, raise_fence = self._settings.max_queue_wait_seconds, self._endings.log.raise_fence
        why: dict[str, TurnFailure] = {}

        def find() -> list[str]:
            found = dict(self._ask(workers.overdue, wait))
            why.update(found)
            return list(found)

        for turn_id in self._some(find, self._settings.upkeep_seconds):
            ended = self._store.transact(workers.end_overdue, turn_id, wait, raise_fence)
            if ended:
                logger.warning("turn %s failed: %s", turn_id, why[turn_id])
                self._endings.announce([ended])

    def _end_unwanted(self) -> None:
        """Turns whose end was asked for: as many as there is time for in a round."""
        for turn_id in self._some(lambda: self._ask(workers.unwanted), self._settings.upkeep_seconds):
            ended = self._store.transact(workers.end_unwanted, turn_id, CANCELLED, self._endings.log.raise_fence)
            if ended:
                self._endings.announce([ended])

    def _some(self, find: Callable[[], list[str]], within_seconds: float = math.inf) -> Iterator[str]:
        """The turns that `find` gives, a batch at a time, until it gives nothing new or time is up.

        Each batch in an order of this process's own, as others go through the same one now.
        """
        deadline, seen = time.monotonic() + within_seconds, set[str]()
        while found := [turn_id for turn_id in find() if turn_id not in seen]:
            seen.update(found)
            random.shuffle(found)
            for turn_id in found:
                if time.monotonic() > deadline:
                    return
                yield turn_id

    def _reap(self) -> None:
        dead = self._store.transact(self._mark_dead_unless_slow, time.monotonic())
        if dead:
            logger.warning("%d worker processes are dead: their leases ran out", dead)
        for turn_id in self._some(lambda: self._ask(workers.orphans)):
            self._take(turn_id)

    def _take(self, turn_id: str) -> None:
        queued, ended = self._store.transact(
            workers.take_from_dead, turn_id, self._settings.max_worker_losses, self._endings.log.raise_fence
        )
        if queued:
            logger.warning("turn %s lost its worker and is queued again", queued)
            self._endings.doorbell.ring(queued)
        if ended:
            logger.warning("turn %s lost its worker and has ended", turn_id)
            self._endings.announce([ended])

    def _mark_dead_unless_slow(self, connection: Connection, started: float) -> int:
        """A reap whose own statement was slow is rolled back: leases may have been renewed behind the same delay."""
        dead = workers.mark_dead(connection, self._settings.lease_seconds)
        if time.monotonic() - started > self._settings.heartbeat_seconds:
            raise Unavailable("Postgres answers slowly, so nobody is taken for dead")
        return dead

    def _distrust(self) -> None:
        self._trust_after = time.monotonic() + self._settings.lease_seconds
