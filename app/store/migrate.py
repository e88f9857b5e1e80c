"""Brings a database to this version's schema, and tells which revision it has."""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

_LOCK = 0x6361_7261_7661_6E  # "caravan": two processes that start together migrate one after the other
_FOLLOWS = "follows revision "
_NOTE = text("SELECT obj_description(to_regclass('alembic_version'), 'pg_class')")


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


def upgrade(url: URL | str) -> str:
    """Migrates the database at `url` to `head`, under an advisory lock; gives the revision that it has then.

    Does nothing if it is there already, or if the next version has migrated it. Notes which revision `head` follows,
    for `check` of the version before. Raises Unavailable: the database cannot be reached. Raises SettingsError: it is
    of a much newer version.
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
        revision = current(connection)
        if revision is not None and not _known(revision):
            return check(connection)
        _act(connection, command.upgrade, "head")
        connection.execute(text(f"COMMENT ON TABLE alembic_version IS '{_FOLLOWS}{_previous() or ''}'"))
        connection.commit()
    return head()


def check(connection: Connection) -> str:
    """Whether this version works with the database's schema; gives its revision.

    It may be one revision ahead: that of the next version, which is being installed, process by process. What a
    revision may change is therefore limited, see tests/migrations/test_adjacent_revisions.py. Raises SettingsError.
    """
    revision, needed = current(connection), head()
    if revision == needed:
        return revision
    if revision is None or _known(revision):
        found = f"revision {revision}" if revision else "no schema"
        raise SettingsError(f"the database has {found}, this version needs {needed}: run `caravan migrate`")
    if connection.scalar(_NOTE) == f"{_FOLLOWS}{needed}":
        logger.warning("the database has revision %s, the next one after this version's %s", revision, needed)
        return revision
    raise SettingsError(f"the database has revision {revision}, which is much newer than this version's {needed}")


def _known(revision: str) -> bool:
    return any(script.revision == revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


def _previous() -> str | None:
    """The revision before `head`."""
    script = ScriptDirectory.from_config(_config()).get_revision(head())
    return str(script.down_revision) if script.down_revision else None


def require_head(url: URL) -> None:
    """`check` for the start of a process. Raises SettingsError, Unavailable."""
    store = Store(url, pool_size=1, name="start")
    try:
        store.transact(check)
    finally:
        store.close()


def run(connection: Connection, action: Any, *arguments: Any) -> None:
    """Runs one of Alembic's commands on an open connection, and commits."""
    _act(connection, action, *arguments)
    connection.commit()


def _act(connection: Connection, action: Any, *arguments: Any) -> None:
    config = _config()
    config.attributes["connection"] = connection
    action(config, *arguments)
