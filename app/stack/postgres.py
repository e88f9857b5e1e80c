"""The Postgres that llama_stack's stores use: how to connect, its key-value store, its SQL engines, its schema.

llama_stack builds its own connections: one psycopg2 connection for each key-value store, used on the event loop, never
opened again after it broke; and for SQL stores one engine for each `create_table` on top, whose connection is never
closed. The replacements below hold, for each process: one psycopg2 connection, used in threads, opened again when it is
found closed; and one asyncpg pool for each event loop, of at most `DATABASE_POOL_SIZE` connections.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import psycopg2
import psycopg2.extensions
from llama_stack.core.storage.datatypes import PostgresKVStoreConfig, PostgresSqlStoreConfig
from llama_stack.providers.utils.kvstore.api import KVStore
from psycopg2 import sql
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.store.limits import Watchdog
from app.store.store import CONNECT_TIMEOUT_SECONDS, SILENT_SERVER

log = logging.getLogger(__name__)

KEY_VALUE_TABLE = "llamastack_kvstore"

# What asyncpg takes from a DSN's query; it sends anything else to the server as a setting, which then refuses it.
_ASYNCPG_PARAMETERS = frozenset({
    "host", "port", "user", "password", "dbname", "passfile", "service", "sslmode", "sslcert", "sslkey",
    "sslrootcert", "sslcrl", "sslpassword", "ssl_min_protocol_version", "ssl_max_protocol_version",
    "target_session_attrs", "krbsrvname", "gsslib", "application_name", "options",
})  # fmt: skip

# Names of the advisory locks (any process of the installation, whatever its version, must use the same numbers).
_SCHEMA_LOCK = 0x63617261_00000001
_TABLES_LOCK = 0x63617261_00000002

# A turn waits for the registry to be read again, so that a Postgres that does not answer must not hold it for minutes.
KEY_VALUE_SECONDS = 5
QUERY_SECONDS = 10
"""A search among vectors, or the insertion of a document, may take so long; then Postgres counts as not answering."""
LOCK_WAIT_SECONDS = 5
TABLES_LOCK_SECONDS = 60
DEFAULT_PORT = "5432"


def libpq_parameters(url: URL) -> dict[str, str]:
    """A SQLAlchemy URL as libpq connection parameters (`host`, `port`, `user`, `password`, `dbname`, `sslmode`, …).

    Several hosts, written `?host=a:5432&host=b:5433`, become `host=a,b` and `port=5432,5433`; without a port, 5432.
    """
    parameters = {
        "host": url.host,
        "port": str(url.port) if url.port else None,
        "user": url.username,
        "password": str(url.password) if url.password is not None else None,
        "dbname": url.database,
    }
    query = {name: (value,) if isinstance(value, str) else value for name, value in url.query.items()}
    parameters |= {name: ",".join(values) for name, values in query.items()}
    if len(hosts := query.get("host", ())) > 1 and "port" not in query:
        pairs = [_host_and_port(host) for host in hosts]
        parameters |= {"host": ",".join(host for host, _ in pairs), "port": ",".join(port for _, port in pairs)}
    return {name: value for name, value in parameters.items() if value}


def _host_and_port(text: str) -> tuple[str, str]:
    """`host`, `host:5433`, `[::1]` or `[::1]:5433`; brackets go, since libpq's `host` parameter has none."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, ""
    return host.strip("[]"), port or DEFAULT_PORT


def asyncpg_dsn(parameters: dict[str, str]) -> str:
    """libpq parameters as the one DSN that asyncpg reads itself, `sslmode` and `sslrootcert` included.

    IPv6 addresses stand in brackets there: asyncpg takes what follows a colon in `host` for the port.
    """
    known = {name: value for name, value in parameters.items() if name in _ASYNCPG_PARAMETERS}
    if host := known.get("host"):
        known["host"] = ",".join(f"[{name}]" if name.count(":") > 1 else name for name in host.split(","))
    return f"postgresql://?{urlencode(known)}"


class KeyValueConfig(PostgresKVStoreConfig):
    """A `kv_postgres` backend that keeps every libpq parameter, not only the seven that the base class knows."""

    parameters: dict[str, str]


class SqlConfig(PostgresSqlStoreConfig):
    """A `sql_postgres` backend that keeps every connection parameter and bounds its pool."""

    parameters: dict[str, str]
    pool_size: int


def backends(url: URL, pool_size: int) -> tuple[KeyValueConfig, SqlConfig]:
    """The two storage backends of a stack on the database at `url`."""
    parameters = libpq_parameters(url)
    fields = {
        "host": parameters.get("host", ""),
        "port": parameters.get("port", 5432),
        "db": parameters.get("dbname", ""),
        "user": parameters.get("user", ""),
        "password": parameters.get("password"),
        "parameters": parameters,
    }
    key_value = KeyValueConfig(
        **fields,
        ssl_mode=parameters.get("sslmode"),
        ca_cert_path=parameters.get("sslrootcert"),
        table_name=KEY_VALUE_TABLE,
    )
    return key_value, SqlConfig(**fields, pool_size=pool_size)


def open_connection(parameters: dict[str, str]) -> psycopg2.extensions.connection:
    """Raises psycopg2.OperationalError: the server cannot be reached (within 5 s, unless set otherwise), or refuses."""
    ours = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "application_name": "caravan-stack", **SILENT_SERVER}
    keywords: dict[str, Any] = {**ours, **parameters}
    return psycopg2.connect(**keywords)


class Connection:
    """One psycopg2 connection in autocommit, for any thread, opened again when it is found closed.

    Stands in for a psycopg2 connection where only `cursor()` is used (llama_stack's pgvector provider).
    """

    def __init__(self, parameters: dict[str, str]) -> None:
        self._parameters = parameters
        self._lock = threading.RLock()
        self._connection: Any = None
        self._watchdog = Watchdog("stack")

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """Raises psycopg2.OperationalError: Postgres cannot be reached, or has not answered others for 10 s."""
        with self._locked(QUERY_SECONDS):
            if self._connection is None or self._connection.closed:
                self._connection = open_connection(self._parameters)
                self._connection.autocommit = True
            self._watchdog.watch(self._connection)
            return self._connection.cursor(*args, **kwargs)

    def run[T](self, work: Callable[[Any], T]) -> T:
        """What `work` returns for a cursor; tried once more where it found that the connection had been lost."""
        with self._locked(LOCK_WAIT_SECONDS):
            return self.limited(lambda: self._attempt(work), KEY_VALUE_SECONDS)

    def limited[T](self, work: Callable[[], T], seconds: float = QUERY_SECONDS) -> T:
        """What `work` returns, which uses cursors of this connection; tried once more where that had been lost.

        Its time begins when it has the connection: it would cut off the query of another that it waits for.
        """
        with self._locked(QUERY_SECONDS), self._watchdog.limit(seconds) as limit:
            used = self._connection
            try:
                return work()
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                lost = used is None or used.closed
                if limit.over or not lost:
                    raise
                return work()

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=seconds):
            raise psycopg2.OperationalError(f"Postgres did not answer another query within {seconds} s")
        try:
            yield
        finally:
            self._lock.release()

    def _attempt[T](self, work: Callable[[Any], T]) -> T:
        with self.cursor() as cursor:
            return work(cursor)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


_connections: dict[tuple[tuple[str, str], ...], Connection] = {}
_engines: dict[tuple[asyncio.AbstractEventLoop, str], AsyncEngine] = {}


def connection(parameters: dict[str, str]) -> Connection:
    """The process's connection for these libpq parameters."""
    key = tuple(sorted(parameters.items()))
    if key not in _connections:
        _connections[key] = Connection(parameters)
    return _connections[key]


class KeyValueStore(KVStore):
    """llama_stack's `kv_postgres` store, on the process's one connection, off the event loop.

    Takes `PostgresKVStoreConfig` too, so that a user's own `run.yaml` gains as well. Table and keys are the original's.
    """

    def __init__(self, config: PostgresKVStoreConfig) -> None:
        self._prefix = f"{config.namespace}:" if config.namespace else ""
        self._table = sql.Identifier(config.table_name)
        self.connection = connection(_parameters_of(config))

    async def initialize(self) -> None:
        await asyncio.to_thread(self.connection.run, lambda cursor: _create_key_value_table(cursor, self._table))

    async def set(self, key: str, value: str, expiration: datetime | None = None) -> None:
        await self._execute(
            "INSERT INTO {table} (key, value, expiration) VALUES (%s, %s, %s) "
            "ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, expiration = EXCLUDED.expiration",
            (self._prefix + key, value, expiration),
        )

    async def get(self, key: str) -> str | None:
        query = "SELECT value FROM {table} WHERE key = %s AND (expiration IS NULL OR expiration > NOW())"
        rows = await self._rows(query, (self._prefix + key,))
        return rows[0] if rows else None

    async def delete(self, key: str) -> None:
        await self._execute("DELETE FROM {table} WHERE key = %s", (self._prefix + key,))

    async def delete_prefix(self, prefix: str) -> None:
        """Delete all keys that begin so."""
        await self._execute("DELETE FROM {table} WHERE starts_with(key, %s)", (self._prefix + prefix,))

    async def swap(self, key: str, old: str, new: str) -> bool:
        """Set a key that still has the value `old`; False: it has another one by now."""
        statement = sql.SQL("UPDATE {table} SET value = %s WHERE key = %s AND value = %s").format(table=self._table)

        def work(cursor: Any) -> bool:
            cursor.execute(statement, (new, self._prefix + key, old))
            return bool(cursor.rowcount)

        return await asyncio.to_thread(self.connection.run, work)

    async def values_in_range(self, start_key: str, end_key: str) -> list[str]:
        return await self._rows(
            "SELECT value FROM {table} WHERE key >= %s AND key < %s "
            "AND (expiration IS NULL OR expiration > NOW()) ORDER BY key",
            (self._prefix + start_key, self._prefix + end_key),
        )

    async def keys_in_range(self, start_key: str, end_key: str) -> list[str]:
        """The keys of a range as the store's users know them: without the namespace, unlike the original."""
        keys = await self._rows(
            "SELECT key FROM {table} WHERE key >= %s AND key < %s",
            (self._prefix + start_key, self._prefix + end_key),
        )
        return [key.removeprefix(self._prefix) for key in keys]

    async def _execute(self, query: str, arguments: tuple[Any, ...]) -> None:
        statement = sql.SQL(query).format(table=self._table)
        await asyncio.to_thread(self.connection.run, lambda cursor: cursor.execute(statement, arguments))

    async def _rows(self, query: str, arguments: tuple[Any, ...]) -> list[str]:
        statement = sql.SQL(query).format(table=self._table)

        def work(cursor: Any) -> list[str]:
            cursor.execute(statement, arguments)
            return [row[0] for row in cursor.fetchall()]

        return await asyncio.to_thread(self.connection.run, work)


def _parameters_of(config: PostgresKVStoreConfig) -> dict[str, str]:
    if isinstance(config, KeyValueConfig):
        return dict(config.parameters)
    known = {
        "host": config.host,
        "port": str(config.port),
        "dbname": config.db,
        "user": config.user,
        "password": config.password,
        "sslmode": config.ssl_mode,
        "sslrootcert": config.ca_cert_path,
    }
    return {name: value for name, value in known.items() if value}


def shared_engine(create: Callable[[Any], AsyncEngine]) -> Callable[[Any], AsyncEngine]:
    """`SqlAlchemySqlStoreImpl.create_engine`, giving the running loop's engine for the store's database each time."""

    def create_engine(store: Any) -> AsyncEngine:
        config = store.config
        name = asyncpg_dsn(config.parameters) if isinstance(config, SqlConfig) else config.engine_str
        key = (asyncio.get_running_loop(), name)
        if key not in _engines:
            _engines[key] = _engine(config) if isinstance(config, SqlConfig) else create(store)
        return _engines[key]

    return create_engine


def _engine(config: SqlConfig) -> AsyncEngine:
    return create_async_engine(
        "postgresql+asyncpg://",
        connect_args={
            "dsn": asyncpg_dsn({"application_name": "caravan-stack-sql", **config.parameters}),
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": QUERY_SECONDS,
            # Behind PgBouncer's transaction pooling the next statement may meet another server connection, which knows
            # none of the statements prepared before: each is unnamed, and used in the transaction that prepared it.
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: "",
        },
        pool_size=config.pool_size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_SECONDS,
        pool_pre_ping=True,
    )


async def close_connections() -> None:
    """Close the running loop's engines and the process's psycopg2 connections; what is used again is opened again."""
    loop = asyncio.get_running_loop()
    for key in [key for key in _engines if key[0] is loop]:
        await _engines.pop(key).dispose()
    for shared in _connections.values():
        await asyncio.to_thread(shared.close)


def prepare_database(parameters: dict[str, str]) -> bool:
    """Create what every stack needs, once, whoever comes first; True if the database has pgvector.

    `CREATE … IF NOT EXISTS` fails when two processes run it at once, hence the lock (released at the end of the
    transaction). Raises psycopg2.Error: the database cannot be reached, or forbids to create tables.
    """
    database = open_connection(parameters)
    try:
        with database, database.cursor() as cursor:
            _create_key_value_table(cursor, sql.Identifier(KEY_VALUE_TABLE))
        with database, database.cursor() as cursor:
            return _create_vector_extension(cursor)
    finally:
        database.close()


def _create_key_value_table(cursor: Any, table: sql.Identifier) -> None:
    create_table(cursor, table, "key TEXT PRIMARY KEY, value TEXT, expiration TIMESTAMP")


def create_table(cursor: Any, table: sql.Identifier, columns: str) -> None:
    """Create the table unless it exists; safe while another process does the same."""
    cursor.execute("SELECT to_regclass(%s)", (table.as_string(cursor),))
    if cursor.fetchone()[0] is not None:
        return
    # One string, and so one transaction, which holds the lock to its end, even in autocommit.
    cursor.execute(
        sql.SQL("SELECT pg_advisory_xact_lock({lock}); CREATE TABLE IF NOT EXISTS {table} ({columns})").format(
            lock=sql.Literal(_SCHEMA_LOCK), table=table, columns=sql.SQL(columns)
        )
    )


def _create_vector_extension(cursor: Any) -> bool:
    cursor.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'")
    if cursor.fetchone():
        return True
    try:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
        cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except psycopg2.Error as error:
        log.warning(
            "No vector databases and no RAG: this Postgres has no pgvector (%s). Install pgvector and run "
            "CREATE EXTENSION vector as a superuser, then restart.",
            str(error).splitlines()[0],
        )
        return False
    return True


@contextmanager
def tables_lock(parameters: dict[str, str]) -> Iterator[None]:
    """Held while a stack creates SQL tables (its own, or a vector database's), since llama_stack's way of doing so
    fails when two do it at once.

    A transaction's lock, and so a transaction that stays open meanwhile: behind PgBouncer's transaction pooling nothing
    else keeps a server connection. Whoever waits asks again and again, lest those who wait take every connection of a
    small pool, and the holder finds none to create tables with. Raises psycopg2.OperationalError: no luck for 60 s.
    """
    database = open_connection(parameters)
    try:
        _take_tables_lock(database)
        yield
    finally:
        database.close()


def _take_tables_lock(database: psycopg2.extensions.connection) -> None:
    deadline = time.monotonic() + TABLES_LOCK_SECONDS
    while True:
        with database.cursor() as cursor:
            cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", (_TABLES_LOCK,))
            if (cursor.fetchone() or (False,))[0]:
                return
        database.rollback()
        if time.monotonic() > deadline:
            raise psycopg2.OperationalError(f"another process has been starting for {TABLES_LOCK_SECONDS} s")
        time.sleep(0.1)
