"""A real PgBouncer in front of a Postgres, pooling by transaction."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg2
from sqlalchemy.engine import make_url

from app.local.server import HOST, Server, free_port
from tests.support import ROOT

_FETCHED = ROOT / ".tools" / "pgbouncer"


def _binary() -> Path:
    """The one that `.ci/setup` fetched, else the machine's."""
    if (fetched := _FETCHED / "usr/sbin/pgbouncer").exists():
        return fetched
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert found, "PgBouncer is missing: run .ci/setup pgbouncer, or install it (apt-get or brew install pgbouncer)"
    return Path(found)


class PgBouncer(Server):
    """`url` is `database_url` through it. At most `pool_size` connections to Postgres for one database."""

    name = "pgbouncer"

    def __init__(self, directory: Path, database_url: str, pool_size: int) -> None:
        super().__init__()
        self._target = make_url(database_url)
        self._pool_size = pool_size
        self._directory = directory
        self.port = free_port()
        self.log = directory / "pgbouncer.log"

    @property
    def url(self) -> str:
        behind = self._target.set(drivername="postgresql", port=self.port)
        return behind.render_as_string(hide_password=False)

    def prepare(self) -> None:
        users = self._directory / "users.txt"
        users.write_text(f'"{self._target.username}" "{self._target.password}"\n')
        (self._directory / "pgbouncer.ini").write_text(
            f"""[databases]
* = host={self._target.host} port={self._target.port}
[pgbouncer]
listen_addr = {HOST}
listen_port = {self.port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = transaction
default_pool_size = {self._pool_size}
max_client_conn = 200
{"user = nobody" if os.geteuid() == 0 else ""}
"""
        )

    def command(self) -> Sequence[str | Path]:
        return [_binary(), self._directory / "pgbouncer.ini"]

    def environment(self) -> Mapping[str, str]:
        folders = [str(path) for path in _FETCHED.glob("*lib/*-linux-*")] + [
            str(path) for path in _FETCHED.glob("usr/lib/*-linux-*")
        ]
        return {"LD_LIBRARY_PATH": ":".join(folders)} if folders else {}

    def is_ready(self) -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(self.url, connect_timeout=2).close()
            return True
        return False
