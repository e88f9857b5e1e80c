"""`caravan migrate`."""

from __future__ import annotations

from app.cli.errors import CommandError


def migrate() -> None:
    """Bring the database at DATABASE_URL to the schema that this version needs."""
    from app.settings import get_settings

    url = get_settings().sqlalchemy_url
    from sqlalchemy.exc import SQLAlchemyError

    from app.store import migrate as store

    try:
        store.upgrade(url)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise CommandError(f"the database was not migrated (DATABASE_URL): {reason}") from None
    print(f"the database has revision {store.head()}")
