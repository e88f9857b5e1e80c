"""`caravan chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.errors import CommandError

if TYPE_CHECKING:
    from app.cli.client import Conversation

URL = "http://127.0.0.1:8321"
KEY_VARIABLE = "CARAVAN_API_KEY"

UrlOption = Annotated[str, typer.Option(help="Where the server is.", envvar="CARAVAN_URL")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        help="Your API key; better in the environment, since `ps` shows command lines.",
        envvar=KEY_VARIABLE,
        show_default=False,
    ),
]


def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message; without it, a conversation.", show_default=False)
    ] = None,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    model: Annotated[
        str | None, typer.Option(help="Model of the new agent; else the server's first.", show_default=False)
    ] = None,
    instructions: Annotated[str, typer.Option(help="Instructions of the new agent.")] = "You are a helpful assistant.",
    agent: Annotated[str | None, typer.Option(help="Id of an agent that there is.", show_default=False)] = None,
    session: Annotated[str | None, typer.Option(help="Id of a session of --agent.", show_default=False)] = None,
) -> None:
    """Talk with an agent on a running server."""
    if session and not agent:
        raise CommandError("--session needs the --agent that it belongs to")
    from app.cli.client import Conversation, connect

    client = connect(url, api_key)
    conversation = (
        Conversation.of_agent(client, agent, session) if agent else Conversation.open(client, model, instructions)
    )
    if message is not None:
        conversation.say(message)
    else:
        _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """A failed turn does not end the conversation."""
    print(f"agent {conversation.agent_id}, session {conversation.session_id}; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            continue
        try:
            conversation.say(text)
        except CommandError as error:
            print(f"caravan: {error}", file=sys.stderr)
