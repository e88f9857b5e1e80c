"""The command line: the list of commands, and how errors are shown."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from app.cli import chat, demo, doctor, embeddings, keys, migrate, prune, settings, turns, up

application = typer.Typer(
    name="caravan",
    help="Hosts Llama Stack agents: web processes, a queue, and workers that run the turns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
application.command()(up.up)
application.command()(demo.demo)
application.command()(embeddings.embeddings)
application.command()(chat.chat)
application.command()(migrate.migrate)
application.command()(prune.prune)
application.command()(settings.settings)
application.command()(keys.keys)
application.add_typer(turns.application, name="turns")
application.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"caravan {version('caravan-agents')}")
        raise typer.Exit


@application.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def main() -> None:
    """What `caravan` runs."""
    try:
        application()
    except Exception as error:
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Prints an error that is meant for the person, and gives the exit status; raises any other one again."""
    status = _status(error)
    if status is None:
        raise error
    print(f"caravan: {error}", file=sys.stderr)
    return status


def _status(error: Exception) -> int | None:
    """By name: importing the classes would import what `caravan --help` does not need."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("app.")}
    if "SettingsError" in names:
        return 2
    return 1 if names & {"LocalError", "CaravanError", "CommandError"} else None
