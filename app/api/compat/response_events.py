"""Responses, their items and events, where OpenAI's clients and Llama Stack's read them differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, Request

from app.api.compat.version import is_llama_stack, is_ogx
from app.domain.events import Event, ascii_json

_OPENAI, _LLAMA_STACK = '{"type":"response.mcp_call_arguments.', '{"type":"response.mcp_call.arguments.'
_HOLD_ITEMS = ("data", "input", "item", "output", "response")


@dataclass(frozen=True)
class ResponseDialect:
    """`told`: of a response, an item, or a page of either. `event`: of one as it is logged."""

    told: Callable[[Any], Any]
    event: Callable[[Event], Event]


def with_llama_stack_names(event: Event) -> Event:
    """`response.mcp_call.arguments.delta` and `.done`: llama-stack-client from 0.3, ogx-client."""
    if not event.data.startswith(_OPENAI):
        return event
    return replace(event, data=_LLAMA_STACK + event.data.removeprefix(_OPENAI))


def with_error_objects(told: Any) -> Any:
    """The error of an `mcp_call`, which is a text in 0.3.5 and in what is stored: openai from 3."""
    if isinstance(told, list):
        return [with_error_objects(each) for each in told]
    if not isinstance(told, dict):
        return told
    if told.get("type") == "mcp_call" and isinstance(error := told.get("error"), str):
        return {**told, "error": {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": error}]}}
    return {name: with_error_objects(member) if name in _HOLD_ITEMS else member for name, member in told.items()}


def _event_with_error_objects(event: Event) -> Event:
    if '"type":"mcp_call"' not in event.data:
        return event
    return replace(event, data=ascii_json(with_error_objects(json.loads(event.data))))


LLAMA_STACK = ResponseDialect(lambda told: told, with_llama_stack_names)
OPENAI = ResponseDialect(with_error_objects, _event_with_error_objects)


def _dialect(request: Request) -> ResponseDialect:
    return LLAMA_STACK if is_llama_stack(request.headers) or is_ogx(request.headers) else OPENAI


CurrentResponseDialect = Annotated[ResponseDialect, Depends(_dialect)]
