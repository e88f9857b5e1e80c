"""`caravan keys`."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from app.cli.errors import CommandError


def keys(
    name: Annotated[str, typer.Argument(help="The principal that the key stands for: whoever will own what it makes.")],
) -> None:
    """Make an API key: print it once, and its entry for API_KEYS. Nothing is stored."""
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
