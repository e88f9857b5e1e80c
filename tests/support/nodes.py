"""pytest-celery nodes that wrap local processes: its containers need Docker, its nodes do not.

`worker_node` gives a `CeleryTestWorker` whose `kill`, `restart`, `logs` and `ready` act on a `celery -A tasks worker`
process, started as README shows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
from celery import Celery
from pytest_celery import CeleryTestContainer, CeleryTestWorker

from app.local.server import free_port
from tests.support import wait_until

ROOT = Path(__file__).parents[2]
TURN_POOL = ("-P", "custom", "--autoscale=500,10")
PREFORK = ("--autoscale=8,2",)
READY_SECONDS = 120
LAUNCH = ROOT / "app" / "local" / "launch.py"


class Process:
    """A process of its own group, its output in a file; started from the repository's root."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, ready_prompt: str) -> None:
        self.name = name
        self.command = [sys.executable, "-m", *command]
        self.env = {**os.environ, **env}
        self.log = log
        self.ready_prompt = ready_prompt
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._from = self.log.stat().st_size if self.log.exists() else 0
        dies_with_this = (sys.executable, "-S", "-E", str(LAUNCH), str(os.getpid()), str(int(signal.SIGKILL)), "")
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*dies_with_this, *self.command],
                cwd=ROOT,
                env=self.env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def output(self) -> str:
        """What it has printed since its last start."""
        return self.log.read_bytes()[self._from :].decode(errors="replace") if self.log.exists() else ""

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_ready(self) -> None:
        def ready() -> bool:
            if not self.running():
                raise AssertionError(f"{self.name} ended while starting:\n{self.output()}")
            return self.ready_prompt in self.output()

        try:
            wait_until(ready, READY_SECONDS)
        except TimeoutError:
            raise AssertionError(f"{self.name} was not ready in {READY_SECONDS} s:\n{self.output()}") from None

    def signal(self, number: int) -> None:
        """Signals the process itself, not its children."""
        os.kill(self.pid, number)

    def kill_all(self) -> None:
        """SIGKILL for the process and all its children at once."""
        process = self._process  # a keeper may start the next as soon as this has ended
        if process is not None:
            kill(self._descendants())
            process.kill()
            process.wait()

    def children(self) -> list[int]:
        return [child.pid for child in self._descendants()]

    def _descendants(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):  # it may end, and be waited for, at any time
            return psutil.Process(self.pid).children(recursive=True) if self.running() else []
        return []

    def wait_ended(self, timeout: float = 60) -> int:
        assert self._process is not None
        return self._process.wait(timeout)

    def stop(self, timeout: float = 30) -> None:
        """SIGTERM, then SIGKILL to all that is left."""
        if self._process is None or not self.running():
            return
        children = self._descendants()
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        kill(children)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Those that still are."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


class ProcessContainer(CeleryTestContainer):
    """What `CeleryTestNode` asks of a container, done with a process."""

    def __init__(self, process: Process, broker_url: str) -> None:
        self._process = process
        self._broker_url = broker_url

    @property
    def process(self) -> Process:
        return self._process

    @property
    def name(self) -> str:
        return self._process.name

    @property
    def id(self) -> str:
        return f"{self._process.pid:012d}"

    @property
    def status(self) -> str:
        return "running" if self._process.running() else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self._broker_url, "host_url": self._broker_url}

    @property
    def ready_prompt(self) -> str:
        return self._process.ready_prompt

    def ready(self) -> bool:
        self._process.wait_ready()
        return True

    def logs(self) -> str:
        return self._process.output()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        if signal == "SIGKILL":
            self._process.kill_all()
        else:
            self._process.signal(getattr(__import__("signal"), signal) if isinstance(signal, str) else signal)
            self._process.wait_ended()

    def reload(self, attrs: Any = None) -> None:
        """A process has no cached state to load again."""

    def restart(self, timeout: int = 30) -> None:
        self._process.stop(timeout)
        self._process.start()
        self._process.wait_ready()

    def teardown(self) -> None:
        self._process.stop()


def web_process(env: Mapping[str, str], log: Path, *options: str) -> tuple[str, Process]:
    """(its URL, a web process on a port of its own, with uvicorn's options), not started yet."""
    port = free_port()
    command = ["uvicorn", "app:main", "--port", str(port), *options]
    return f"http://127.0.0.1:{port}", Process("web", command, env, log, "Uvicorn running on")


def worker_process(pool: Sequence[str], env: Mapping[str, str], log: Path, *, name: str = "worker") -> Process:
    """A worker with the given pool's options, not started yet."""
    custom = {"CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TurnPool"} if "custom" in pool else {}
    command = ["celery", "-A", "tasks", "worker", *pool, "-l", "info", "-n", f"{name}@%h"]
    return Process(name, command, {**env, **custom}, log, "ready.")


def worker_node(
    pool: Sequence[str], env: Mapping[str, str], log: Path, app: Celery, *, name: str = "worker"
) -> CeleryTestWorker:
    """A worker with the given pool's options, started; wait for it with `node.ready()`."""
    process = worker_process(pool, env, log, name=name)
    process.start()
    return CeleryTestWorker(ProcessContainer(process, env["REDIS_URL"]), app)


def wait_for_children(process: Process, count: int, timeout: float = READY_SECONDS) -> None:
    """Waits until a prefork worker has so many children that are ready."""
    deadline = time.monotonic() + timeout
    wait_until(lambda: process.output().count("is ready") >= count, max(0.1, deadline - time.monotonic()))
