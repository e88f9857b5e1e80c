"""How a command fails."""


class CommandError(Exception):
    """A command cannot do what it was asked. The message is one line for the person who asked."""
