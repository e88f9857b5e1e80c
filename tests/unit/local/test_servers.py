"""The embedded Valkey and Postgres: real ones."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg2
import pytest

from app.local.postgres import Postgres, first_closed
from app.local.server import LocalError, free_port, port_in_use
from app.local.up import locked
from app.local.valkey import Valkey


def query(url: str, statement: str) -> object:
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone() if cursor.description else None
    finally:
        connection.close()


def test_valkey_never_evicts_and_loses_everything_in_a_crash(open_path: Path) -> None:
    with Valkey(open_path) as valkey:
        assert b"noeviction" in valkey.ask("CONFIG GET maxmemory-policy")
        valkey.ask("SET key value")
        url = valkey.url
        valkey.restart()
        assert valkey.url == url
        assert valkey.ask("GET key") == b"$-1\r\n"


def test_valkey_flush_loses_everything_at_once(open_path: Path) -> None:
    with Valkey(open_path) as valkey:
        valkey.ask("SET key value")
        valkey.flush()
        assert valkey.ask("GET key") == b"$-1\r\n"


def test_a_persistent_valkey_has_its_keys_after_an_orderly_stop(open_path: Path) -> None:
    with Valkey(open_path, persistent=True) as valkey:
        valkey.ask("SET key value")
    with Valkey(open_path, persistent=True) as valkey:
        assert valkey.ask("GET key") == b"$5\r\nvalue\r\n"


def test_postgres_has_pgvector_and_keeps_its_data(open_path: Path) -> None:
    with Postgres(open_path) as postgres:
        query(postgres.url, "CREATE EXTENSION vector")
        query(postgres.url, "CREATE TABLE kept AS SELECT 42 AS n")
        postgres.restart()  # a crash
        assert query(postgres.url, "SELECT n FROM kept") == (42,)
        postgres.stop()
        postgres.start()
        assert query(postgres.url, "SELECT n FROM kept") == (42,)
        assert (open_path / "postgres.password").stat().st_mode & 0o077 == 0
        with pytest.raises(psycopg2.OperationalError):
            query(postgres.url.replace("caravan:", "caravan:wrong"), "SELECT 1")


def test_the_outermost_closed_folder_is_found(open_path: Path) -> None:
    (open_path / "closed" / "open").mkdir(parents=True)
    for folder in (open_path, *open_path.parents[:-2]):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)
    (open_path / "closed").chmod(0o700)
    assert first_closed(open_path / "closed" / "open") == open_path / "closed"
    (open_path / "closed").chmod(0o711)
    assert first_closed(open_path / "closed" / "open") is None


def test_a_data_folder_serves_one_installation_at_a_time(open_path: Path) -> None:
    with locked(open_path), pytest.raises(LocalError, match=f"in use by process {os.getpid()}"), locked(open_path):
        pass
    with locked(open_path):
        pass


def test_a_free_port_is_one_that_nobody_listens_on(open_path: Path) -> None:
    with Valkey(open_path, free_port()) as valkey:
        assert port_in_use(valkey.port)
    assert not port_in_use(valkey.port)
