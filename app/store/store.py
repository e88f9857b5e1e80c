"""The pool of connections, and how everyone runs a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.domain.errors import Unavailable

P = ParamSpec("P")
R = TypeVar("R")

CONNECT_TIMEOUT_SECONDS = 5
SILENT_SERVER = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
"""libpq's TCP settings: a server that vanished without a word is given up after about 10 s, not after 15 minutes."""


class _StaleConnection(Unavailable):
    """The connection was lost before anything was committed."""


class Store:
    """At most `pool_size` connections to Postgres, opened as they are needed, and as many threads to use them from."""

    def __init__(self, url: URL | str, *, pool_size: int, name: str) -> None:
        self.engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_use_lifo=True,
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_SECONDS,
                "application_name": f"caravan-{name}",
                **SILENT_SERVER,
            },
        )
        self._threads = ThreadPoolExecutor(max_workers=pool_size, thread_name_prefix=f"store-{name}")

    def transact(self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs `query(connection, …)` as one transaction, committed unless it raises.

        Raises Unavailable: Postgres cannot be reached or went away; whether the transaction was committed is then
        unknown.
        """
        try:
            return self._attempt(query, *args, **kwargs)
        except _StaleConnection:
            return self._attempt(query, *args, **kwargs)

    def _attempt(self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self.engine.connect() as connection:
                result = self._uncommitted(connection, query, *args, **kwargs)
                connection.commit()
                return result
        except (OperationalError, InterfaceError, InternalError, PoolTimeout) as error:
            raise Unavailable(f"Postgres is not available (DATABASE_URL): {_first_line(error)}") from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise Unavailable(f"Postgres went away (DATABASE_URL): {_first_line(error)}") from error
            raise

    def _uncommitted(
        self, connection: Connection, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """A pooled connection that died unseen shows only now: nothing is committed, all of it can be done again.

        That happens once: the first such connection empties the pool.
        """
        try:
            return query(connection, *args, **kwargs)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise _StaleConnection(f"Postgres went away (DATABASE_URL): {_first_line(error)}") from error
            raise

    async def run(self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`transact` in one of the store's threads."""

        def call() -> R:
            return self.transact(query, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self.engine.dispose()


def _first_line(error: Exception) -> str:
    original: Any = getattr(error, "orig", None) or error
    return str(original).strip().partition("\n")[0]
