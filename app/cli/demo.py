"""`caravan demo`: one turn of a real model on an installation that is started for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from app.cli.chat import KEY_VARIABLE
from app.cli.errors import needs_local_extra

if TYPE_CHECKING:
    from app.local.up import Installation

INSTRUCTIONS = "You are a helpful assistant. Answer in one or two short sentences."
MESSAGE = "Why did merchants cross the desert in caravans?"
MAX_TOKENS = 80


def demo() -> None:
    """Start everything on this machine, run one turn of a small real model, stop everything."""
    with needs_local_extra():
        from app.local.demo import demo as run

    run(_one_turn)


def _one_turn(installation: Installation) -> None:
    from app.cli.client import Conversation, connect, worker_of

    model = installation.models[0]
    print(f"\nclient.alpha.agents of llama-stack-client at {installation.url}")
    client = connect(installation.url, os.environ.get(KEY_VARIABLE))
    conversation = Conversation.open(client, model, INSTRUCTIONS, max_tokens=MAX_TOKENS)
    print(f"  agent   {conversation.agent_id} (model {model})\n  session {conversation.session_id}")
    print(f"\nyou: {MESSAGE}\n")
    turn_id = conversation.say(MESSAGE, show_steps=True)
    worker = worker_of(conversation, turn_id)
    print(f"\nturn {turn_id} was run by worker {worker}")
    print(f"  Flower    {installation.flower_url}")
    print(f"  API docs  {installation.url}/docs")
    print(f"  health    {installation.url}/v1/health")
    print("  (`make up` keeps all of these running)\n", flush=True)
