"""The turn pool: one process, one event loop, every turn a coroutine on it.

    CELERY_CUSTOM_WORKER_POOL=tasks.pool:TurnPool celery -A tasks worker -P custom --autoscale=500,10

A task's request waits for its turn in a thread that does nothing else, through Celery's own tracer, so that signals,
events and Flower work as in any pool (docs/decisions/0003). Growing and shrinking move a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery.concurrency.base import BasePool, apply_target

from app.settings import get_settings
from tasks import runtime
from tasks.isolation import OwnProcesses


class TurnPool(BasePool):
    """Runs up to `limit` turns at once in this process."""

    limit: int
    body_can_be_buffer = True
    signal_safe = False
    task_join_will_block = False

    def on_start(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=self.limit, thread_name_prefix="request")
        runtime.start(get_settings(), lambda: self.limit, OwnProcesses())

    def on_stop(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        runtime.stop()
        self._executor.shutdown(wait=True)

    on_terminate = on_stop

    def grow(self, n: int = 1) -> None:
        self.limit += n
        self._executor._max_workers = self.limit

    def shrink(self, n: int = 1) -> None:
        self.limit = max(1, self.limit - n)
        self._executor._max_workers = self.limit

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        **_: Any,
    ) -> None:
        self._executor.submit(apply_target, target, args or (), kwargs or {}, callback, accept_callback)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Asked for in a cold shutdown, for each request: all turns are handed over at once."""
        runtime.drain(at_once=True)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return info | {"max-concurrency": self.limit, "processes": [os.getpid()], **runtime.info()}
