"""The three programs of an installation, as children: web, worker, Flower. The same commands as in production."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from app.local.server import HOST, Server, answers_http

Pool = Literal["turns", "prefork"]
TURNS_AT_MOST, TURNS_AT_LEAST = 500, 10


class Program(Server):
    """A command in the project's own environment."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        ready: Callable[[], bool],
        environment: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.name = name
        self.log = directory / f"{name}.log"
        self._command = [sys.executable, "-m", *command]
        self._ready = ready
        self._environment = environment

    def command(self) -> Sequence[str | Path]:
        return self._command

    def environment(self) -> Mapping[str, str]:
        return {"PYTHONUNBUFFERED": "1", **self._environment}

    def is_ready(self) -> bool:
        return self._ready()


def web(directory: Path, port: int, environment: Mapping[str, str]) -> Program:
    command = ["uvicorn", "app:main", "--host", HOST, "--port", str(port)]
    environment = {"WEB_GRACE_SECONDS": "1", **environment}  # whoever presses Ctrl-C waits
    return Program("web", command, directory, lambda: answers_http(f"http://{HOST}:{port}/v1/health"), environment)


def worker(directory: Path, pool: Pool, ready: Callable[[], bool], environment: Mapping[str, str]) -> Program:
    command = ["celery", "-A", "tasks", "worker"]
    if pool == "turns":
        command += ["-P", "custom", f"--autoscale={TURNS_AT_MOST},{TURNS_AT_LEAST}"]
        environment = {**environment, "CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TurnPool"}
    else:
        command += ["-P", "prefork", f"--concurrency={os.cpu_count() or 2}"]
    program = Program("worker", command, directory, ready, environment)
    program.grace_seconds = 30.0  # it hands its turns over first (DRAIN_SECONDS)
    return program


def flower(directory: Path, port: int, environment: Mapping[str, str]) -> Program:
    command = ["celery", "-A", "tasks", "flower", f"--address={HOST}", f"--port={port}"]
    ready = f"http://{HOST}:{port}/healthcheck"
    program = Program("flower", command, directory, lambda: answers_http(ready), environment)
    program.grace_seconds = 5.0  # it only watches
    return program
