"""Brings a database to this version's schema, and tells which revision it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from app.domain.errors import Unavailable
from app.settings import SettingsError
from app.store.store import Store

_LOCK = 0x6361_7261_7661_6E  # "caravan": two processes that start together migrate one after the other


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head() -> str:
    """The revision that this version of the code needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def current(connection: Connection) -> str | None:
    """The revision that the database has; None: it was never migrated."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(url: URL | str) -> None:
    """Migrates the database at `url` to `head`, under an advisory lock; does nothing if it is there already.

    Raises Unavailable: the database cannot be reached.
    """
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg2"), poolclass=NullPool)
    try:
        connection = engine.connect()
    except OperationalError as error:
        raise Unavailable(
            f"Postgres is not available (DATABASE_URL): {str(error.orig).strip().partition('\n')[0]}"
        ) from error
    with connection:
        # A transaction's lock, not the session's: PgBouncer's transaction pooling knows no sessions. All revisions are
        # one transaction.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        run(connection, command.upgrade, "head")


def require_head(url: URL) -> None:
    """For the start of a process. Raises SettingsError: the database has another revision. Raises Unavailable."""
    store = Store(url, pool_size=1, name="start")
    try:
        revision = store.transact(current)
    finally:
        store.close()
    if revision != head():
        found = f"revision {revision}" if revision else "no schema"
        raise SettingsError(f"the database has {found}, this version needs {head()}: run `caravan migrate`")


def run(connection: Connection, action: Any, *arguments: Any) -> None:
    """Runs one of Alembic's commands on an open connection."""
    config = _config()
    config.attributes["connection"] = connection
    action(config, *arguments)
    connection.commit()
