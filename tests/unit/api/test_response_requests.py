"""Each parameter of a request for a response is honoured, or refused by its name."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_type_hints

import pytest
from openai.resources.responses import Responses
from openai.types.responses import (
    FileSearchToolParam,
    FunctionToolParam,
    ResponseTextConfigParam,
    WebSearchToolParam,
    tool_param,
)
from openai.types.shared_params import Reasoning
from pydantic import ValidationError

from app.api.response_requests import CreateResponse, stored_request
from app.domain.errors import InvalidRequest

ASKED: dict[str, Any] = {"model": "m", "input": "hello"}
HONOURED: dict[str, Any] = {
    "background": True,
    "conversation": "conv_1",
    "include": ["file_search_call.results"],
    "input": "hello",
    "instructions": "Be kind.",
    "max_output_tokens": 5,
    "max_tool_calls": 5,
    "metadata": {"a": "b"},
    "model": "m",
    "parallel_tool_calls": False,
    "previous_response_id": "resp_1",
    "prompt_cache_key": "k",
    "reasoning": {"effort": "low"},
    "safety_identifier": "s",
    "service_tier": "default",
    "store": True,
    "temperature": 0.5,
    "text": {"format": {"type": "json_object"}, "verbosity": "low"},
    "tool_choice": "required",
    "tools": [{"type": "function", "name": "f"}],
    "top_p": 0.5,
    "truncation": "disabled",
    "user": "u",
}
"""By name: a value that asks for something, and is stored with the request."""
AT_THE_EDGE = {"stream": True, "stream_options": {"include_obfuscation": False}}
REFUSED: dict[str, Any] = {
    "access_programs": ["p"],
    "background_options": {"a": 1},
    "context_management": [{"type": "compaction"}],
    "image": {"a": 1},
    "moderation": {"a": 1},
    "prompt": {"id": "p"},
    "prompt_cache_options": {"a": 1},
    "prompt_cache_retention": "24h",
    "top_logprobs": 3,
}
OF_THE_SDK = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


def stored(**fields: Any) -> dict[str, Any]:
    return stored_request(CreateResponse.model_validate({**ASKED, **fields}))[0]


def refusal(**fields: Any) -> tuple[str, str]:
    """(the field that is refused, the message)."""
    try:
        found = stored(**fields)
    except InvalidRequest as error:
        return error.param or "", str(error)
    except ValidationError as error:
        return str(error.errors()[0]["loc"][0]), str(error)
    raise AssertionError(f"not refused: {found}")


def test_no_parameter_of_the_sdk_is_forgotten() -> None:
    """Fails when the SDK gets one that nobody has thought of: say above what becomes of it."""
    parameters = inspect.signature(Responses.create).parameters.keys() - OF_THE_SDK
    assert parameters == HONOURED.keys() | AT_THE_EDGE.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_is_stored(name: str) -> None:
    found = stored(**{name: HONOURED[name]})[name]
    if name == "tools":
        assert found == [{"type": "function", "name": "f", "parameters": None, "strict": None}]
    elif name == "input":
        assert found[0]["content"] == [{"type": "input_text", "text": "hello"}]
    else:
        assert found == HONOURED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused(name: str) -> None:
    assert refusal(**{name: REFUSED[name]})[0] == name


@pytest.mark.parametrize("name", [*HONOURED, *AT_THE_EDGE, *REFUSED, "guardrails", "max_infer_iters"])
def test_a_null_asks_for_nothing(name: str) -> None:
    """Of any parameter but the model's name; without an input there must be something to go on from."""
    if name == "model":
        assert refusal(model=None)[0] == "model"
    elif name == "input":
        assert stored(input=None, previous_response_id="resp_1")["input"] == []
    else:
        assert stored(**{name: None})["input"]


PARTS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (
        Reasoning,
        {"effort": "low"},
        {"summary": "auto", "generate_summary": "auto", "context": "x", "mode": "x"},
    ),
    (ResponseTextConfigParam, {"format": {"type": "text"}, "verbosity": "low"}, {}),
    (
        FunctionToolParam,
        {"type": "function", "name": "f", "parameters": {}, "strict": True, "description": "d"},
        {"defer_loading": True, "async": True, "allowed_callers": ["direct"], "output_schema": {"type": "object"}},
    ),
    (
        tool_param.Mcp,
        {
            "type": "mcp",
            "server_label": "l",
            "server_url": "http://mcp",
            "server_description": "d",
            "allowed_tools": ["a"],
            "require_approval": "always",
            "authorization": "a",
            "headers": {"a": "b"},
        },
        {"connector_id": "c", "defer_loading": True, "allowed_callers": ["direct"], "tunnel_id": "t"},
    ),
    (
        FileSearchToolParam,
        {
            "type": "file_search",
            "vector_store_ids": ["v"],
            "filters": {"type": "eq"},
            "max_num_results": 5,
            "ranking_options": {"ranker": "auto"},
        },
        {},
    ),
    (
        WebSearchToolParam,
        {"type": "web_search", "search_context_size": "medium"},
        {"filters": {"a": 1}, "user_location": {"type": "approximate"}, "external_web_access": True},
    ),
]


@pytest.mark.parametrize(("kind", "honoured", "refused"), PARTS, ids=[part[0].__name__ for part in PARTS])
def test_the_parts_of_a_parameter(kind: Any, honoured: dict[str, Any], refused: dict[str, Any]) -> None:
    """The same for each field of a tool, of `text` and of `reasoning`; a null asks for nothing there too."""
    assert set(get_type_hints(kind)) == honoured.keys() | refused.keys()
    outer = {Reasoning: "reasoning", ResponseTextConfigParam: "text"}.get(kind, "tools")

    def fields(**more: Any) -> dict[str, Any]:
        part = {**honoured, **more}
        return {outer: [part] if outer == "tools" else part}

    found = stored(**fields(**dict.fromkeys(refused)))[outer]
    kept = found[0] if outer == "tools" else found
    secret = {"authorization", "headers"}
    assert {name: kept[name] for name in honoured.keys() - secret} == {
        name: value for name, value in honoured.items() if name not in secret
    }
    assert not secret & kept.keys()
    for name, value in refused.items():
        field, message = refusal(**fields(**{name: value}))
        assert name in field or name in message


def test_headers_are_apart_from_what_is_stored() -> None:
    """By the label of their server; `authorization` is one of them."""
    servers = [
        {"type": "mcp", "server_label": label, "server_url": "http://mcp", "authorization": secret, "headers": headers}
        for label, secret, headers in (("a", "s1", {"X": "s2"}), ("b", None, {"Y": "s3"}), ("c", None, None))
    ]
    request, headers = stored_request(CreateResponse.model_validate({**ASKED, "tools": servers}))
    assert headers == {"a": {"X": "s2", "Authorization": "Bearer s1"}, "b": {"Y": "s3"}}
    assert not any(secret in json.dumps(request) for secret in ("s1", "s2", "s3"))


@pytest.mark.parametrize("secret", ["line\nbreak", "nul\0", "gläser", " space", "\x7f"])
def test_a_header_that_cannot_be_sent(secret: str) -> None:
    """Refused before it is sealed, and not shown: the worker's HTTP library would show it."""
    server = {"type": "mcp", "server_label": "a", "server_url": "http://mcp"}
    for field, value in (("headers", {"X": secret}), ("headers", {secret: "x"})):
        param, message = refusal(tools=[{**server, field: value}])
        assert param == "tools[0].headers"
        assert secret not in message
    assert refusal(tools=[{**server, "authorization": f"x{secret}\n"}])[0] == "tools[0].authorization"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": None}, "input"),
        ({"include": ["file_search_call.results", "web_search_call.action.sources"]}, "include"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"tool_choice": {"type": "custom", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [{"type": "custom"}]}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools[1].name"),
        ({"tools": [{"type": "web_search"}, {"type": "web_search_preview"}]}, "tools[1].type"),
        ({"tools": [{"type": "mcp", "server_label": "a", "server_url": "http://a"}] * 2}, "tools[1].server_label"),
        ({"tools": [{"type": "mcp", "server_label": "a", "server_url": "file:///etc"}]}, "tools[0].server_url"),
        ({"tools": [{"type": ["mcp"]}]}, "tools[0].type"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_infer_iters": 0}, "max_infer_iters"),
        ({"guardrails": ["g"]}, "guardrails"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x", "id": "same"}] * 2}, "input[1].id"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields)[0] == param


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("levels", [*range(225, 265, 3), 5000])
def test_what_is_nested_deeply(levels: int) -> None:
    """It is stored and sent, or refused: never an error of ours."""
    for fields in (
        {"input": [{"role": "user", "content": "x", "extra": nested(levels)}]},
        {"tools": [{"type": "function", "name": "f", "parameters": nested(levels)}]},
        {"tool_choice": {"type": "function", "name": "f", "more": nested(levels)}},
    ):
        try:
            json.dumps(stored(**fields))
        except (InvalidRequest, ValidationError):
            assert levels > 200


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "\ud800"},
        {"instructions": "\udfff"},
        {"metadata": {"a": "\ud800"}},
        {"user": "\ud800"},
        {"tools": [{"type": "function", "name": "f", "description": "\ud800"}]},
        {"input": [{"role": "user", "content": "x", "extra": "\ud800"}]},
        {"input": [{"role": "user", "content": "x", "extra": float("inf")}]},
        {"tools": [{"type": "function", "name": "f", "parameters": {"a": float("nan")}}]},
    ],
)
def test_what_is_no_json(fields: dict[str, Any]) -> None:
    """Half of a surrogate pair, or a number that JSON does not have."""
    refusal(**fields)


def test_the_character_u0000_is_kept() -> None:
    """In every text: Postgres stores it within JSON."""
    found = stored(
        model="m\0",
        input="\0",
        instructions="\0",
        metadata={"\0": "\0"},
        user="\0",
        tools=[{"type": "function", "name": "\0"}],
    )
    assert json.loads(json.dumps(found)) == found
    assert found["input"][0]["content"][0]["text"] == "\0"
