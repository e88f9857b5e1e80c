"""The server as a client sees it, through llama-stack-client. Its errors become one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx
from llama_stack_client import APIConnectionError, APIError, APIStatusError, AuthenticationError, LlamaStackClient

from app.cli.errors import CommandError, refused
from app.cli.transcript import Transcript

TIMEOUT_SECONDS = 60.0
"""Without a byte; a stream that waits has a comment every few seconds."""


@dataclass(frozen=True)
class Conversation:
    """A session of an agent."""

    client: LlamaStackClient
    agent_id: str
    session_id: str

    @classmethod
    def open(
        cls, client: LlamaStackClient, model: str | None, instructions: str, *, max_tokens: int | None = None
    ) -> Self:
        """A new agent with a new session. Raises CommandError."""
        with one_line(client):
            config: dict[str, Any] = {"model": model or first_model(client), "instructions": instructions}
            if max_tokens:
                config["sampling_params"] = {"strategy": {"type": "greedy"}, "max_tokens": max_tokens}
            agents: Any = client.alpha.agents
            return cls.of_agent(client, agents.create(agent_config=config).agent_id)

    @classmethod
    def of_agent(cls, client: LlamaStackClient, agent_id: str, session_id: str | None = None) -> Self:
        """A session of an agent that there is; a new one, if none is named. Raises CommandError."""
        with one_line(client):
            if session_id is None:
                session_id = client.alpha.agents.session.create(agent_id, session_name="caravan chat").session_id
            return cls(client, agent_id, session_id)

    def say(self, text: str, *, show_steps: bool = False) -> str:
        """Runs a turn, shown as it comes; gives its id. Raises CommandError."""
        transcript = Transcript(show_steps=show_steps)
        with one_line(self.client):
            stream = self.client.alpha.agents.turn.create(
                session_id=self.session_id,
                agent_id=self.agent_id,
                messages=[{"role": "user", "content": text}],
                stream=True,
            )
            for chunk in stream:
                transcript.show(chunk.to_dict())
        if transcript.turn_id is None:
            raise CommandError("the stream ended before the turn did")
        if transcript.awaits_input:
            raise CommandError("the turn awaits the answer of a tool that this program does not have")
        return transcript.turn_id


def connect(url: str, api_key: str | None) -> LlamaStackClient:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the SDK makes it tell of every request
    return LlamaStackClient(base_url=url, api_key=api_key, timeout=TIMEOUT_SECONDS, max_retries=0)


def first_model(client: LlamaStackClient) -> str:
    """The first model for answers that the server has. Raises CommandError: there is none."""
    for model in client.models.list():
        if model.api_model_type == "llm":
            return model.identifier
    raise CommandError("the server has no models")


def worker_of(conversation: Conversation, turn_id: str) -> str:
    """The name of the worker that ran a turn. Raises CommandError."""
    client, agent_id, session_id = conversation.client, conversation.agent_id, conversation.session_id
    with one_line(client):
        turns = client.alpha.agents.turn
        answer = turns.with_raw_response.retrieve(turn_id, agent_id=agent_id, session_id=session_id)
        return str(answer.headers.get("X-Caravan-Worker", "unknown"))


@contextmanager
def one_line(client: LlamaStackClient) -> Iterator[None]:
    """Raises CommandError for what the SDK raises."""
    url = str(client.base_url).rstrip("/")
    try:
        yield
    except APIConnectionError as error:
        raise CommandError(f"no answer from {url}: {error.__cause__ or error}") from None
    except AuthenticationError as error:
        raise CommandError(refused(url, _message(error))) from None
    except APIStatusError as error:
        raise CommandError(f"{url} answered {error.status_code}: {_message(error)}") from None
    except APIError as error:
        raise CommandError(f"{url}: {error.message}") from None
    except httpx.HTTPError as error:  # in the midst of a stream the SDK lets these through
        raise CommandError(f"{url} broke off: {error}") from None


def _message(error: APIStatusError) -> str:
    body: Any = error.body
    detail = body.get("error", body) if isinstance(body, dict) else body
    message = detail.get("message", detail.get("detail", detail)) if isinstance(detail, dict) else detail
    return " ".join(str(message).split())
