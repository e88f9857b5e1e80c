"""Rings the doorbell: sends `run_turn` by its name, with a turn's id and nothing else. `app` never imports `tasks`."""

from __future__ import annotations

import logging
import threading

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

RUN_TURN = "tasks.turns.run_turn"
QUEUE = "caravan.turns"

logger = logging.getLogger(__name__)


class Doorbell:
    """Sends task messages over one connection to the broker; safe to use from several threads."""

    def __init__(self) -> None:
        self._celery = Celery("caravan")
        self._celery.config_from_object("celeryconfig")
        self._lock = threading.Lock()

    def ring(self, turn_id: str, traceparent: str | None = None) -> bool:
        """Tells the workers that a turn waits. False: the broker is down; upkeep rings again."""
        headers = {"traceparent": traceparent} if traceparent else None
        try:
            with self._lock:
                self._celery.send_task(RUN_TURN, args=[turn_id], queue=QUEUE, headers=headers, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            logger.warning("turn %s: the broker is not available (CELERY_BROKER_URL), upkeep rings: %s", turn_id, error)
            return False
        return True

    def close(self) -> None:
        self._celery.close()
