"""Rings the doorbell: sends a task by its name, with an id and nothing else. `app` never imports `tasks`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu.exceptions import ChannelError, OperationalError
from redis.exceptions import RedisError

RUN_TURN = "tasks.turns.run_turn"
RUN_TOOL_REQUEST = "tasks.turns.run_tool_request"
QUEUE = "caravan.turns"

TIMEOUT_SECONDS = 1
"""For connecting, and for each answer of the broker."""

_FAILURES = (OperationalError, RedisError, OSError)

logger = logging.getLogger(__name__)


class Doorbell:
    """Sends task messages over one connection to the broker; safe to use from several threads.

    After a failure it is silent for twice the time that this took, so that a broker that hangs does not hold up
    everyone who rings, and one that is back is noticed at once: upkeep rings what was missed.
    """

    def __init__(self) -> None:
        self._celery = Celery("caravan")
        self._celery.config_from_object("celeryconfig")
        # Whoever rings is asked to be quick, and need not succeed: no waiting, no tries.
        self._celery.conf.broker_connection_timeout = TIMEOUT_SECONDS
        self._celery.conf.broker_transport_options |= {
            "socket_connect_timeout": TIMEOUT_SECONDS,
            "socket_timeout": TIMEOUT_SECONDS,
            "max_retries": 0,
            "interval_start": 0,
            "interval_step": 0,
        }
        self._lock = threading.Lock()
        self._silent_until = 0.0

    def ring(self, turn_id: str, traceparent: str | None = None) -> bool:
        """Tells the workers that a turn waits. False: the broker is down; upkeep rings again."""
        return self._send(RUN_TURN, "turn", turn_id, traceparent)

    def ring_for_tool(self, request_id: str) -> bool:
        """The same, for a request to the tool runtime."""
        return self._send(RUN_TOOL_REQUEST, "tool request", request_id)

    def _send(self, task: str, noun: str, identifier: str, traceparent: str | None = None) -> bool:
        headers = {"traceparent": traceparent} if traceparent else None
        with self._lock:
            if time.monotonic() < self._silent_until:
                return False
            try:
                with self._silence_after_failure():
                    self._celery.send_task(task, args=[identifier], queue=QUEUE, headers=headers, retry=False)
            except _FAILURES as error:
                logger.warning(
                    "%s %s: the broker is down (CELERY_BROKER_URL), upkeep rings: %s", noun, identifier, error
                )
                return False
        return True

    def waiting(self) -> int | None:
        """How many messages wait in the queue; None: the broker is down."""
        try:
            with self._lock, self._silence_after_failure(), self._celery.pool.acquire(block=True) as connection:
                return _length(connection.default_channel)
        except _FAILURES:
            return None

    @contextmanager
    def _silence_after_failure(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
            self._silent_until = 0.0
        except _FAILURES:
            self._silent_until = time.monotonic() + 2 * (time.monotonic() - started)
            raise

    def close(self) -> None:
        self._celery.close()


def _length(channel: Any) -> int:
    try:
        return int(channel.queue_declare(queue=QUEUE, passive=True).message_count)
    except ChannelError:
        return 0  # Redis has no empty lists
