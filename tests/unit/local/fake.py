"""A server of these tests' own: a Python program that the test writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from app.local.server import Server

SERVES = "import pathlib, time; pathlib.Path({ready!r}).write_text(str(__import__('os').getpid())); time.sleep(600)"


class Fake(Server):
    """Ready when it has written its pid to `<directory>/<name>.ready`."""

    def __init__(self, name: str, directory: Path, program: str = SERVES) -> None:
        super().__init__()
        self.name = name
        self.log = directory / f"{name}.log"
        self.ready_file = directory / f"{name}.ready"
        self._program = program.replace("{ready!r}", repr(str(self.ready_file)))

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-u", "-c", self._program]

    def is_ready(self) -> bool:
        return self.ready_file.exists() and bool(self.ready_file.read_text())
