"""The request that an agent's turn makes of the model."""

from __future__ import annotations

from typing import Any

import pytest
from llama_stack.apis.agents import AgentConfig
from llama_stack.apis.inference import UserMessage

from tasks.engine.messages import chat_request

TOOL = {"type": "function", "function": {"name": "add"}}


async def body(tools: list[Any] | None = None, **agent: Any) -> dict[str, Any]:
    config = AgentConfig(**{"model": "m", "instructions": "", **agent})
    request = await chat_request(config, [UserMessage(content="hi")], tools or [])
    dumped: dict[str, Any] = request.model_dump(exclude_none=True)
    return dumped


async def test_nothing_is_asked_for_that_was_not_configured() -> None:
    """A default max_tokens of 0 means none; a tool choice needs tools."""
    plain = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert await body() == plain
    assert await body(tool_config={"tool_choice": "required"}) == plain


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ("add", {"type": "function", "function": {"name": "add"}}),
    ],
)
async def test_a_tool_choice_is_openais(choice: str, sent: Any) -> None:
    """A name is a function to call."""
    asked = await body([TOOL], tool_config={"tool_choice": choice})
    assert (asked["tool_choice"], asked["tools"]) == (sent, [TOOL])


async def test_sampling_parameters_are_sent() -> None:
    """Those that OpenAI's request knows."""
    strategy = {"type": "top_p", "temperature": 0.5, "top_p": 0.9}
    asked = await body(sampling_params={"strategy": strategy, "max_tokens": 9, "stop": ["END"]})
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["stop"]) == (0.5, 0.9, 9, ["END"])


async def test_a_response_format_has_openais_spelling() -> None:
    """The schema gets a name."""
    schema = {"type": "object", "properties": {}}
    asked = await body(response_format={"type": "json_schema", "json_schema": schema})
    assert asked["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "response", "schema": schema},
    }
