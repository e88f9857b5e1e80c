"""How a command fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A command cannot do what it was asked. The message is one line for the person who asked."""


@contextmanager
def needs_local_extra() -> Iterator[None]:
    """For imports of `app.local`, whose libraries production does not install."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = "pip install 'caravan-agents[local]'"
        raise CommandError(f"this command embeds servers, and {error.name} is not installed: {extra}") from None


def refused(url: str, detail: str) -> str:
    """What to tell of a 401."""
    return f"{url} answered 401: {detail}. This command's key comes from CARAVAN_API_KEY or --api-key"
