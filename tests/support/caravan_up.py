"""`caravan up` as a person runs it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from app.local.server import free_port
from tests.support import ROOT

CARAVAN = [sys.executable, "-c", "from app.cli import main; main()"]
READY_SECONDS = 120


class Up:
    """A running `caravan up`."""

    def __init__(self, process: subprocess.Popen[str], url: str, lines: queue.SimpleQueue[str | None]) -> None:
        self.process = process
        self.url = url
        self._lines = lines
        self.children = psutil.Process(process.pid).children(recursive=True)

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def left(self) -> list[psutil.Process]:
        return [child for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def up(data: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Up]:
    """Runs until the block ends; `data` must be a folder that all may enter."""
    port, flower_port = free_port(), free_port()
    arguments = ["up", f"--data={data}", f"--port={port}", f"--flower-port={flower_port}", *options]
    process = subprocess.Popen(
        [*CARAVAN, *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    try:
        _wait_ready(lines)
        yield Up(process, f"http://127.0.0.1:{port}", lines)
    finally:
        process.terminate()
        process.wait(60)


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _wait_ready(lines: queue.SimpleQueue[str | None]) -> None:
    seen: list[str] = []
    while (line := lines.get(timeout=READY_SECONDS)) is not None:
        seen.append(line)
        if "Ctrl-C stops everything" in line:
            return
    raise AssertionError("caravan up ended:\n" + "".join(seen))
