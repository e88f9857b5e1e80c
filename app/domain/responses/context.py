"""What the model is told: items and recorded steps as chat completion messages, with every tool call answered.

Source: OpenAI's chat completions. A model server refuses a tool call without an answer, and an answer without its call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain.arguments import told
from app.domain.errors import TurnFailure
from app.domain.history import UNANSWERED
from app.domain.responses.steps import ApprovedStep, Call, InferenceStep, Item, Step, ToolStep

Message = dict[str, Any]

SEARCH = "knowledge_search"
"""The function that stands for `file_search` before a model: llama_stack's name of it."""
WEB_SEARCH = "web_search"
DENIED = "This tool call was not approved, and not made."


@dataclass(frozen=True)
class Entry:
    """An item of a conversation. `result`: what a built-in tool gave the model, where the item does not say it."""

    item: Item
    result: str | None = None


@dataclass(frozen=True)
class Past:
    """An earlier response of a chain: its input and its steps. Or a conversation's items, without steps."""

    entries: Sequence[Entry]
    steps: Sequence[Step] = ()


def entries(items: Iterable[Item]) -> list[Entry]:
    return [Entry(item) for item in items]


@dataclass(frozen=True)
class _Asked:
    """Tool calls of one assistant message, and what is known of their answers, by call id."""

    content: str | None
    calls: list[Message]
    answers: dict[str, Any]


@dataclass(frozen=True)
class _Answer:
    call_id: str
    content: Any


_Part = Message | _Asked | _Answer


def messages(
    instructions: str | None, past: Sequence[Past], items: Sequence[Item], journal: Sequence[Step]
) -> list[Message]:
    """All that the model is told: the instructions, what came before, this response's input and its steps so far.

    Raises TurnFailure: an output of a function call has no call.
    """
    sections = [*past, Past(entries(items), journal)]
    denied = _denied(entry.item for section in sections for entry in section.entries)
    parts = [part for section in sections for part in _of_section(section, denied)]
    told = [{"role": "system", "content": instructions}] if instructions else []
    return told + _answered(parts)


def _answered(parts: Sequence[_Part]) -> list[Message]:
    """Each call with its answer right behind it. A text and the calls behind it are one message, as the model said it.

    Models use an id twice: an output answers the call that has its id and was asked for last.
    """
    told: list[Message] = []
    answers: dict[str, Message] = {}
    for part in parts:
        if isinstance(part, _Answer):
            if part.call_id not in answers:
                message = f"input: No tool call found for function call output with call_id {part.call_id}"
                raise TurnFailure("invalid_request", message)
            answers[part.call_id]["content"] = part.content
        elif isinstance(part, _Asked):
            content = told.pop()["content"] if told and _is_said(told[-1]) else None
            told.append({"role": "assistant", "content": part.content or content, "tool_calls": part.calls})
            answered = [_tool_message(call["id"], part.answers.get(call["id"], UNANSWERED)) for call in part.calls]
            answers |= {message["tool_call_id"]: message for message in answered}
            told += answered
        else:
            told.append(part)
    return told


def _is_said(message: Message) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message


def _tool_message(call_id: str, content: Any) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _denied(items: Iterable[Item]) -> dict[str, str | None]:
    """Why calls were not approved, by the id of the request for approval."""
    answers = (item for item in items if item["type"] == "mcp_approval_response" and not item["approve"])
    return {item["approval_request_id"]: item.get("reason") for item in answers}


def _of_section(section: Past, denied: Mapping[str, str | None]) -> Iterator[_Part]:
    yield from _of_entries(section.entries, denied)
    made = {step.call_id: step.content for step in section.steps if isinstance(step, ToolStep)}
    for step in section.steps:
        if isinstance(step, InferenceStep | ApprovedStep):
            yield from _of_asking(step, made, denied)


def _of_asking(
    step: InferenceStep | ApprovedStep, made: Mapping[str, str], denied: Mapping[str, str | None]
) -> Iterator[_Part]:
    text = step.text if isinstance(step, InferenceStep) else ""
    calls = [call for call in step.calls if call.kind != "approval" or call.item_id in denied]
    answers = {call.call_id: made[call.call_id] for call in calls if call.call_id in made}
    answers |= {call.call_id: _refusal(denied[call.item_id]) for call in calls if call.kind == "approval"}
    if calls:
        yield _Asked(text or None, [_function(call) for call in calls], answers)
    elif text:
        yield {"role": "assistant", "content": text}


def _refusal(reason: str | None) -> str:
    return f"{DENIED} {reason or ''}".strip()


def _function(call: Call) -> Message:
    return _tool_call(call.call_id, call.name, call.arguments)


def _tool_call(call_id: str, name: str, arguments: str) -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": told(arguments or "{}")}}


def _of_entries(given: Sequence[Entry], denied: Mapping[str, str | None]) -> Iterator[_Part]:
    """Calls of functions that stand side by side were asked for in one message."""
    together: list[Message] = []
    for entry in given:
        item = entry.item
        if item["type"] == "function_call":
            together.append(_tool_call(item["call_id"], item["name"], item["arguments"]))
            continue
        if together:
            yield _Asked(None, together, {})
            together = []
        yield from _of_item(item, entry.result, denied)
    if together:
        yield _Asked(None, together, {})


def _of_item(item: Item, result: str | None, denied: Mapping[str, str | None]) -> Iterator[_Part]:
    kind = item["type"]
    if kind == "message":
        message = _message(item)
        if message["role"] != "assistant" or message["content"]:  # model servers refuse an empty one
            yield message
    elif kind == "function_call_output":
        yield _Answer(item["call_id"], _output(item["output"]))
    elif kind == "mcp_call":
        yield _made(item["id"], item["name"], item["arguments"], _told_of(item))
    elif kind == "mcp_approval_request" and item["id"] in denied:
        yield _made(item["id"], item["name"], item["arguments"], _refusal(denied[item["id"]]))
    elif kind == "file_search_call":
        found = result if result is not None else json.dumps(item.get("results") or [], ensure_ascii=False)
        yield _made(item["id"], SEARCH, json.dumps({"query": " ".join(item.get("queries") or [])}), found)
    elif kind == "web_search_call" and result is not None:
        query = (item.get("action") or {}).get("query") or ""
        yield _made(item["id"], WEB_SEARCH, json.dumps({"query": query}), result)


def _told_of(item: Item) -> str:
    """What a model is told of an `mcp_call`: newer clients give its error as an object."""
    match item.get("error"):
        case str(error) | {"content": [{"type": "text", "text": str(error)}]} if error:
            return error
        case error if error:
            return json.dumps(error, ensure_ascii=False)
    return item.get("output") or ""


def _made(call_id: str, name: str, arguments: str, content: str) -> _Asked:
    return _Asked(None, [_tool_call(call_id, name, arguments)], {call_id: content})


def _message(item: Item) -> Message:
    role, content = item["role"], item["content"]
    if isinstance(content, str):
        return {"role": role, "content": content}
    if role == "assistant":
        return {"role": role, "content": "".join(part.get("text") or part.get("refusal") or "" for part in content)}
    return {"role": role, "content": _content(content)}


def _content(given: Sequence[Mapping[str, Any]]) -> Any:
    """One text as such: not every model server's template takes a list, for the system's message above all."""
    parts = [_content_part(part) for part in given] or [{"type": "text", "text": ""}]
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


def _content_part(part: Mapping[str, Any]) -> Message:
    if part["type"] == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail") or "auto"}}
    return {"type": "text", "text": part.get("text") or part.get("refusal") or ""}


def _output(output: Any) -> Any:
    """Of a function: text, or a list of content parts, of which only text goes into a tool's message."""
    return output if isinstance(output, str) else _content(output)


def approved_calls(given: Sequence[Item], before: Sequence[Item]) -> list[Item]:
    """The approval requests that the input approves, in the order asked. `before`: all items that came before it.

    Raises TurnFailure: there is no such request, or it was answered already, so that its call would be made again.
    """
    requests = {item["id"]: item for item in (*before, *given) if item["type"] == "mcp_approval_request"}
    answered = {item["approval_request_id"] for item in before if item["type"] == "mcp_approval_response"}
    approved = set()
    for item in given:
        if item["type"] == "mcp_approval_response":
            request_id = item["approval_request_id"]
            if request_id not in requests or request_id in answered:
                problem = "was answered before" if request_id in answered else "not found"
                raise TurnFailure("invalid_request", f"input: Approval request {request_id} {problem}")
            answered.add(request_id)
            approved |= {request_id} if item["approve"] else set()
    return [item for request_id, item in requests.items() if request_id in approved]
