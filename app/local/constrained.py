"""Tool calls that a very small model cannot get wrong: a grammar of the offered tools, or a plain answer.

Left to itself the small model never makes a call that can be read. So a chat completion with `tools` becomes one whose
output is held to a JSON schema: for each tool an object `{"name": …, "arguments": …}`, and `{"answer": …}`. What comes
out is told in OpenAI's shape again (`Reader`). Pure: knows neither the model nor HTTP.

Once a tool's result follows the last user's message, the model answers freely, whatever `tool_choice` says: it has been
satisfied, and a model of this size would go on calling the same tool for as long as it is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from app.local.bounded import bounded

JSON = dict[str, Any]

ANSWER_LENGTH = 2000
STRING_LENGTH = 500
SHORTEST_STRING = 16
"""Characters. Strings in arguments are bounded, so that the end of a call comes before that of the tokens."""

RESULT_LENGTH = 8000
OLD_RESULT_LENGTH = 500
"""Characters of a tool's result that the model is shown; less of results before the last user's message."""

DESCRIPTION_LENGTH = 200
REPEAT_PENALTY = 1.15  # without, it says the same word until the end of the string

_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")


@dataclass(frozen=True)
class Constraint:
    """What the model server is to be asked: the request, and the JSON schema that its output has."""

    request: JSON
    schema: JSON


def constrained(request: JSON) -> Constraint | None:
    """None: nothing is to be constrained; `plain` makes of the request what the model can take."""
    tools = _callable(request)
    choice = request.get("tool_choice", "auto")
    if not tools or choice == "none" or _has_format(request) or _has_result(request.get("messages", [])):
        return None
    must = choice == "required" or isinstance(choice, dict)
    asked = plain(request)
    asked["messages"] = _with_tools(asked["messages"], tools, must)
    asked.setdefault("repeat_penalty", REPEAT_PENALTY)
    length = _string_length(request, tools)
    alternatives = [_call_schema(tool, length) for tool in tools]
    if not must:
        alternatives.append(_object({"answer": {"type": "string", "minLength": 1, "maxLength": ANSWER_LENGTH}}))
    return Constraint(asked, {"anyOf": alternatives, "x-guidance": {"whitespace_flexible": False}})


def plain(request: JSON) -> JSON:
    """The request without tools; calls and results in the conversation are text, which any chat template takes."""
    messages = request.get("messages")
    kept = {name: value for name, value in request.items() if name not in _OF_TOOLS}
    return {**kept, "messages": list(_as_text(messages))} if _is_conversation(messages) else kept


def _is_conversation(messages: Any) -> TypeGuard[list[JSON]]:
    return isinstance(messages, list) and all(isinstance(message, dict) for message in messages)


def _has_format(request: JSON) -> bool:
    wanted = request.get("response_format")
    return bool(request.get("grammar")) or (isinstance(wanted, dict) and wanted.get("type") != "text")


def _has_result(messages: Any) -> bool:
    if not _is_conversation(messages):
        return True  # the model server says what is wrong with it
    return any(message.get("role") == "tool" for message in messages[_last_user(messages) :])


def _last_user(messages: list[JSON]) -> int:
    return max((index for index, message in enumerate(messages) if message.get("role") == "user"), default=0)


def _callable(request: JSON) -> list[JSON]:
    """The functions that may be called: all, or the one that `tool_choice` names, if it is there."""
    tools = request.get("tools")
    offered = tools if isinstance(tools, list) else []
    functions = [
        tool["function"] for tool in offered if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    named = [function for function in functions if isinstance(function.get("name"), str)]
    choice = request.get("tool_choice")
    wanted = choice.get("function", choice).get("name") if isinstance(choice, dict) else None
    return [function for function in named if function["name"] == wanted] or named


# --- the conversation -------------------------------------------------------------------------------------------------


def _as_text(messages: list[JSON]) -> Iterator[JSON]:
    names: dict[str, str] = {}
    last_user = _last_user(messages)
    for index, message in enumerate(messages):
        if message.get("role") == "tool":
            length = RESULT_LENGTH if index > last_user else OLD_RESULT_LENGTH
            name = names.get(str(message.get("tool_call_id")), "the tool")
            yield {"role": "user", "content": f"Result of {name}:\n{_cut(_text(message.get('content')), length)}"}
        elif message.get("role") == "assistant":
            called = {str(call.get("id")): call["function"]["name"] for call in message.get("tool_calls") or ()}
            names |= called
            # Its own JSON it would only repeat where it is to answer.
            said = [_text(message.get("content")), *(f"I use {name}." for name in called.values())]
            yield {"role": "assistant", "content": "\n".join(filter(None, said))}
        else:
            yield message


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _with_tools(messages: list[JSON], tools: list[JSON], must: bool) -> list[JSON]:
    """The tools at the end of the system message, in the few words that the model understands best (it was tried)."""
    lines = [f"- {tool['name']}({', '.join(_properties(tool))}): {_described(tool)}" for tool in tools]
    told = "\n".join(
        ["You can use these tools:", *lines, "", "To use a tool, reply with its name and its arguments as JSON."]
    )
    if not must:
        told += " If no tool is needed, reply with your answer as JSON."
    if messages and messages[0].get("role") == "system":
        first, *rest = messages
        return [{**first, "content": f"{_text(first.get('content'))}\n\n{told}"}, *rest]
    return [{"role": "system", "content": told}, *messages]


def _described(tool: JSON) -> str:
    return _cut(" ".join(str(tool.get("description") or "").split()), DESCRIPTION_LENGTH)


def _properties(tool: JSON) -> JSON:
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


# --- the schema -------------------------------------------------------------------------------------------------------


def _call_schema(tool: JSON, length: int) -> JSON:
    parameters = tool.get("parameters")
    given = {**parameters, "type": "object"} if isinstance(parameters, dict) else {"type": "object"}
    return _object({"name": {"const": tool["name"]}, "arguments": bounded(given, length)})


def _object(properties: JSON) -> JSON:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def _string_length(request: JSON, tools: list[JSON]) -> int:
    """So that a call fits into the tokens that are allowed, even if every character is one."""
    allowed = request.get("max_completion_tokens") or request.get("max_tokens")
    if not isinstance(allowed, int) or allowed <= 0:
        return STRING_LENGTH
    most = max(len(_properties(tool)) for tool in tools) or 1
    return max(SHORTEST_STRING, min(STRING_LENGTH, (allowed - 64) // most))


# --- what the model says ----------------------------------------------------------------------------------------------

_ANSWER = re.compile(r'\s*\{\s*"answer"\s*:\s*"')
_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')
_WHOLE_CHARACTERS = re.compile(r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_HALF_A_PAIR = re.compile("[\ud800-\udbff]$")


class Reader:
    """Reads the model's output as it comes: `feed` each piece, then ask for the `call`."""

    def __init__(self) -> None:
        self._said = ""
        self._told = 0

    def feed(self, piece: str) -> str:
        """What can be told of the answer now; nothing of a call."""
        self._said += piece
        if not (begun := _ANSWER.match(self._said)):
            return ""
        found = _WHOLE_CHARACTERS.match(self._said, begun.end())
        assert found is not None  # it matches nothing, too
        answer: str = json.loads(f'"{found[0]}"', strict=False)
        answer = _HALF_A_PAIR.sub("", answer)
        new, self._told = answer[self._told :], len(answer)
        return new

    def call(self) -> tuple[str, str] | None:
        """The name and the arguments, which are no whole JSON if the tokens were used up before. None: an answer."""
        found = _CALL.match(self._said)
        if not found:
            return None
        arguments = self._said[found.end() :].rstrip()
        try:
            whole = json.loads(self._said)
        except ValueError:
            return json.loads(found[1]), arguments
        return whole["name"], _compact(whole["arguments"])

    def rest(self) -> str:
        """What is neither an answer nor a call, and so was not told: a model that was not held to the schema."""
        return "" if _ANSWER.match(self._said) or _CALL.match(self._said) else self._said
