"""Arguments of tool calls: 0.3.5 has a JSON string, clients before 0.3 an object and the string beside it.

0.1 to 0.2: `{call_id, tool_name, arguments: {…}, arguments_json: "…"}`. `AsyncAgent` and `invoke_tool` of 0.1 and 0.2
spread the object, `Agent` parses the string, 0.1.5 and older know the object only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from app.domain import arguments
from app.domain.events import Event, EventKind, ascii_json

JSON = dict[str, Any]


def with_object(call: JSON) -> JSON:
    """For clients before 0.3: a ToolCall with its arguments as an object, and `arguments_json`.

    Arguments that are no JSON object, which models do produce, stay a string: old clients accept that too, and tell
    the model that the call has failed. So do those that would make an answer that cannot be sent or read: with numbers
    that JSON has not, half a surrogate pair, or nested more than 200 deep.
    """
    text = call["arguments"]
    return {**call, "arguments": _parsed(text), "arguments_json": text}


def _parsed(text: str) -> JSON | str:
    try:
        return arguments.parsed(text)
    except ValueError:
        return text


def with_string(call: Any) -> Any:
    """From clients before 0.3: a ToolCall in 0.3.5's shape. Whatever is none is left for the validation to refuse."""
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return call
    text = call.get("arguments_json") or json.dumps(call["arguments"])
    return {**{name: value for name, value in call.items() if name != "arguments_json"}, "arguments": text}


def in_message(message: JSON) -> JSON:
    """For clients before 0.3: a CompletionMessage."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [with_object(call) for call in message["tool_calls"]]}


def in_step(step: JSON) -> JSON:
    """For clients before 0.3: a Step of any type."""
    if step["step_type"] == "inference":
        return {**step, "model_response": in_message(step["model_response"])}
    return in_message(step)  # a tool execution's calls have the same place; other steps have none


def in_turn(turn: JSON) -> JSON:
    """For clients before 0.3: a Turn."""
    return {
        **turn,
        "input_messages": [named(message) for message in turn["input_messages"]],
        "steps": [in_step(step) for step in turn["steps"]],
        "output_message": in_message(turn["output_message"]),
    }


def named(message: JSON) -> JSON:
    """For clients up to 0.1.6: a ToolResponseMessage with the `tool_name` that they insist on, and 0.3.5 has not."""
    return {**message, "tool_name": ""} if message["role"] == "tool" else message


def in_event(event: Event) -> Event:
    """For clients before 0.3: an event whose calls have objects; the id stays.

    A delta of a call that is still `in_progress` is a string for every version. The text is searched before it is
    parsed: most events are deltas of text.
    """
    if event.kind not in _IN_PAYLOAD or '"tool' not in event.data:
        return event
    chunk = json.loads(event.data)
    payload = _IN_PAYLOAD[event.kind](chunk["event"]["payload"])
    return replace(event, data=ascii_json({**chunk, "event": {**chunk["event"], "payload": payload}}))


def _in_progress(payload: JSON) -> JSON:
    delta = payload["delta"]
    if not isinstance(delta.get("tool_call"), dict):
        return payload
    return {**payload, "delta": {**delta, "tool_call": with_object(delta["tool_call"])}}


_IN_PAYLOAD: dict[EventKind, Callable[[JSON], JSON]] = {
    EventKind.STEP_PROGRESS: _in_progress,
    EventKind.STEP_COMPLETE: lambda payload: {**payload, "step_details": in_step(payload["step_details"])},
    EventKind.TURN_AWAITING_INPUT: lambda payload: {**payload, "turn": in_turn(payload["turn"])},
    EventKind.TURN_COMPLETE: lambda payload: {**payload, "turn": in_turn(payload["turn"])},
}
