"""A worker process's lease: one row in Postgres, renewed by a thread with a connection of its own.

It is renewed only while the event loop answers, so that a process whose loop is stuck loses its turns to another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from app.domain.errors import Unavailable
from app.settings import Settings
from app.store import Store, workers
from app.store.workers import Renewal

logger = logging.getLogger(__name__)

LEAST_PATIENCE_SECONDS = 2.0
"""A busy machine may need so long to connect."""


class Lease(threading.Thread):
    """Calls back on the loop: `on_renewed` at each renewal with what Postgres says of this worker's turns, `on_lost`
    when the lease was lost."""

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        *,
        on_renewed: Callable[[Renewal], object],
        on_lost: Callable[[], object],
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._settings = settings
        self._loop = loop
        self._on_renewed = on_renewed
        self._on_lost = on_lost
        # Half a lease: a renewal that gets no answer is given up in time for another one, on a new connection.
        patience = max(LEAST_PATIENCE_SECONDS, settings.lease_seconds / 2)
        self._store = Store(settings.sqlalchemy_url, pool_size=1, name="lease", transaction_seconds=patience)
        self._stopping = threading.Event()
        self._loop_asked = 0.0
        self._loop_answers = threading.Event()
        self._loop_answers.set()
        self._valid_until = 0.0
        self.name_of_process = f"{socket.gethostname()}:{os.getpid()}"
        self.worker_id = ""

    def register(self) -> None:
        """Takes a new lease. Raises Unavailable."""
        worker_id, asked = str(uuid.uuid4()), time.monotonic()
        self._store.transact(workers.register, worker_id, self.name_of_process, self._settings.lease_seconds)
        self._valid_until = asked + self._settings.lease_seconds
        self.worker_id = worker_id

    def valid(self, worker_id: str) -> bool:
        """Whether nobody can have taken this incarnation of the worker for dead yet, by this process's own clock."""
        return worker_id == self.worker_id and time.monotonic() < self._valid_until

    def run(self) -> None:
        next_renewal = time.monotonic() + self._settings.heartbeat_seconds
        while not self._stopping.wait(max(0.0, next_renewal - time.monotonic())):
            next_renewal = time.monotonic() + self._settings.heartbeat_seconds
            if self._loop_is_stuck():
                logger.warning("the event loop does not answer, so the lease is not renewed")
                continue
            try:
                self._renew()
            except Unavailable as error:
                logger.warning("the lease cannot be renewed: %s", error)
            except Exception:
                logger.exception("the lease cannot be renewed")

    def stop(self) -> None:
        """Ends the lease, so that others may take at once what this worker still owns."""
        self._stopping.set()
        self.join(timeout=10)
        try:
            self._store.transact(workers.retire, self.worker_id)
        except Unavailable as error:
            logger.warning("the lease cannot be ended, it runs out by itself: %s", error)
        self._store.close()

    def _loop_is_stuck(self) -> bool:
        """Whether a question has been unanswered for half a lease. Asks the next one when the last was answered."""
        now = time.monotonic()
        if not self._loop_answers.is_set():
            return now - self._loop_asked > self._settings.lease_seconds / 2
        self._loop_answers.clear()
        self._loop_asked = now
        self._loop.call_soon_threadsafe(self._loop_answers.set)
        return False

    def _renew(self) -> None:
        asked = time.monotonic()
        renewal = self._store.transact(workers.renew, self.worker_id, self._settings.lease_seconds)
        if renewal is None:
            logger.warning("the lease was lost: this worker drops its turns and registers anew")
            self._loop.call_soon_threadsafe(self._on_lost)
            self.register()
            return
        self._valid_until = asked + self._settings.lease_seconds
        self._loop.call_soon_threadsafe(self._on_renewed, renewal)
