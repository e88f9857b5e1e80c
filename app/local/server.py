"""One server as a process of its own: started, watched for readiness, stopped, and gone when we are."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

HOST = "127.0.0.1"
PORTS = range(20_000, 32_000)
"""Where `free_port` looks: outside the range that outgoing connections take."""

_given: set[int] = set()
_POLL_SECONDS = 0.01
_LAUNCH = Path(__file__).with_name("launch.py")
_TAIL_BYTES = 4000


class LocalError(Exception):
    """A part cannot start or died. The message says which and why, in one line or with the end of its output."""


def free_port() -> int:
    """A free TCP port of the loopback, each time another one: who gets it may listen there only later.

    In the range that outgoing connections take, such a connection could come first; and a client that keeps connecting
    to a server that is down can end up connected to itself.
    """
    for port in random.sample(PORTS, len(PORTS)):
        if port not in _given and not port_in_use(port):
            _given.add(port)
            return port
    raise LocalError(f"no free port between {PORTS.start} and {PORTS.stop}")


def port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def answers_http(url: str) -> bool:
    """Whether a GET is answered with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310  # http, built here
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def spawn(
    command: Sequence[str | Path],
    *,
    death_signal: signal.Signals = signal.SIGKILL,
    account: str = "",
    environment: Mapping[str, str] | None = None,
    output: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a command as leader of its own session and process group.

    On Linux it gets `death_signal` when the thread that called this ends.
    """
    launcher = [sys.executable, "-S", "-E", _LAUNCH, os.getpid(), int(death_signal), account]
    return subprocess.Popen(
        [str(part) for part in (*launcher, *command)],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        start_new_session=True,
    )


def end_group(process: subprocess.Popen[bytes], stop_signal: signal.Signals, grace_seconds: float) -> None:
    """Asks the process to end, waits for it, then kills what is left of its group."""
    if process.poll() is None:
        process.send_signal(stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Server(ABC):
    """A process with a name and a readiness; a context manager that starts and stops it.

    Its output goes to `log`, unless `launch` is told otherwise.
    """

    name: str
    log: Path
    stop_signal = signal.SIGTERM
    grace_seconds = 15.0
    ready_seconds = 60.0
    account = ""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str | Path]: ...

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it serves; asked again and again, so it answers soon."""

    def environment(self) -> Mapping[str, str]:
        """What its environment has beside ours."""
        return {}

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """What has to be done before each start."""

    @property
    def pid(self) -> int | None:
        """None while it is down."""
        return self._process.pid if self._process else None

    @property
    def status(self) -> int | None:
        """The exit status of a process that ended by itself; negative: by that signal."""
        return self._process.poll() if self._process else None

    def launch(self, output: int | None = None) -> subprocess.Popen[bytes]:
        """Starts the process without waiting for its readiness."""
        if self._process:
            raise RuntimeError(f"{self.name} runs already")
        self.prepare()
        if output is not None:
            self._process = self._spawn(output)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._process = self._spawn(log)
        return self._process

    def _spawn(self, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
        return spawn(
            self.command(),
            death_signal=self.stop_signal,
            account=self.account,
            environment=self.environment(),
            output=output,
        )

    def start(self) -> None:
        """Starts the process and returns when it is ready. Raises LocalError: it ended, or was not ready in time."""
        self.launch()
        deadline = time.monotonic() + self.ready_seconds
        while self.status is None and time.monotonic() < deadline:
            if self.is_ready():
                return
            time.sleep(_POLL_SECONDS)
        problem = self.problem()
        self.kill()
        raise LocalError(f"{problem}\n{self.log_tail()}")

    def problem(self) -> str:
        """Why it is not ready, in a line."""
        if self.status is None:
            return f"{self.name} was not ready within {self.ready_seconds:g} s"
        return f"{self.name} ended {ending(self.status)}"

    def stop(self) -> None:
        """Ends it in order; nothing to do if it is down."""
        if process := self._process:
            end_group(process, self.stop_signal, self.grace_seconds)
            self._process = None

    def kill(self) -> None:
        """An outage: ends it and its group at once; nothing to do if it is down."""
        if process := self._process:
            self.hurry()
            process.wait()
            self._process = None

    def hurry(self) -> None:
        """Kills the process that another thread's `stop` waits for."""
        if process := self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Comes up again under the same URL, after a kill or instead of one."""
        self.kill()
        self.start()

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-_TAIL_BYTES:] if self.log.exists() else ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ModelServer(Server):
    """One of ours that serves as OpenAI does: `python -m MODULE --port N`; `url` ends in `/v1`."""

    module: str
    grace_seconds = 2.0  # it holds nothing that needs an orderly end

    def __init__(self, directory: Path, port: int | None = None) -> None:
        super().__init__()
        self.port = port or free_port()
        self.log = directory / f"{self.name}.log"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-m", self.module, "--port", str(self.port)]

    def is_ready(self) -> bool:
        return answers_http(f"http://{HOST}:{self.port}/health")


def ending(status: int) -> str:
    """An exit status in words."""
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
