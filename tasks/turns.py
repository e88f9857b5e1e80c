"""The tasks `run_turn` and `run_tool_request`, and what a prefork child does when it comes and goes."""

import logging
import os
import signal
import sys

from celery import signals

from app.dispatch import RUN_TOOL_REQUEST, RUN_TURN
from app.domain.errors import Unavailable
from app.settings import SettingsError, get_settings
from app.store import migrate
from tasks import celery, shutdown

logger = logging.getLogger(__name__)


celery.steps["worker"].add(shutdown.HandOver)


@celery.task(name=RUN_TURN, ignore_result=True, Request="tasks.request:TurnRequest")
def run(turn_id: str) -> str:
    """Claims the turn and runs it to the end of its leg. A doorbell rung twice, late or for nothing does no harm."""
    from tasks import runtime

    with shutdown.turn_in_child():
        return runtime.current().run(turn_id)


@celery.task(name=RUN_TOOL_REQUEST, ignore_result=True, Request="tasks.request:ToolRequest")
def run_tool(request_id: str) -> str:
    """Runs a request to the tool runtime, for which its client waits. Doorbells as with turns."""
    from tasks import runtime

    with shutdown.turn_in_child():
        return runtime.current().run_tool_request(request_id)


@signals.worker_init.connect
def _worker_starts(**_: object) -> None:
    """Exits with one line if Postgres, its schema or a setting is missing.

    Imports the Llama Stack before any fork, so that children share it and come up soon.

    Not with this module: Flower and `celery inspect` import the tasks as well, and have no use for it.
    """
    try:
        migrate.require_head(get_settings().sqlalchemy_url)
        from app.stack.config import stack_run_config
        from tasks import runtime  # noqa: F401

        stack_run_config(get_settings())
    except (SettingsError, Unavailable) as error:
        sys.exit(f"caravan: {error}")


@signals.worker_process_init.connect
def _child_starts(**_: object) -> None:
    """A prefork child takes no task before this returns."""
    from tasks import runtime

    try:
        runtime.start(get_settings())
    except BaseException:
        # Celery would log this and let the child take tasks that it cannot run.
        logger.exception("this worker process cannot start")
        os._exit(1)
    signal.signal(shutdown.DRAIN, lambda *_: runtime.drain())


@signals.worker_process_shutdown.connect
def _child_stops(**_: object) -> None:
    from tasks import runtime

    # At the second signal billiard would let the child die before its lease is ended.
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    runtime.stop()
