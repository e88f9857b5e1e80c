"""Llama Stack messages as OpenAI's chat completion messages, and the request that an agent's turn makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_stack.apis.agents import AgentConfig
from llama_stack.apis.common.content_types import ImageContentItem, TextContentItem
from llama_stack.apis.inference import (
    JsonSchemaResponseFormat,
    Message,
    OpenAIChatCompletionRequestWithExtraBody,
    ToolResponseMessage,
)
from llama_stack.providers.utils.inference.openai_compat import convert_message_to_openai_dict_new
from pydantic import BaseModel

from app.domain import arguments

OpenAITool = dict[str, Any]

_IMAGE = "[an image, which the user is shown and you are not]"


async def chat_request(
    config: AgentConfig, messages: Sequence[Message], tools: Sequence[OpenAITool]
) -> OpenAIChatCompletionRequestWithExtraBody:
    """The streaming chat completion for the agent's next inference."""
    strategy = config.sampling_params.strategy if config.sampling_params else None
    return OpenAIChatCompletionRequestWithExtraBody(
        model=config.model,
        messages=[await _openai(message) for message in messages],
        tools=list(tools) or None,
        tool_choice=_tool_choice(config) if tools else None,
        response_format=_response_format(config),
        temperature=getattr(strategy, "temperature", None),
        top_p=getattr(strategy, "top_p", None),
        # 0 is the default of 0.2 and 0.3 clients, and means no limit.
        max_tokens=(config.sampling_params.max_tokens or None) if config.sampling_params else None,
        stop=(config.sampling_params.stop or None) if config.sampling_params else None,
        stream=True,
    )


async def _openai(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(await convert_message_to_openai_dict_new(_texts_only(message)))
    for call in plain.get("tool_calls") or ():
        call["function"]["arguments"] = arguments.told(call["function"]["arguments"])
    return plain


def _texts_only(message: Message) -> Message:
    """OpenAI's tool messages are text: an image in a tool's response is for the user, and the model is told of it."""
    if not isinstance(message, ToolResponseMessage) or isinstance(message.content, str):
        return message
    content = message.content if isinstance(message.content, list) else [message.content]
    texts = [TextContentItem(text=_IMAGE) if isinstance(item, ImageContentItem) else item for item in content]
    return message.model_copy(update={"content": texts})


def _tool_choice(config: AgentConfig) -> str | dict[str, Any] | None:
    choice = config.tool_config.tool_choice if config.tool_config else None
    if not choice:
        return None
    name = getattr(choice, "value", None) or str(choice)
    if name in ("auto", "none", "required"):
        return str(name)
    return {"type": "function", "function": {"name": name}}


def _response_format(config: AgentConfig) -> dict[str, Any] | None:
    """OpenAI's spelling: its schema has a name, the Llama Stack's has none."""
    if isinstance(config.response_format, JsonSchemaResponseFormat):
        schema = {"name": "response", "schema": config.response_format.json_schema}
        return {"type": "json_schema", "json_schema": schema}
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
