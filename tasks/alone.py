"""Runs one turn in this process, whatever that turn did to others: `python -m tasks.alone <turn id>`.

A worker starts it for a turn's last try (docs/decisions/0011). Its outcome goes to standard output, its log to standard
error. SIGTERM, or the end of standard input (the worker has died), hands the turn over at the end of its step; SIGQUIT
does at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

from app.domain.errors import Unavailable
from app.settings import SettingsError, get_settings
from app.telemetry import configure_logging
from tasks.runtime import Runtime

POOL_SIZE = 2
"""Postgres connections for its one turn; the lease and the Llama Stack have one each beside them."""


def main(turn_id: str) -> None:
    """Ends this process with status 0 if it said how the turn went, 1 if it could not start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on a terminal, the worker gets it as well and passes it on
    say = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no outcome
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format)
    runtime = Runtime(settings.model_copy(update={"database_pool_size": POOL_SIZE}), upkeep=False)
    runtime.start()
    _stop_when_told(runtime)
    outcome = runtime.run(turn_id)
    runtime.stop()
    with suppress(BrokenPipeError):  # the worker has died
        os.write(say, outcome.encode())


def _stop_when_told(runtime: Runtime) -> None:
    def hear(number: int, _frame: FrameType | None) -> None:
        runtime.drain(at_once=number == signal.SIGQUIT)

    def wait_for_the_end() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        runtime.drain()

    signal.signal(signal.SIGTERM, hear)
    signal.signal(signal.SIGQUIT, hear)
    threading.Thread(target=wait_for_the_end, name="parent", daemon=True).start()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (SettingsError, Unavailable) as error:
        sys.exit(f"caravan: {error}")
