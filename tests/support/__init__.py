"""What tests of several kinds share: real servers that stand in for the world outside.

Each server is a module that runs by `python -m`, prints one line `ready <its URL>`, and has `/control/`
routes beside its own. Its class starts it as a subprocess, so that its CPU is not the test's. Nothing here knows a
test, and nothing here is imported by the product.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from app.local.server import free_port

ROOT = Path(__file__).parents[2]
CONTROL_SECONDS = 60.0
PATIENCE_SECONDS = 60.0
"""For what takes no time on a quiet machine."""

PR_SET_PDEATHSIG = 1


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE_SECONDS, every: float = 0.01) -> None:
    """Returns as soon as the condition holds; raises TimeoutError (seconds). It blocks: off the event loop, please."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {condition}")
        time.sleep(every)


def exit_with_parent() -> None:
    """Ends this process when its parent does, so that a killed test run leaves no server behind.

    The end of standard input tells, which is the parent's pipe; on Linux its death signal does too, because a process
    that the parent has forked keeps that pipe open. Call it before any thread starts.
    """
    if sys.platform == "linux":
        _exit_at_parents_death_signal()

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _exit_at_parents_death_signal() -> None:
    """The signal comes when the *thread* that started this process ends, hence the second look at the parent."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)

    def watch() -> None:
        while os.getppid() == parent:
            signal.sigwait({signal.SIGUSR1})
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class ServerProcess:
    """A module of this package that runs as a server in a process of its own, on one port for its whole life.

    Its methods are synchronous and take about a millisecond, except those that say that they wait.
    """

    module: ClassVar[str]

    def __init__(self, port: int = 0, host: str = "127.0.0.1", options: Sequence[str] = ()) -> None:
        """Port 0 takes a free one, which a restart keeps."""
        self.port = port or free_port()
        self.host = host
        self.url = ""
        self._options = tuple(options)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int | None:
        """None while it is down."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Returns when the server listens."""
        if self._process:
            raise RuntimeError(f"{self.module} runs already")
        command = [sys.executable, "-m", self.module, "--host", self.host, "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--exit-with-parent", *self._options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        ready = self._process.stdout.readline()
        if not ready:
            self.kill()
            raise RuntimeError(f"{self.module} did not start: see its standard error")
        self.url = ready.split()[-1]
        self.port = urlsplit(self.url).port or 0

    def kill(self) -> None:
        """An outage: connections break, and new ones are refused. Nothing to do if it is down already."""
        if process := self._process:
            self._process = None
            process.kill()
            process.communicate()

    def restart(self) -> None:
        """Comes up on the same port, after a kill or instead of one."""
        self.kill()
        self.start()

    def control(self, method: str, path: str, body: Any = None) -> Any:
        """Asks one control route; question and answer are JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=CONTROL_SECONDS)
        try:
            connection.request(method, f"/control/{path}", json.dumps(body) if body is not None else None)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{method} /control/{path}: {response.status} {answer!r}")
        return json.loads(answer)
