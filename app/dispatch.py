"""Rings the doorbell: sends `run_turn` by its name, with a turn's id and nothing else. `app` never imports `tasks`."""

from __future__ import annotations

import logging
import threading
import time

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

RUN_TURN = "tasks.turns.run_turn"
QUEUE = "caravan.turns"

CONNECT_TIMEOUT_SECONDS = 1
SILENT_SECONDS = 2.0
"""After a failure nobody tries to ring for so long: upkeep rings what was missed."""

logger = logging.getLogger(__name__)


class Doorbell:
    """Sends task messages over one connection to the broker; safe to use from several threads."""

    def __init__(self) -> None:
        self._celery = Celery("caravan")
        self._celery.config_from_object("celeryconfig")
        # Whoever rings is asked to be quick, and need not succeed: no waiting, no tries.
        self._celery.conf.broker_connection_timeout = CONNECT_TIMEOUT_SECONDS
        self._celery.conf.broker_transport_options |= {"max_retries": 0, "interval_start": 0, "interval_step": 0}
        self._lock = threading.Lock()
        self._silent_until = 0.0

    def ring(self, turn_id: str, traceparent: str | None = None) -> bool:
        """Tells the workers that a turn waits. False: the broker is down; upkeep rings again."""
        if time.monotonic() < self._silent_until:
            return False
        headers = {"traceparent": traceparent} if traceparent else None
        try:
            with self._lock:
                self._celery.send_task(RUN_TURN, args=[turn_id], queue=QUEUE, headers=headers, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            self._silent_until = time.monotonic() + SILENT_SECONDS
            logger.warning("turn %s: the broker is not available (CELERY_BROKER_URL), upkeep rings: %s", turn_id, error)
            return False
        return True

    def close(self) -> None:
        self._celery.close()
