"""The inference API of 0.1 and 0.2 in OpenAI's terms: requests to chat completions, and their answers back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from llama_stack.apis.common.content_types import ImageContentItem, InterleavedContent, TextContentItem
from llama_stack.apis.inference import (
    CompletionMessage,
    GrammarResponseFormat,
    JsonSchemaResponseFormat,
    Message,
    ResponseFormat,
    SamplingParams,
    ToolConfig,
    ToolResponseMessage,
    UserMessage,
)
from pydantic import BaseModel, BeforeValidator, Field

from app.api.compat import parameters, tool_calls
from app.api.compat.forward import Chunks
from app.api.compat.parameters import Parameter
from app.domain.errors import CompletionError, InvalidRequest

JSON = dict[str, Any]
BAD_GATEWAY = 502

_STOP_REASONS = {"stop": "end_of_turn", "length": "out_of_tokens", "tool_calls": "end_of_message"}
# The first characters of an image in base64, by which its type is told: old clients send none.
_IMAGE_TYPES = {"/9j/": "jpeg", "R0lG": "gif", "UklG": "webp"}


def _calls_with_strings(message: Any) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [tool_calls.with_string(call) for call in calls]}


OldMessage = Annotated[Message, BeforeValidator(_calls_with_strings)]


class ToolParameter(BaseModel):
    """`ToolParamDefinition`."""

    param_type: str
    description: str | None = None
    required: bool | None = True
    default: Any = None
    items: JSON | None = None
    title: str | None = None


class Tool(BaseModel):
    """`ToolDefinition`; 0.3's `input_schema` goes first."""

    tool_name: str
    description: str | None = None
    parameters: dict[str, ToolParameter] | None = None
    input_schema: JSON | None = None


class LogProbs(BaseModel):
    top_k: Annotated[int, Field(ge=0)] | None = 0


class Inference(BaseModel):
    """What a chat completion and a completion have in common."""

    model_id: str
    sampling_params: SamplingParams | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    logprobs: LogProbs | None = None


class ChatCompletion(Inference):
    messages: Annotated[list[OldMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "required", "none"] | None = None
    tool_config: ToolConfig | None = None
    tool_prompt_format: str | None = Field(default=None, description="Has no effect: the model server knows its own")


# --- requests ---------------------------------------------------------------------------------------------------------


def chat_request(asked: ChatCompletion) -> JSON:
    """The body of a chat completion. Raises InvalidRequest: a grammar is asked for."""
    tools = [_tool(tool) for tool in asked.tools or ()]
    body = {
        **common_request(asked),
        "messages": [_message(message) for message in asked.messages],
        "tools": tools or None,
        "tool_choice": _tool_choice(asked) if tools else None,
        "response_format": _response_format(asked.response_format),
        "logprobs": True if asked.logprobs else None,
        "top_logprobs": asked.logprobs.top_k if asked.logprobs else None,
    }
    return {name: value for name, value in body.items() if value is not None}


def common_request(asked: Inference) -> JSON:
    """`max_tokens` of 0, 0.1's and 0.2's default, means none; what was not asked for is left to the model server."""
    sampling = asked.sampling_params
    body: JSON = {"model": asked.model_id, "stream": bool(asked.stream)}
    if sampling is None:
        return body
    greedy = {"temperature": 0.0} if sampling.strategy.type == "greedy" else {}
    penalty = {"repetition_penalty": sampling.repetition_penalty} if sampling.repetition_penalty != 1.0 else {}
    limits = {"max_tokens": sampling.max_tokens or None, "stop": sampling.stop or None}
    chosen = {**greedy, **sampling.strategy.model_dump(exclude={"type"}), **penalty, **limits}
    return body | {name: value for name, value in chosen.items() if value is not None}


def _message(message: Any) -> JSON:
    body: JSON = {"role": message.role, "content": content(message.content)}
    if isinstance(message, UserMessage) and message.context:
        body["content"] = _parts(message.content) + _parts(message.context)
    if isinstance(message, ToolResponseMessage):
        body["tool_call_id"] = message.call_id
    if isinstance(message, CompletionMessage) and message.tool_calls:
        body["tool_calls"] = [_call(call) for call in message.tool_calls]
    return body


def _call(call: Any) -> JSON:
    name = str(getattr(call.tool_name, "value", call.tool_name))
    return {"id": call.call_id, "type": "function", "function": {"name": name, "arguments": call.arguments}}


def content(given: InterleavedContent) -> str | list[JSON]:
    """InterleavedContent as a message's content."""
    return given if isinstance(given, str) else _parts(given)


def _parts(given: InterleavedContent) -> list[JSON]:
    items = given if isinstance(given, list) else [TextContentItem(text=given) if isinstance(given, str) else given]
    return [_part(item) for item in items]


def _part(item: TextContentItem | ImageContentItem) -> JSON:
    if isinstance(item, TextContentItem):
        return {"type": "text", "text": item.text}
    data = item.image.data or ""
    url = item.image.url.uri if item.image.url else f"data:image/{_IMAGE_TYPES.get(data[:4], 'png')};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url}}


def text(field: str, given: InterleavedContent) -> str:
    """InterleavedContent where only text will do. Raises InvalidRequest: there is an image."""
    parts = _parts(given)
    if any(part["type"] != "text" for part in parts):
        raise InvalidRequest(f"{field}: only text is supported here")
    return "".join(part["text"] for part in parts)


def _tool(tool: Tool) -> JSON:
    schema = tool.input_schema or parameters.to_schema(
        Parameter(
            name=name,
            parameter_type=declared.param_type,
            description=declared.description or "",
            required=declared.required is not False,
            default=declared.default,
            items=declared.items,
            title=declared.title,
        )
        for name, declared in (tool.parameters or {}).items()
    )
    function = {"name": tool.tool_name, "description": tool.description or "", "parameters": schema}
    return {"type": "function", "function": function}


def _tool_choice(asked: ChatCompletion) -> str | JSON | None:
    configured = asked.tool_config.tool_choice if asked.tool_config else None
    choice = getattr(configured, "value", configured) or asked.tool_choice
    if choice in (None, "auto", "none", "required"):
        return choice
    return {"type": "function", "function": {"name": choice}}


def _response_format(given: ResponseFormat | None) -> JSON | None:
    if isinstance(given, GrammarResponseFormat):
        raise InvalidRequest("response_format: a grammar is not supported; give a json_schema")
    if isinstance(given, JsonSchemaResponseFormat):
        return {"type": "json_schema", "json_schema": {"name": "response", "schema": given.json_schema}}
    return None


# --- answers ----------------------------------------------------------------------------------------------------------


def chat_answer(completion: JSON) -> JSON:
    """`ChatCompletionResponse` of a chat completion; calls have arguments as before 0.3.

    Raises CompletionError: it has no choice.
    """
    choice = first_choice(completion)
    message = choice.get("message") or {}
    return {
        "completion_message": {
            "role": "assistant",
            "content": message.get("content") or "",
            "stop_reason": stop_reason(choice),
            "tool_calls": [_old_call(call) for call in message.get("tool_calls") or ()],
        },
        "logprobs": log_probs(choice),
    }


def first_choice(completion: JSON) -> JSON:
    """Raises CompletionError: the model server sent none."""
    for choice in choices(completion):
        return choice
    raise CompletionError("The model server sent a completion without a choice.", BAD_GATEWAY)


def choices(answer: JSON) -> list[JSON]:
    """The first choice of a completion or a chunk; none, if there is none."""
    given = answer.get("choices")
    return [choice for choice in given[:1] if isinstance(choice, dict)] if isinstance(given, list) else []


def stop_reason(choice: JSON) -> str:
    return _STOP_REASONS.get(choice.get("finish_reason") or "", "end_of_turn")


def log_probs(choice: JSON) -> list[JSON] | None:
    """One `TokenLogProbs` for each token."""
    tokens = (choice.get("logprobs") or {}).get("content")
    if not isinstance(tokens, list):
        return None
    return [
        {"logprobs_by_token": {each["token"]: each["logprob"] for each in token.get("top_logprobs") or [token]}}
        for token in tokens
    ]


def _old_call(call: JSON) -> JSON:
    function = call.get("function") or {}
    named = {"call_id": call.get("id") or "", "tool_name": function.get("name") or ""}
    return tool_calls.with_object({**named, "arguments": _as_text(function.get("arguments")) or "{}"})


def _as_text(arguments: Any) -> str:
    """Some servers send them as an object, against OpenAI's own."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments) if arguments else ""


class ChatChunks(Chunks):
    """`ChatCompletionResponseStreamChunk`s: start, progress with text or whole tool calls, complete."""

    def __init__(self) -> None:
        self._started = False
        self._failed = False
        self._finish: JSON = {}
        self._calls: list[JSON] = []
        self._by_index: dict[int, JSON] = {}

    def of(self, chunk: JSON) -> Iterator[JSON]:
        if "error" in chunk:
            self._failed = True
            yield chunk
            return
        if not self._started:
            self._started = True
            yield _chat_event("start", {"type": "text", "text": ""})
        for choice in choices(chunk):
            yield from self._of_choice(choice)

    def _of_choice(self, choice: JSON) -> Iterator[JSON]:
        delta = choice.get("delta") or {}
        if choice.get("finish_reason"):
            self._finish = choice
        self._collect(delta.get("tool_calls") or ())
        if delta.get("content"):
            yield _chat_event("progress", {"type": "text", "text": delta["content"]}, logprobs=log_probs(choice))

    def _collect(self, pieces: Sequence[JSON]) -> None:
        for piece in pieces:
            function = piece.get("function") or {}
            call = self._call_of(piece, function)
            call["id"] = call["id"] or piece.get("id") or ""
            collected = call["function"]
            collected["name"] = collected["name"] or function.get("name") or ""
            collected["arguments"] += _as_text(function.get("arguments"))

    def _call_of(self, piece: JSON, function: JSON) -> JSON:
        """The call of its index, or the next one: some servers give all calls the same index, or none."""
        index, call_id = piece.get("index") or 0, piece.get("id")
        call = self._by_index.get(index)
        if call is None or (function.get("name") and call_id and call_id != call["id"]):
            call = self._by_index[index] = {"id": "", "function": {"name": "", "arguments": ""}}
            self._calls.append(call)
        return call

    def end(self) -> Iterator[JSON]:
        if self._failed:
            return
        for call in self._calls:
            delta = {"type": "tool_call", "tool_call": _old_call(call), "parse_status": "succeeded"}
            yield _chat_event("progress", delta)
        yield _chat_event("complete", {"type": "text", "text": ""}, stop_reason=stop_reason(self._finish))


def _chat_event(kind: str, delta: JSON, *, logprobs: Any = None, stop_reason: str | None = None) -> JSON:
    return {"event": {"event_type": kind, "delta": delta, "logprobs": logprobs, "stop_reason": stop_reason}}
