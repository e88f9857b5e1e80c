"""`caravan prune`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from app.cli.errors import CommandError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
MAX_DAYS = 365_000  # a thousand years; Postgres has no moment much before that
TRANSACTION_SECONDS = 600  # a hundred sessions may hold much, and counting them all looks at each


def prune(
    older_than: Annotated[
        str,
        typer.Option(help="Age such as 90d, 12h or 2w, counted from the end of a session's last turn.", metavar="AGE"),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell how many there are.")] = False,
) -> None:
    """Delete sessions that nobody has used for long, with their turns and events.

    A session goes as a whole or not at all, so that no history changes; agents stay. Safe while everything runs.
    """
    age = _seconds(older_than)
    from app.settings import get_settings
    from app.store import Store, migrate
    from app.store import prune as rows

    migrate.require_head(get_settings().sqlalchemy_url)
    store = Store(get_settings().sqlalchemy_url, pool_size=2, name="cli", transaction_seconds=TRANSACTION_SECONDS)
    try:
        if dry_run:
            print(f"{store.transact(rows.idle_sessions, age)} sessions have been idle for {older_than}")
            return
        deleted, after = store.transact(rows.prune_sessions, age, None)
        while after is not None:
            more, after = store.transact(rows.prune_sessions, age, after)
            deleted += more
        print(f"{deleted} sessions that were idle for {older_than} are deleted")
    finally:
        store.close()


def _seconds(age: str) -> float:
    found = re.fullmatch(r"(\d+)([smhdw])", age.strip())
    if not found:
        raise CommandError(f"--older-than {age}: give a number and a unit out of s, m, h, d, w, such as 90d")
    seconds = int(found[1]) * UNITS[found[2]]
    if seconds > MAX_DAYS * UNITS["d"]:
        raise CommandError(f"--older-than {age}: at most {MAX_DAYS}d")
    return seconds
