"""Two adjacent versions run side by side on one database: during an upgrade, old processes go on, and start.

So each revision may only add: tables, columns that may be left out, indexes. What an old process reads must be there,
and what it writes must be allowed. A change that takes something away needs two releases: one that stops using it, and
one that removes it, which this test is then told about (`ACCEPTED`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.pool import NullPool

from app.local.postgres import Postgres
from app.settings import SettingsError
from app.store import migrate
from tests.conftest import create_database
from tests.support.nodes import web_process

REVISIONS = [script.revision for script in ScriptDirectory.from_config(migrate._config()).walk_revisions()][::-1]
PAIRS = list(pairwise(REVISIONS))

ACCEPTED: dict[str, set[str]] = {
    "0003": {
        # An old worker joins a session with its agent, so it cannot claim a response's turn: the claim is rolled back.
        "columns: sessions.agent_id has another nullable",
        # Of a column that an old process leaves empty, and it yields to deletions.
        "constraints: turns.fk_turns_previous_turn_id is new on an old table",
    }
}
"""By revision: problems, as the test words them, that its predecessor survives, and why."""

COLUMNS = """
    SELECT table_name, column_name, udt_name || coalesce('(' || character_maximum_length || ')', '') AS type,
           is_nullable = 'YES' AS nullable, column_default, is_generated
    FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name <> 'alembic_version'
"""
CONSTRAINTS = """
    SELECT conrelid::regclass::text AS table_name, conname AS name, pg_get_constraintdef(oid) AS definition,
           contype = 'f' AS foreign_key, confrelid::regclass::text AS target, confdeltype IN ('c', 'n', 'd') AS yields
    FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
"""
INDEXES = "SELECT tablename AS table_name, indexname AS name, indexdef AS definition FROM pg_indexes"
TRIGGERS = "SELECT tgrelid::regclass::text AS table_name, tgname AS name FROM pg_trigger WHERE NOT tgisinternal"


class Schema:
    """What an old process could trip over."""

    def __init__(self, connection: Connection) -> None:
        def rows(query: str, *key: str) -> dict[tuple[str, ...], dict[str, object]]:
            found = [dict(row) for row in connection.execute(text(query)).mappings()]
            return {tuple(str(row[name]) for name in key): row for row in found}

        self.columns = rows(COLUMNS, "table_name", "column_name")
        self.constraints = rows(CONSTRAINTS, "table_name", "name")
        self.indexes = rows(f"{INDEXES} WHERE schemaname = 'public'", "table_name", "name")
        self.triggers = rows(TRIGGERS, "table_name", "name")
        self.tables = {table for table, _ in self.columns}


def problems(old: Schema, new: Schema) -> set[str]:
    """Everything in the step from one schema to the next that an old process may not survive."""
    return {*_gone(old, new), *_changed(old, new), *_demanded(old, new)}


def _gone(old: Schema, new: Schema) -> Iterator[str]:
    for kind in ("columns", "constraints", "indexes"):
        for key in getattr(old, kind).keys() - getattr(new, kind).keys():
            yield f"{kind}: {'.'.join(key)} is gone"


def _changed(old: Schema, new: Schema) -> Iterator[str]:
    for key, before in old.columns.items():
        after = new.columns.get(key, before)
        for what in ("type", "nullable", "column_default", "is_generated"):
            if after[what] != before[what] and not (what == "column_default" and before[what] is None):
                yield f"columns: {'.'.join(key)} has another {what}"
    for kind in ("constraints", "indexes"):
        for key, before in getattr(old, kind).items():
            if getattr(new, kind).get(key, before)["definition"] != before["definition"]:
                yield f"{kind}: {'.'.join(key)} is defined otherwise"


def _demanded(old: Schema, new: Schema) -> Iterator[str]:
    """What is new, and what old processes know nothing of."""
    for key in new.columns.keys() - old.columns.keys():
        column = new.columns[key]
        needed = not column["nullable"] and column["column_default"] is None and column["is_generated"] == "NEVER"
        if key[0] in old.tables and needed:
            yield f"columns: {'.'.join(key)} must be given"
    for key in new.constraints.keys() - old.constraints.keys():
        constraint = new.constraints[key]
        if key[0] in old.tables:
            yield f"constraints: {'.'.join(key)} is new on an old table"
        elif constraint["foreign_key"] and constraint["target"] in old.tables and not constraint["yields"]:
            yield f"constraints: {'.'.join(key)} keeps old processes from deleting from {constraint['target']}"
    for key in new.indexes.keys() - old.indexes.keys():
        if key[0] in old.tables and "UNIQUE" in str(new.indexes[key]["definition"]):
            yield f"indexes: {'.'.join(key)} is new, unique, and on an old table"
    for key in new.triggers.keys() - old.triggers.keys():
        if key[0] in old.tables:
            yield f"triggers: {'.'.join(key)} is new on an old table"


@pytest.fixture
def url(postgres: Postgres) -> str:
    return create_database(postgres.url, "adjacent")


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    made = create_engine(make_url(url).set(drivername="postgresql+psycopg2"), poolclass=NullPool)
    yield made
    made.dispose()


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_revision_only_adds(engine: Engine, old: str, new: str) -> None:
    """Nothing that the code of the revision before uses is dropped, renamed, retyped or newly constrained."""
    with engine.connect() as connection:
        migrate.run(connection, command.upgrade, old)
        before = Schema(connection)
        migrate.run(connection, command.upgrade, new)
        assert problems(before, Schema(connection)) == ACCEPTED.get(new, set())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("ALTER TABLE turns DROP COLUMN rings", "columns: turns.rings is gone"),
        ("ALTER TABLE turns RENAME COLUMN rings TO bells", "columns: turns.rings is gone"),
        ("DROP TABLE tool_calls", "columns: tool_calls.result is gone"),
        ("ALTER TABLE turns ALTER COLUMN rings TYPE bigint", "columns: turns.rings has another type"),
        ("ALTER TABLE turns ALTER COLUMN rings DROP DEFAULT", "columns: turns.rings has another column_default"),
        ("ALTER TABLE turns ALTER COLUMN rung_at SET NOT NULL", "columns: turns.rung_at has another nullable"),
        ("ALTER TABLE turns ALTER COLUMN rings DROP NOT NULL", "columns: turns.rings has another nullable"),
        ("ALTER TABLE turns ADD COLUMN more int NOT NULL", "columns: turns.more must be given"),
        (
            "ALTER TABLE turns ADD CONSTRAINT bound CHECK (rings < 9)",
            "constraints: turns.bound is new on an old table",
        ),
        ("ALTER TABLE turns DROP CONSTRAINT ck_turns_status", "constraints: turns.ck_turns_status is gone"),
        (
            "CREATE UNIQUE INDEX one_name ON sessions (name)",
            "indexes: sessions.one_name is new, unique, and on an old table",
        ),
        ("DROP INDEX ix_turns_queued", "indexes: turns.ix_turns_queued is gone"),
        (
            "CREATE TABLE notes (turn_id uuid CONSTRAINT held REFERENCES turns)",
            "constraints: notes.held keeps old processes from deleting from turns",
        ),
        (
            "CREATE TRIGGER t BEFORE UPDATE ON turns EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "triggers: turns.t is new on an old table",
        ),
    ],
)
def test_the_contract_sees_what_breaks_it(engine: Engine, url: str, change: str, problem: str) -> None:
    """Each way in which a future revision could break the version before it."""
    migrate.upgrade(url)
    with engine.connect() as connection:
        before = Schema(connection)
        connection.execute(text(change))
        assert problem in problems(before, Schema(connection))


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE notes (turn_id uuid REFERENCES turns ON DELETE CASCADE, note text NOT NULL UNIQUE)",
        "ALTER TABLE turns ADD COLUMN note text",
        "ALTER TABLE turns ADD COLUMN weight int NOT NULL DEFAULT 1",
        "ALTER TABLE turns ALTER COLUMN rung_at SET DEFAULT now()",
        "CREATE INDEX by_name ON sessions (name)",
    ],
)
def test_the_contract_allows_what_is_added(engine: Engine, url: str, change: str) -> None:
    migrate.upgrade(url)
    with engine.connect() as connection:
        before = Schema(connection)
        connection.execute(text(change))
        assert problems(before, Schema(connection)) == set()


def migrated_by_the_next_version(engine: Engine, revision: str, follows: str) -> None:
    """What its `caravan migrate` leaves behind: an addition, its revision, and the one that this follows."""
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE turns ADD COLUMN next_thing text NOT NULL DEFAULT 'x'"))
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
        connection.execute(text(f"COMMENT ON TABLE alembic_version IS 'follows revision {follows}'"))


def test_a_database_one_revision_ahead_serves_this_version(
    url: str, engine: Engine, environment: dict[str, str], open_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A web process of this version that starts during a rolling upgrade says so in one line, and works.

    `caravan migrate` of this version, run by whoever restarts it, leaves the database alone.
    """
    assert migrate.upgrade(url) == migrate.head()
    migrated_by_the_next_version(engine, "next", migrate.head())
    assert migrate.upgrade(url) == "next"
    base, web = web_process(environment | {"DATABASE_URL": url}, open_path / "web.log")
    with web:
        created = httpx.post(
            f"{base}/v1/agents", json={"agent_config": {"model": "scripted", "instructions": "x"}}, timeout=60
        )
        assert created.status_code == 200
        lines = [line for line in web.output().splitlines() if "the database has revision" in line]
    assert len(lines) == 1
    assert f"revision next, the next one after this version's {migrate.head()}" in lines[0]


def test_other_revisions_are_refused(url: str, engine: Engine) -> None:
    """An older database names the command; one that is two revisions ahead is for newer processes alone."""
    bound = make_url(url).set(drivername="postgresql+psycopg2")
    with engine.connect() as connection:
        migrate.run(connection, command.upgrade, REVISIONS[-2])
    with pytest.raises(SettingsError, match=rf"has revision {REVISIONS[-2]}, .* run `caravan migrate`$"):
        migrate.require_head(bound)
    migrate.upgrade(url)
    migrate.require_head(bound)
    migrated_by_the_next_version(engine, "after-next", "next")
    for refused in (migrate.require_head, migrate.upgrade):
        with pytest.raises(SettingsError, match="revision after-next, which is much newer than this version's"):
            refused(bound)


def test_a_migration_notes_what_it_follows(url: str, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Also where there was nothing to migrate, as in a database of a version that did not note it yet."""
    migrate.upgrade(url)
    with engine.begin() as connection:
        connection.execute(text("COMMENT ON TABLE alembic_version IS NULL"))
    with caplog.at_level(logging.WARNING):
        migrate.upgrade(url)
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record for record in warned if record.name != "asyncio"] == []  # of what other tests have left
    with engine.connect() as connection:
        assert connection.scalar(migrate._NOTE) == f"follows revision {REVISIONS[-2]}"
