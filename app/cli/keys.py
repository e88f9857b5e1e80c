"""`caravan keys`."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from app.cli.errors import CommandError


def keys(
    name: Annotated[
        str | None,
        typer.Argument(help="The principal that the key stands for: whoever will own what it makes."),
    ] = None,
    sealing: Annotated[bool, typer.Option("--sealing", help="Make a key for SEALING_KEYS instead.")] = False,
) -> None:
    """Make an API key and its entry for API_KEYS, or a sealing key, and print it once. Nothing is stored."""
    if sealing == (name is not None):
        raise CommandError("give the name of a principal, or --sealing")
    if name is None:
        _make_sealing_key()
    else:
        _make_api_key(name)


def _make_api_key(name: str) -> None:
    from app.identity.keys import entry, make_key
    from app.settings import PRINCIPAL

    if not re.fullmatch(PRINCIPAL, name):
        raise CommandError("a name has 1 to 64 letters, digits and . _ @ - and begins with a letter or digit")
    key = make_key()
    print(f"key    {key}\nentry  {entry(name, key)}")
    print(
        "\nThe key is shown only now: give it to the client (api_key, or CARAVAN_API_KEY).\n"
        "Add the entry to API_KEYS of every web process, behind a comma, and restart them.",
        file=sys.stderr,
    )


def _make_sealing_key() -> None:
    from app.identity.sealing import make_sealing_key

    print(make_sealing_key())
    print(
        "\nPut it into SEALING_KEYS of every web and worker process, and restart them. If there is one already:\n"
        "behind it, with a comma; and in front of it once every process knows both.",
        file=sys.stderr,
    )
