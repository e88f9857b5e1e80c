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
