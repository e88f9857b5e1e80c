"""Events of Responses that OpenAI and Llama Stack name differently."""

from __future__ import annotations

from dataclasses import replace

from app.domain.events import Event

_OPENAI, _LLAMA_STACK = '{"type":"response.mcp_call_arguments.', '{"type":"response.mcp_call.arguments.'


def with_llama_stack_names(event: Event) -> Event:
    """`response.mcp_call.arguments.delta` and `.done`: llama-stack-client from 0.3, ogx-client."""
    if not event.data.startswith(_OPENAI):
        return event
    return replace(event, data=_LLAMA_STACK + event.data.removeprefix(_OPENAI))
