"""Input and output items of OpenAI's Responses and Conversations: which ones there are here, and what each must hold.

An item is a dict as it came, with the fields filled in that every reader expects and a sender may leave out. Fields
that are not known here are kept.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.domain.errors import InvalidRequest, NotFound

Item = dict[str, Any]

ITEM_ID_MAX_LENGTH = 255
_LEVELS_AROUND = 16
"""How deep, at most, an item lies in what is sent: Python's JSON has a limit there."""
_CONVERSATION_ID = re.compile(r"conv_(?i:([0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}))")


def conversation_id(session_id: str) -> str:
    """The id of the conversation that a session is."""
    return f"conv_{uuid.UUID(session_id).hex}"


def session_of_conversation(identifier: str) -> str:
    """The id of the session that a conversation is. Raises NotFound: this is no id of a conversation."""
    found = _CONVERSATION_ID.fullmatch(identifier)
    if not found:
        raise NotFound("Conversation", identifier)
    return str(uuid.UUID(found[1]))


# --- what each kind of item must hold ---------------------------------------------------------------------------------


class _Object(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Known(_Object):
    id: str | None = Field(default=None, min_length=1, max_length=ITEM_ID_MAX_LENGTH, pattern=r"^[^\x00]*$")
    status: Literal["in_progress", "completed", "incomplete", "searching", "calling", "failed"] | None = None


class _InputText(_Object):
    type: Literal["input_text"]
    text: str


class _InputImage(_Object):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "high", "auto", "original"]


class _OutputText(_Object):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]


class _Refusal(_Object):
    type: Literal["refusal"]
    refusal: str


_CONTENT: dict[str, type[_Object]] = {
    "input_text": _InputText,
    "input_image": _InputImage,
    "output_text": _OutputText,
    "refusal": _Refusal,
}
_TEXT_ONLY: dict[str, type[_Object]] = {"input_text": _InputText}


class _Message(_Known):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Any]  # of _CONTENT


class _FunctionCall(_Known):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class _FunctionCallOutput(_Known):
    type: Literal["function_call_output"]
    call_id: str
    output: Any  # text, or a list of _TEXT_ONLY


class _McpCall(_Known):
    type: Literal["mcp_call"]
    server_label: str
    name: str
    arguments: str
    output: str | None = None
    error: Any = None  # text; newer clients give an object


class _McpTool(_Object):
    name: str
    input_schema: dict[str, Any]


class _McpListTools(_Known):
    type: Literal["mcp_list_tools"]
    server_label: str
    tools: list[_McpTool]


class _McpApprovalRequest(_Known):
    type: Literal["mcp_approval_request"]
    server_label: str
    name: str
    arguments: str


class _McpApprovalResponse(_Known):
    type: Literal["mcp_approval_response"]
    approval_request_id: str
    approve: bool
    reason: str | None = None


class _WebSearchCall(_Known):
    type: Literal["web_search_call"]
    action: dict[str, Any] | None = None


class _FileSearchCall(_Known):
    type: Literal["file_search_call"]
    queries: list[str]
    results: list[dict[str, Any]] | None = None


class _Reasoning(_Known):
    type: Literal["reasoning"]
    summary: list[dict[str, Any]]
    content: list[dict[str, Any]] | None = None


_KINDS: dict[str, type[_Object]] = {
    "message": _Message,
    "function_call": _FunctionCall,
    "function_call_output": _FunctionCallOutput,
    "mcp_call": _McpCall,
    "mcp_list_tools": _McpListTools,
    "mcp_approval_request": _McpApprovalRequest,
    "mcp_approval_response": _McpApprovalResponse,
    "web_search_call": _WebSearchCall,
    "file_search_call": _FileSearchCall,
    "reasoning": _Reasoning,
}
_ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "mcp_call": "mcp",
    "mcp_list_tools": "mcpl",
    "mcp_approval_request": "mcpr",
    "mcp_approval_response": "mcpa",
    "web_search_call": "ws",
    "file_search_call": "fs",
    "reasoning": "rs",
}
_WITH_STATUS = _KINDS.keys() - {"mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "reasoning"}


def checked(items: Iterable[Any], where: str = "items") -> list[Item]:
    """The items in the form in which they are stored: with `type`, with `status`, and a message's content as a list.

    Raises InvalidRequest, naming the field, as in `items[2].content[0].text`.
    """
    found = [_checked(item, f"{where}[{index}]") for index, item in enumerate(items)]
    seen: set[str] = set()
    for index, item in enumerate(found):
        if item.get("id") in seen:
            raise refused(f"{where}[{index}].id", f"another item has the id '{item['id']}' too")
        seen |= {item["id"]} if "id" in item else set()
    return found


def refused(field: str, problem: str) -> InvalidRequest:
    """The error for a field, as in `items[2].content[0].text`, which its message and its `param` name."""
    return InvalidRequest(f"{field}: {problem}", field)


def with_ids(items: Iterable[Item]) -> list[Item]:
    """The items, each with an id of its kind (`msg_…`) where it has none."""
    return [item if "id" in item else {"id": _new_id(item["type"]), **item} for item in items]


def _new_id(kind: str) -> str:
    return f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"


def _checked(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        raise refused(where, "must be an object")
    check_json(item, where)
    kind = item.get("type") or ("message" if "role" in item else None)
    shape = _shape(_KINDS, kind, where)
    filled = _filled(str(kind), item)
    _check(shape, filled, where)
    if kind == "message":
        _check_parts(_CONTENT, filled["content"], f"{where}.content")
    elif kind == "function_call_output" and not isinstance(filled["output"], str):
        _check_parts(_TEXT_ONLY, filled["output"], f"{where}.output")
    return filled


def _check_parts(kinds: dict[str, type[_Object]], parts: Any, where: str) -> None:
    if not isinstance(parts, list):
        raise refused(where, "must be text or a list")
    for index, part in enumerate(parts):
        if not isinstance(part, dict):
            raise refused(f"{where}[{index}]", "must be an object")
        _check(_shape(kinds, part.get("type"), f"{where}[{index}]"), part, f"{where}[{index}]")


def _shape(kinds: dict[str, type[_Object]], kind: Any, where: str) -> type[_Object]:
    if not isinstance(kind, str) or kind not in kinds:
        problem = "is missing" if kind is None else f"{kind!r} is not supported"
        raise refused(f"{where}.type", f"{problem}; there are {', '.join(kinds)}")
    return kinds[kind]


def _check(shape: type[_Object], value: Item, where: str) -> None:
    parsed(shape, value, where)


def parsed[Shape: BaseModel](shape: type[Shape], value: Mapping[str, Any], where: str) -> Shape:
    """Raises InvalidRequest: what is wrong first, and where."""
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise refused(where + path, first["msg"]) from None


def check_json(value: Any, where: str) -> None:
    """Raises InvalidRequest: this came as JSON, but cannot be stored and sent as such."""
    for _ in range(_LEVELS_AROUND):
        value = [value]
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise refused(where, "is nested too deeply") from None
    except UnicodeEncodeError:
        raise refused(where, "half of a surrogate pair is no character") from None
    except ValueError:
        raise refused(where, "NaN and Infinity are no JSON") from None


def _filled(kind: str, item: Item) -> Item:
    """With what a sender may leave out and a reader expects. A null where a default belongs counts as left out."""
    filled = {name: value for name, value in item.items() if not (name in ("id", "status") and value is None)}
    filled["type"] = kind
    if kind in _WITH_STATUS:
        filled.setdefault("status", "completed")
    if kind == "message":
        filled["content"] = _content(item.get("role"), item.get("content"))
    elif kind == "reasoning":
        filled.setdefault("summary", [])
    return filled


def _content(role: Any, content: Any) -> Any:
    if isinstance(content, str):
        content = [{"type": "output_text" if role == "assistant" else "input_text", "text": content}]
    return [_content_part(part) for part in content] if isinstance(content, list) else content


def _content_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "output_text":
        return {**part, "annotations": part.get("annotations") or []}
    if kind == "input_image":
        return {**part, "detail": part.get("detail") or "auto"}
    return part
