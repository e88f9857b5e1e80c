"""`caravan migrate`."""

from __future__ import annotations

from app.cli.errors import CommandError


def migrate() -> None:
    """Bring the database at DATABASE_URL to the schema that this version needs."""
    from app.settings import SettingsError, get_settings

    url = get_settings().sqlalchemy_url
    from app.domain.errors import Unavailable
    from app.store import migrate as store

    try:
        revision = store.upgrade(url)
    except (SettingsError, Unavailable) as error:
        raise CommandError(f"the database was not migrated: {error}") from None
    print(f"the database has revision {revision}")
