"""What the examples share: options, a client, and a conversation with an agent, printed as it happens.

An agent is a stored configuration, a session a conversation with it, a turn one message of the user's with all that
follows from it. A turn's events come as a stream while a worker runs it.
"""

from __future__ import annotations

import argparse
import base64
import logging
import mimetypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_stack_client import LlamaStackClient

RESOURCES = Path(__file__).parent / "resources"
SHOWN_CHARACTERS = 300

logging.getLogger("httpx").setLevel(logging.WARNING)  # the SDK makes it tell of every request


def options(description: str | None, *, document: Path | None = None) -> argparse.Namespace:
    """The command line: `url`, `model`, `max_tokens`, and `document` where there is one by default."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8321", help="where Caravan listens (default: %(default)s)")
    parser.add_argument("--model", help="the model's id (default: the first one)")
    parser.add_argument("--max-tokens", type=int, help="the most that the model may say at once")
    if document:
        parser.add_argument("--document", default=str(document), help="a file or URL (default: %(default)s)")
    return parser.parse_args()


def connect(url: str, **provider_data: str | None) -> LlamaStackClient:
    """A client; `provider_data` are secrets for the providers of tools, those that are None excepted."""
    given = {name: secret for name, secret in provider_data.items() if secret}
    return LlamaStackClient(base_url=url, api_key=os.getenv("CARAVAN_API_KEY"), provider_data=given or None)


def document(place: str | Path) -> dict[str, Any]:
    """A document of a turn: a file goes along as a data URL with its name; another URL is fetched by the worker."""
    mime_type = mimetypes.guess_type(str(place))[0] or "text/plain"
    url = str(place)
    if not url.startswith(("http://", "https://")):
        path = Path(place)
        url = f"data:{mime_type};name={path.name};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"content": {"uri": url}, "mime_type": mime_type}


class Conversation:
    """A new agent with a new session."""

    def __init__(self, client: LlamaStackClient, chosen: argparse.Namespace, **config: Any) -> None:
        """`config`: fields of the agent's configuration, `toolgroups` or `instructions` say."""
        models = [model.identifier for model in client.models.list() if model.api_model_type == "llm"]
        fields: Any = {"model": chosen.model or models[0], "instructions": "You are a helpful assistant.", **config}
        if chosen.max_tokens:
            fields["sampling_params"] = {"strategy": {"type": "greedy"}, "max_tokens": chosen.max_tokens}
        self.agents: Any = client.alpha.agents
        self.agent_id = self.agents.create(agent_config=fields).agent_id
        self.session_id = self.agents.session.create(self.agent_id, session_name="example").session_id

    def ask(self, question: str, documents: Iterable[dict[str, Any]] = ()) -> Any:
        """Runs a turn; gives it as it is stored."""
        print(f"\nUser> {question}")
        stream = self.agents.turn.create(
            self.session_id,
            agent_id=self.agent_id,
            messages=[{"role": "user", "content": question}],
            documents=list(documents),
            stream=True,
        )
        return show(stream)

    def answer(self, turn: Any, tool_responses: list[dict[str, Any]]) -> Any:
        """Goes on with a turn that awaits what this program's own tools say."""
        ids = {"agent_id": self.agent_id, "session_id": self.session_id, "turn_id": turn.turn_id}
        return show(self.agents.turn.resume(**ids, tool_responses=tool_responses, stream=True))


def show(stream: Iterable[Any]) -> Any:
    """Prints a turn's events as they come; gives the turn. SystemExit: it failed."""
    turn = None
    for chunk in stream:
        if error := getattr(chunk, "error", None):
            raise SystemExit(f"the turn failed: {error['message']}")
        payload = chunk.event.payload
        match payload.event_type:
            case "step_progress" if payload.delta.type == "text":
                print(payload.delta.text, end="", flush=True)
            case "step_complete":
                show_step(payload.step_details)
            case "turn_complete" | "turn_awaiting_input":
                turn = payload.turn
    if turn is None:
        raise SystemExit("the stream was cut: the turn goes on, see `caravan turns list`")
    return turn


def show_step(step: Any) -> None:
    """Prints what a step did, besides the text of the model, which was printed already."""
    if step.step_type == "inference":
        print()
        for call in step.api_model_response.tool_calls or ():
            print(f"  calls {call.tool_name} {short(call.arguments)}")
    elif step.step_type == "tool_execution":
        for response in step.tool_responses:
            print(f"  {response.tool_name} answers: {short(response.content)}")
    elif step.step_type == "shield_call" and step.violation:
        print(f"  a shield objects: {step.violation.user_message}")


def short(content: Any) -> str:
    """Some of a call's arguments or of a tool's response: text, or parts with text among them."""
    parts = content if isinstance(content, list) else [content]
    text = " ".join(" ".join(getattr(part, "text", str(part)) for part in parts).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
