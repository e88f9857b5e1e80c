"""`caravan settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

UNITS = {"seconds": "s", "bytes": "bytes"}

_HEAD = """\
# Settings

All settings are environment variables; a `.env` file in the working directory works as well. An empty value counts as
not set. A process whose settings are missing or wrong ends with one line that names the setting, and status 2.
`caravan settings` shows the values in force, `caravan doctor` tries them. This page is written by
`caravan settings --markdown`.

| Setting | Unit | Default | Meaning |
|---|---|---|---|
"""


def settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md instead.")] = False,
) -> None:
    """Show every setting with its unit, its default and its present value; secrets are masked."""
    print(_markdown() if markdown else _present(), end="")


def _markdown() -> str:
    from app.settings import Settings

    return _HEAD + "".join(_row(name, field) for name, field in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    meaning = (field.description or "").replace("|", "&#124;")
    return f"| `{name.upper()}` | {_unit(name)} | {_default(field, code='`')} | {meaning} |\n"


def _present() -> str:
    from app.settings import Settings, get_settings

    values = get_settings()
    blocks = []
    for name, field in Settings.model_fields.items():
        unit = f" {_unit(name)}" if _unit(name) else ""
        value = _shown(getattr(values, name))
        origin = f"default {_default(field)}{unit}" if name in values.model_fields_set else "the default"
        blocks.append(f"{name.upper()} = {value}{unit if value else ''}   ({origin})\n    {field.description}\n")
    return "\n".join(blocks)


def _unit(name: str) -> str:
    return UNITS.get(name.rpartition("_")[2], "")


def _default(field: FieldInfo, code: str = "") -> str:
    if field.is_required():
        return "required"
    shown = _shown(field.get_default(call_default_factory=True))
    return f"{code}{shown}{code}" if shown else "empty"


def _shown(value: Any) -> str:
    """As it would be written in the environment, with passwords and keys masked."""
    from pydantic import SecretStr

    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    if isinstance(value, list):
        return ",".join(_shown(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _masked(secret: str) -> str:
    """Of a URL only the password, and parameters that may hold one; else everything."""
    from urllib.parse import urlsplit

    if "://" not in secret:
        return "***" if secret else ""
    parts = urlsplit(secret)
    account, _, host = parts.netloc.rpartition("@")
    user, colon, _ = account.partition(":")
    netloc = f"{user}{':***' if colon else ''}@{host}" if account else host
    return parts._replace(netloc=netloc, query="***" if "password" in parts.query else parts.query).geturl()
