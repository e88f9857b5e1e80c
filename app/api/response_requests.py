"""What a request for a response may say: each field is honoured, or refused by its name. Nothing is dropped.

Source: OpenAI's API reference for `POST /responses`, the parameters of the current openai SDK, and llama_stack's own
`max_infer_iters` and `guardrails`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from app.api.validation import plain
from app.domain import items
from app.domain.errors import InvalidRequest
from app.domain.items import Item
from app.domain.responses.decide import MAX_INFER_ITERS
from app.identity.secrets import sendable

SUPPORTED_INCLUDES = {
    "file_search_call.results",
    "message.input_image.image_url",  # an image is always given with its URL
    "reasoning.encrypted_content",  # a reasoning is always given whole
}
SECRETS_OF_TOOLS = {"headers", "authorization"}
"""Members of an `mcp` tool that are not stored with the request."""

_Words = Annotated[str, Field(max_length=512)]


class _Strict(BaseModel):
    """Has no other fields than these; a null asks for nothing."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class ConversationReference(_Strict):
    id: str


class StreamOptions(_Strict):
    include_obfuscation: Literal[False] | None = None


class Reasoning(_Strict):
    """Passed to the model server as `reasoning_effort`."""

    effort: str | None = None


class TextFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(_Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


def _no_guardrails(given: Any) -> Any:
    """Never as if they were there."""
    if given:
        raise ValueError("responses have no guardrails; agents have shields")
    return given


class CreateResponse(BaseModel):
    """Fields that are refused where they ask for something are `JsonValue`: see `check`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"model": "my-model", "input": "Say hello.", "stream": True},
                {
                    "model": "my-model",
                    "input": [{"role": "user", "content": "How warm is it in Athens?"}],
                    "tools": [
                        {
                            "type": "function",
                            "name": "temperature",
                            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                        }
                    ],
                    "background": True,
                },
            ]
        },
    )

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: str | list[dict[str, JsonValue]] | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationReference | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    max_infer_iters: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description=f"llama_stack's: how often the model is asked at most, by default {MAX_INFER_ITERS}"
    )
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], _Words], Field(max_length=16)] | None = None
    user: _Words | None = None
    safety_identifier: _Words | None = None
    prompt_cache_key: _Words | None = None
    service_tier: Literal["auto", "default"] | None = None
    truncation: Literal["disabled"] | None = None
    top_logprobs: Literal[0] | None = None
    guardrails: Annotated[list[JsonValue], Field(max_length=0), BeforeValidator(_no_guardrails)] | None = None


class FunctionTool(_Strict):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolFilter(_Strict):
    tool_names: list[str] | None = None
    read_only: bool | None = None


class ApprovalFilter(_Strict):
    always: ToolFilter | list[str] | None = None
    never: ToolFilter | list[str] | None = None


class McpTool(_Strict):
    type: Literal["mcp"]
    server_label: Annotated[str, Field(min_length=1, max_length=256)]
    server_url: Annotated[str, Field(pattern=r"^https?://", max_length=4096)]
    server_description: str | None = None
    headers: dict[str, str] | None = None
    authorization: str | None = None
    require_approval: Literal["always", "never"] | ApprovalFilter | None = None
    allowed_tools: list[str] | ToolFilter | None = None


class FileSearchTool(_Strict):
    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], Field(min_length=1)]
    filters: dict[str, JsonValue] | None = None
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None
    ranking_options: dict[str, JsonValue] | None = None


class WebSearchTool(_Strict):
    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]
    search_context_size: Literal["medium"] | None = None


_TOOLS: dict[str, type[BaseModel]] = {
    "function": FunctionTool,
    "mcp": McpTool,
    "file_search": FileSearchTool,
    "web_search": WebSearchTool,
    "web_search_2025_08_26": WebSearchTool,
    "web_search_preview": WebSearchTool,
    "web_search_preview_2025_03_11": WebSearchTool,
}
_ECHOED: dict[str, dict[str, Any]] = {"function": {"parameters": None, "strict": None}, "mcp": {"allowed_tools": None}}
"""Fields that readers expect of a tool in a response."""
_ONCE = ("file_search", "web_search")


def stored_request(body: CreateResponse) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """(the request as it is stored, the headers for each MCP server by its label, which are not).

    Raises InvalidRequest, naming the field.
    """
    _check(body)
    tools, headers = _tools(body.tools or [])
    conversation = body.conversation.id if isinstance(body.conversation, ConversationReference) else body.conversation
    text = body.text.model_dump(mode="json", exclude_none=True, by_alias=True) if body.text else {}
    stored = body.model_dump(mode="json", exclude_none=True, exclude={"stream", "stream_options", "input", "text"})
    return stored | {
        "input": items.with_ids(_input(body)),
        "tools": tools,
        "text": {"format": {"type": "text"}, **text},
        "conversation": conversation,
        "tool_choice": body.tool_choice or "auto",
        "metadata": body.metadata or {},
        "truncation": body.truncation or "disabled",
    }, headers


def _check(body: CreateResponse) -> None:
    for name, value in (body.model_extra or {}).items():
        if value is not None:
            raise InvalidRequest(f"{name}: this parameter is not supported", name)
    check_includes(body.include or ())
    if body.previous_response_id is not None and body.conversation is not None:
        raise InvalidRequest("previous_response_id: not together with conversation", "previous_response_id")
    if body.background and body.store is False:
        raise InvalidRequest("background: needs store to be true", "background")
    if body.input is None and body.previous_response_id is None and body.conversation is None:
        raise InvalidRequest("input: is missing", "input")
    wanted = body.text.format if body.text else None
    if wanted and wanted.type == "json_schema" and (not wanted.name or wanted.schema_ is None):
        raise InvalidRequest("text.format: json_schema needs name and schema", "text.format")
    plain(body)
    _check_choice(body.tool_choice)


def check_includes(asked: Iterable[str]) -> None:
    """Raises InvalidRequest: what is to be included is not there."""
    for name in asked:
        if name not in SUPPORTED_INCLUDES:
            there = ", ".join(sorted(SUPPORTED_INCLUDES))
            raise InvalidRequest(f"include: {name!r} is not supported; there are {there}", "include")


def _check_choice(choice: Any) -> None:
    if not isinstance(choice, dict):
        return
    kind = choice.get("type")
    if kind in _TOOLS and (kind != "function" or isinstance(choice.get("name"), str)):
        return
    tools = choice.get("tools")
    known = isinstance(tools, list) and all(isinstance(tool, dict) and tool.get("type") in _TOOLS for tool in tools)
    if kind == "allowed_tools" and known and choice.get("mode") in (None, "auto", "required"):
        return
    raise InvalidRequest(f"tool_choice: {kind!r} is not supported in this form", "tool_choice")


def _input(body: CreateResponse) -> list[Item]:
    if body.input is None:
        return []
    if isinstance(body.input, str):
        return items.checked([{"type": "message", "role": "user", "content": body.input}], "input")
    return items.checked(body.input, "input")


def _tools(given: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    found: list[dict[str, Any]] = []
    headers: dict[str, dict[str, str]] = {}
    for index, tool in enumerate(given):
        checked = _tool(tool, f"tools[{index}]")
        if isinstance(checked, McpTool):
            if any(each.get("server_label") == checked.server_label for each in found):
                raise items.refused(f"tools[{index}].server_label", f"{checked.server_label!r} is there twice")
            if own := _headers(checked, f"tools[{index}]"):
                headers[checked.server_label] = own
        if isinstance(checked, FunctionTool) and any(each.get("name") == checked.name for each in found):
            raise items.refused(f"tools[{index}].name", f"{checked.name!r} is there twice")
        stored = checked.model_dump(mode="json", exclude=SECRETS_OF_TOOLS, exclude_unset=True)
        kinds = [each["type"].split("_20")[0].removesuffix("_preview") for each in (*found, stored)]
        if any(kinds.count(kind) > 1 for kind in _ONCE):
            raise items.refused(f"tools[{index}].type", f"{stored['type']} is there twice")
        found.append(_ECHOED.get(stored["type"], {}) | stored)
    return found, headers


def _tool(tool: Mapping[str, Any], where: str) -> BaseModel:
    kind = tool.get("type")
    shape = _TOOLS.get(kind) if isinstance(kind, str) else None
    if shape is None:
        raise items.refused(f"{where}.type", f"{kind!r} is not supported; there are {', '.join(_TOOLS)}")
    return items.parsed(shape, tool, where)


def _headers(tool: McpTool, where: str) -> dict[str, str]:
    """Raises InvalidRequest: one that cannot be sent. The message does not show it."""
    bearer = {"Authorization": f"Bearer {tool.authorization}"} if tool.authorization else {}
    for name, value in ((tool.headers or {}) | bearer).items():
        if not sendable({name: value}):
            field = "authorization" if bearer.get(name) == value else "headers"
            raise items.refused(f"{where}.{field}", "this cannot be sent as a header")
    return (tool.headers or {}) | bearer
