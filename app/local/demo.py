"""`caravan demo`: starts everything quietly, hands it to whoever runs the turn, and stops everything."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.local.server import LocalError, free_port, port_in_use
from app.local.supervisor import LogFiles, Stopped, Supervisor
from app.local.up import Installation, Options, default_folder, locked

_TAIL_LINES = 30


def demo(main_job: Callable[[Installation], None]) -> None:
    """Raises LocalError: something is in the way, a part died, or the job failed; with the end of the parts' output."""
    options = Options(data=default_folder("demo"), port=_free(8321), flower_port=_free(5555))
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {what}", flush=True)

    tell(f"everything runs on this machine; data and logs are in {options.data}")
    with locked(options.data):
        installation = Installation(options)
        try:
            with Supervisor(LogFiles()) as supervisor:
                installation.start(supervisor, tell)
                tell("all parts are ready")
                supervisor.run(lambda: main_job(installation))
                tell("stopping everything")
        except Stopped:
            tell("stopped")
            return
        except Exception as error:  # whatever it was, the parts' last lines say more
            raise LocalError(f"{error or type(error).__name__}\n{_tails(options)}") from error
    tell("nothing is left running")


def _free(port: int) -> int:
    return free_port() if port_in_use(port) else port


def _tails(options: Options) -> str:
    """The end of each part's output."""
    logs = [log for log in sorted(options.data.glob("*.log")) if log.stat().st_size]
    tails = [(log, log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]) for log in logs]
    return "\n".join(f"--- {log} ---\n" + "\n".join(lines) for log, lines in tails)
