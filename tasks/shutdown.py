"""How a worker stops, in both pools: it leaves the queue first, then its turns are handed over.

A worker that still took messages would take the doorbells of the very turns that it hands over.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from celery import bootsteps
from kombu.common import ignore_errors

DRAIN = signal.SIGUSR2
"""Tells a prefork child to hand its turn over; neither Celery nor billiard uses it in children."""

EXIT_SECONDS = 0.2
"""A child that was told to exit in mid-turn first passes the outcome of its task to the parent."""


class HandOver(bootsteps.StartStopStep):
    """Stopped after the consumer and before the pool."""

    requires = ("celery.worker.components:Pool",)

    def stop(self, worker: Any) -> None:
        self.terminate(worker)
        for pid in worker.pool.info["processes"]:
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, DRAIN)

    def terminate(self, worker: Any) -> None:
        """Ends the wait for messages: what it brings after all goes back, as does what has not been started here.

        The consumer only forgets its queue when it stops. Redis would go on serving the command it had sent.
        """
        consumer = worker.consumer.task_consumer
        if consumer is not None:
            ignore_errors(worker.consumer, consumer.channel.close)


@contextmanager
def turn_in_child() -> Iterator[None]:
    """In a prefork child, around its turn: SIGTERM lets it be handed over at the end of its step, SIGQUIT at once.

    Then the child exits. Between turns, billiard's own handlers make it exit. In the turn pool, nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []

    def hear(number: int, _frame: FrameType | None) -> None:
        from tasks import runtime

        told.append(number)
        runtime.drain(at_once=number == signal.SIGQUIT, ring_at_stop=True)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if told:
            threading.Timer(EXIT_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()
