"""The task `run_turn`, and what a prefork child does when it comes and goes."""

import logging
import os

from celery import signals

from app.dispatch import RUN_TURN
from app.settings import get_settings
from tasks import celery, runtime

logger = logging.getLogger(__name__)


@celery.task(name=RUN_TURN, ignore_result=True)
def run(turn_id: str) -> str:
    """Claims the turn and runs it to the end of its leg. A doorbell rung twice, late or for nothing does no harm."""
    return runtime.current().run(turn_id)


@signals.worker_process_init.connect
def _child_starts(**_: object) -> None:
    """A prefork child takes no task before this returns."""
    try:
        runtime.start(get_settings())
    except BaseException:
        # Celery would log this and let the child take tasks that it cannot run.
        logger.exception("this worker process cannot start")
        os._exit(1)


@signals.worker_process_shutdown.connect
def _child_stops(**_: object) -> None:
    runtime.stop()
