"""`caravan`: one module per command, each a function that Typer reads. What is heavy is imported inside the functions,
so that `caravan --help` is quick. Messages for the person are one line on standard error: 1 says that something failed,
2 that the command line or a setting is wrong.
"""

from app.cli.application import main

__all__ = ["main"]
