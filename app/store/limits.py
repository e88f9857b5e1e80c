"""A time limit for work on Postgres connections, because libpq has none once it is connected.

A server that hangs (a stopped process, a network that swallows packets without a word) keeps libpq waiting for ever:
the kernel at the other end may still acknowledge, so that neither keepalives nor `tcp_user_timeout` notice. When time
is up, a thread shuts the connection's socket down; libpq then reports a lost connection to the thread that waits. So
only the thread that works on a connection ever decides what becomes of its transaction; nobody gives up behind its
back while it goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any


class Limit:
    """One piece of work, of one thread, with its deadline (`time.monotonic`) and the connections that it uses."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.over = False
        self._lock = threading.Lock()
        self._sockets: list[int] = []

    def watch(self, connection: Any) -> None:
        """Holds a psycopg2 connection to this limit; at once, if time is up already.

        Keeps a descriptor of its own: libpq may close its one at any moment, and the number may be given to another.
        """
        with self._lock:
            self._sockets.append(os.dup(connection.fileno()))
            if self.over:
                self._cut()

    def expire(self) -> None:
        with self._lock:
            self.over = True
            self._cut()

    def _cut(self) -> None:
        for descriptor in self._sockets:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as used:
                used.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._sockets:
                os.close(descriptor)
            self._sockets.clear()


class Watchdog:
    """Enforces the limits of a pool's threads, from one daemon thread, which sleeps while there is none."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._limits: set[Limit] = set()
        self._wakes_at = math.inf
        self._closed = False
        self._of_thread = threading.local()
        self._name = name
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[Limit]:
        """Everything that the calling thread asks Postgres inside, on connections given to `watch`, ends by then."""
        limit = self._of_thread.limit = Limit(time.monotonic() + seconds)
        with self._changed:
            self._limits.add(limit)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"watchdog-{self._name}", daemon=True)
                self._thread.start()
            if limit.deadline < self._wakes_at:
                self._changed.notify()
        try:
            yield limit
        finally:
            self._of_thread.limit = None
            with self._changed:
                self._limits.discard(limit)
            limit.close()

    def watch(self, connection: Any) -> None:
        """Holds a connection to the calling thread's limit, if it has one."""
        limit: Limit | None = getattr(self._of_thread, "limit", None)
        if limit is not None:
            limit.watch(connection)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for limit in [limit for limit in self._limits if limit.deadline <= now]:
                    self._limits.discard(limit)
                    limit.expire()
                self._wakes_at = min((limit.deadline for limit in self._limits), default=math.inf)
                self._changed.wait(self._wakes_at - now if self._limits else None)
