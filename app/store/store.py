"""The pool of connections, and how everyone runs a transaction."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.domain.errors import OutcomeUnknown, Unavailable
from app.store.limits import Limit, Watchdog

P = ParamSpec("P")
R = TypeVar("R")

CONNECT_TIMEOUT_SECONDS = 5
TRANSACTION_SECONDS = 5
"""How long a transaction may take, unless its store says otherwise: beyond, Postgres counts as not answering."""
THREAD_WAIT_SECONDS = 5
"""How long a transaction waits for one of its store's threads while Postgres answers nobody."""
RETRY_SECONDS = 0.5
IDLE_SECONDS = 3
"""Postgres ends a transaction whose client is silent for so long: the locks of one that was stopped, or vanished with
its machine, must not hold everybody else up. The longest that we do between two statements is to raise a fence (2 s).
"""
_LIMIT_IDLING = f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'; "
SILENT_SERVER = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
"""libpq's TCP settings: a server that vanished without a word is given up after about 10 s, not after 15 minutes."""


class _StaleConnection(Unavailable):
    """The connection was lost before anything was committed."""


class Store:
    """At most `pool_size` connections to Postgres, opened as they are needed, and as many threads to use them from.

    Nothing here waits for ever. Where Postgres does not answer (it is down, unreachable, or hangs):

    - A transaction that waits for a thread is withdrawn when Postgres has answered nobody for `THREAD_WAIT_SECONDS`
      (a queue that is merely long goes on): it never begins. `Future.cancel` decides between the two, so it is either
      withdrawn or run, and its caller waits for it if it is run.
    - A transaction that takes longer than `transaction_seconds` has its connection cut (see `app.store.limits`), which
      its own thread then finds out at its next look at it. If that is before COMMIT was sent, then COMMIT is never
      sent, since nobody else has the connection; the server, however late it wakes, sees the connection end and rolls
      back. That is `Unavailable`. If it is in COMMIT, this may have arrived, or may arrive yet: `OutcomeUnknown`.
      (Cut between the last statement and COMMIT, it was not sent, and counts as unknown all the same.)
    - Whoever resolves an unknown outcome must take a lock that the transaction held: it may be under way still, for
      up to `IDLE_SECONDS` after Postgres hears of nothing, and a mere look sees none of it.

    So a caller of `run` has an answer after the sum of both times, give or take `CONNECT_TIMEOUT_SECONDS`.
    """

    def __init__(
        self, url: URL | str, *, pool_size: int, name: str, transaction_seconds: float = TRANSACTION_SECONDS
    ) -> None:
        self.engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=transaction_seconds,
            pool_use_lifo=True,
            use_native_hstore=False,
            hide_parameters=True,  # what users said is not for logs, nor for the tool's response that an error may be
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_SECONDS,
                "application_name": f"caravan-{name}",
                **SILENT_SERVER,
            },
        )
        self._transaction_seconds = transaction_seconds
        self._answered = time.monotonic()
        self._watchdog = Watchdog(name)
        # First of all, so that what SQLAlchemy asks on a new connection is limited as well.
        event.listen(self.engine, "connect", lambda connection, _: self._watchdog.watch(connection), insert=True)
        event.listen(self.engine, "checkout", lambda connection, *_: self._watchdog.watch(connection))
        event.listen(self.engine, "before_cursor_execute", _limit_idling, retval=True)
        self._threads = ThreadPoolExecutor(max_workers=pool_size, thread_name_prefix=f"store-{name}")

    def transact(self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs `query(connection, …)` as one transaction, committed unless it raises.

        Raises Unavailable: Postgres cannot be reached, went away or did not answer in time; nothing was committed.
        Raises OutcomeUnknown: that happened while it was being committed.
        """
        with self._watchdog.limit(self._transaction_seconds) as limit:
            try:
                result = self._twice_if_stale(limit, query, *args, **kwargs)
            except Unavailable as error:
                if not limit.over:
                    raise
                kind = OutcomeUnknown if isinstance(error, OutcomeUnknown) else Unavailable
                raise kind(f"Postgres did not answer within {self._transaction_seconds:g} s (DATABASE_URL)") from error
        self._answered = time.monotonic()
        return result

    def _twice_if_stale(
        self,
        limit: Limit,
        query: Callable[Concatenate[Connection, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        try:
            return self._attempt(query, *args, **kwargs)
        except _StaleConnection:
            if limit.over:
                raise
            return self._attempt(query, *args, **kwargs)

    def _attempt(self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self.engine.connect() as connection:
                result = self._uncommitted(connection, query, *args, **kwargs)
                self._commit(connection)
                return result
        except (OperationalError, InterfaceError, InternalError, PoolTimeout) as error:
            raise Unavailable(f"Postgres is not available (DATABASE_URL): {_first_line(error)}") from error

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

    def _commit(self, connection: Connection) -> None:
        try:
            connection.commit()
        except DBAPIError as error:
            if error.connection_invalidated:
                raise OutcomeUnknown(f"Postgres went away in a commit (DATABASE_URL): {_first_line(error)}") from error
            raise

    async def run(self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`transact` in one of the store's threads. Raises Unavailable also if none has time for it."""

        def call() -> R:
            return self.transact(query, *args, **kwargs)

        asked: Future[R] = self._threads.submit(call)
        answer = asyncio.wrap_future(asked)
        try:
            await self._begun_or_withdrawn(asked, answer)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return await answer

    async def run_until_known(
        self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """`run` of what does no harm twice and takes its own lock: an unknown outcome is asked for until it is known.

        Raises Unavailable: nothing was committed.
        """
        unknown = False
        while True:
            try:
                return await self.run(query, *args, **kwargs)
            except OutcomeUnknown:
                unknown = True
            except Unavailable:
                if not unknown:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def _begun_or_withdrawn(self, asked: Future[R], answer: asyncio.Future[R]) -> None:
        """Raises Unavailable: it was withdrawn."""
        submitted = time.monotonic()
        while not answer.done():
            patience = max(submitted, self._answered) + THREAD_WAIT_SECONDS - time.monotonic()
            if patience > 0:
                await asyncio.wait([answer], timeout=patience)
            elif asked.cancel():
                raise Unavailable("Postgres is not available (DATABASE_URL): it has not answered others for a while")
            else:
                return

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._watchdog.close()
        self.engine.dispose()


def _limit_idling(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: object, executemany: bool
) -> tuple[str, Any]:
    """The first statement of a transaction brings its limit along, in the same round trip.

    Of the transaction, not of the session: behind PgBouncer's transaction pooling the next may meet another session.
    """
    if cursor.connection.info.transaction_status == TRANSACTION_STATUS_IDLE and not cursor.connection.autocommit:
        statement = _LIMIT_IDLING + statement
    return statement, parameters


def _first_line(error: Exception) -> str:
    original: Any = getattr(error, "orig", None) or error
    return str(original).strip().partition("\n")[0]
