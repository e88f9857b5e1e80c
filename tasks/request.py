"""A turn's task as the worker's main process sees it: what revoking it means, and what a cold shutdown does to it.

Loaded by Celery in workers only, by the name that the task gives (`Task.Request`).
"""

from __future__ import annotations

import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import signals
from celery.worker.request import Request

from app.dispatch import RUN_TURN
from app.domain.errors import Unavailable
from app.endings import open_endings
from app.settings import get_settings

logger = logging.getLogger(__name__)

# The main process must go on hearing Celery, so it cancels in a thread: one, as revoking is rare.
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="revoke")


class TurnRequest(Request):
    """Celery's request of `run_turn`, whose only argument is the turn's id."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """`revoke --terminate` and Flower's Terminate: cancels the one turn, wherever it is; no process is signalled.

        In Celery's own way a prefork child would be killed, and its lease and the turn's place with it.
        """
        _thread.submit(_cancel, self.args[0])

    def cancel(self, pool: Any, signal_: Any = None, emit_retry: bool = True) -> None:
        """Celery asks for this in a cold shutdown only: the turn is handed over at once."""
        if self.time_start:
            pool.terminate_job(self.worker_pid, signal.SIGQUIT)

    def send_event(self, type: str, **fields: Any) -> None:
        """A cancelled turn's task shows as revoked, whoever cancelled it; to Celery it has returned like any other."""
        if type == "task-succeeded" and fields.get("result") == repr("cancelled"):
            super().send_event("task-revoked", terminated=True, signum=None, expired=False)
        else:
            super().send_event(type, **fields)


class ToolRequest(TurnRequest):
    """Celery's request of `run_tool_request`. Its client waits, so it cannot be revoked: it ends by itself, in time."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        logger.warning("tool request %s goes on: only turns are cancelled by revoking their tasks", self.args[0])


@signals.task_revoked.connect
def _revoked_before_it_started(sender: Any, request: Any, **_: object) -> None:
    """The worker drops the message. Upkeep would ring again for the turn, so it is cancelled."""
    if sender.name == RUN_TURN:
        _thread.submit(_cancel, request.args[0])


def _cancel(turn_id: str) -> None:
    """As POST …/cancel does. With connections of its own: a prefork child must not inherit any."""
    with open_endings(get_settings(), "revoke") as endings:
        try:
            status = endings.cancel(turn_id)
            logger.info("turn %s is to be cancelled: its task was revoked; it was found %s", turn_id, status or "gone")
        except Unavailable as error:
            logger.warning("turn %s is not cancelled, though its task was revoked: %s", turn_id, error)
        except Exception:
            logger.exception("turn %s is not cancelled, though its task was revoked", turn_id)
