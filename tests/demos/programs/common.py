"""What the programs share: the command line, and what each demo of the seed begins with.

They run in the environment of llama-stack-client 0.1.9, and call it as the demos did.
"""

from __future__ import annotations

import argparse
from typing import Any

from llama_stack_client import Agent, AgentEventLogger, LlamaStackClient

PAGES = ("1-camels.md", "2-water.md", "3-loading.md", "4-routes.md")
"""Of the handbook, in the folder of the documents."""


def arguments() -> argparse.Namespace:
    """`HOST PORT`, as the demos have it, and where their documents are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--documents", help="the URL of the folder that the documents are fetched from")
    parser.add_argument("--max-tokens", type=int, help="the most that the model says at once (default: no limit)")
    return parser.parse_args()


def sampling_params(given: argparse.Namespace) -> Any:
    params: dict[str, Any] = {"strategy": {"type": "top_p", "temperature": 1.0, "top_p": 0.9}}
    return params | ({"max_tokens": given.max_tokens} if given.max_tokens else {})


def shields(client: LlamaStackClient) -> list[str]:
    found = [shield.identifier for shield in client.shields.list()]
    print(f"Available shields found: {found}" if found else "No available shields. Disabling safety.")
    return found


def first_model(client: LlamaStackClient) -> str:
    model = next(model.identifier for model in client.models.list() if model.model_type == "llm")
    print(f"Using model: {model}")
    return str(model)


def ask(agent: Agent, session_id: str, text: str, documents: Any = None) -> None:
    """One turn, printed as the SDK prints it."""
    print(f"User> {text}")
    response = agent.create_turn(
        messages=[{"role": "user", "content": text}], documents=documents, session_id=session_id
    )
    for log in AgentEventLogger().log(response):
        log.print()
