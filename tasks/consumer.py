"""Celery's consumer, which connects to the broker again soon after an outage, however long that was."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

RETRY_SECONDS = 0.5
RETRY_MOST_SECONDS = 2.0


class Consumer(CeleryConsumer):
    """Celery waits 2 s before it tries to connect again, then 4 s, and up to 30 s; no setting changes that."""

    def ensure_connected(self, conn: Any) -> Any:
        conn.ensure_connection = partial(
            conn.ensure_connection,
            interval_start=RETRY_SECONDS,
            interval_step=RETRY_SECONDS,
            interval_max=RETRY_MOST_SECONDS,
        )
        return super().ensure_connected(conn)
