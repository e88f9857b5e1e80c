"""Which items of OpenAI's Responses there are, how they are refused, and what is filled in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.domain.errors import InvalidRequest, NotFound
from app.domain.items import checked, conversation_id, session_of_conversation, with_ids

USER = {"role": "user", "content": "hi"}
OF_EACH_TYPE: list[dict[str, Any]] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a\0b"}]},
    {"type": "function_call", "call_id": "c", "name": "n", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]},
    {"type": "mcp_call", "server_label": "s", "name": "n", "arguments": "", "error": {"type": "http_error"}},
    {"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "n", "input_schema": {"default": None}}]},
    {"type": "mcp_approval_request", "server_label": "s", "name": "n", "arguments": "{}"},
    {"type": "mcp_approval_response", "approval_request_id": "a", "approve": False, "reason": None},
    {"type": "web_search_call", "action": {"type": "search", "query": "q"}},
    {"type": "file_search_call", "queries": ["q"], "results": None},
    {"type": "reasoning", "summary": [], "encrypted_content": "x"},
]


def test_a_message_gets_what_its_readers_expect() -> None:
    """`type` may be left out, content may be text; OpenAI's SDK reads a list of parts, each with all of its fields."""
    image = {"type": "input_image", "image_url": "https://x/y.png"}
    found = checked([USER, {"role": "assistant", "content": "ho"}, {"role": "user", "content": [image], "id": None}])
    for message in found:
        assert (message["type"], message["status"]) == ("message", "completed")
        assert "id" not in message
    assert [message["content"] for message in found] == [
        [{"type": "input_text", "text": "hi"}],
        [{"type": "output_text", "text": "ho", "annotations": []}],
        [{**image, "detail": "auto"}],
    ]


@pytest.mark.parametrize("item", OF_EACH_TYPE, ids=lambda item: item["type"])
def test_each_type_is_kept_as_it_came_with_fields_that_nobody_knows(item: dict[str, Any]) -> None:
    given = {**item, "of_next_year": {"x": [None, "\0"]}}
    (found,) = checked([json.loads(json.dumps(given))])
    assert found | {"status": found.get("status")} == given | {"status": found.get("status")}
    assert checked([found]) == [found]


def test_an_id_is_of_the_items_kind_and_kept_if_it_has_one() -> None:
    found = with_ids(checked([*OF_EACH_TYPE, {**USER, "id": "my own"}]))
    assert [item["id"].partition("_")[0] for item in found] == [
        "msg", "fc", "fco", "mcp", "mcpl", "mcpr", "mcpa", "ws", "fs", "rs", "my own",
    ]  # fmt: skip
    assert len({item["id"] for item in found}) == len(found)


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("text", "input[1]"),
        ({}, "input[1].type"),
        ({"id": "msg_1", "type": None}, "input[1].type"),
        ({"type": "item_reference", "id": "msg_1"}, "input[1].type"),
        ({"type": "computer_call"}, "input[1].type"),
        ({"type": ["message"]}, "input[1].type"),
        ({"role": "tool", "content": "x"}, "input[1].role"),
        ({"role": "user"}, "input[1].content"),
        ({"role": "user", "content": ["x"]}, "input[1].content[0]"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input[1].content[0].type"),
        ({"role": "user", "content": [{"type": "input_text", "text": 1}]}, "input[1].content[0].text"),
        ({"role": "user", "content": [{"type": "refusal"}]}, "input[1].content[0].refusal"),
        ({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}, "input[1].content[0].image_url"),
        ({"type": "function_call", "call_id": "c", "name": "n"}, "input[1].arguments"),
        ({"type": "function_call_output", "call_id": "c"}, "input[1].output"),
        ({"type": "function_call_output", "call_id": "c", "output": {}}, "input[1].output"),
        ({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}, "input[1].output[0]"),
        ({"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "n"}]}, "input[1].tools[0].input_schema"),
        ({"type": "mcp_approval_response", "approval_request_id": "a", "approve": "no"}, "input[1].approve"),
        ({**USER, "status": "done"}, "input[1].status"),
        ({**USER, "id": ""}, "input[1].id"),
        ({**USER, "id": "a\0"}, "input[1].id"),
        ({**USER, "id": "a" * 256}, "input[1].id"),
        ({**USER, "id": "first"}, "input[1].id"),
        ({**USER, "x": float("nan")}, "input[1]: NaN"),
        ({"role": "user", "content": "\ud800"}, "input[1]: half"),
    ],
)
def test_what_is_wrong_is_named(item: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked([{**USER, "id": "first"}, item], "input")
    assert str(refused.value).startswith(named)
    assert str(refused.value).startswith(f"{refused.value.param}: ")


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: Any = ""
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        checked([{**USER, "x": deep}])


def test_a_conversations_id_is_its_sessions_id() -> None:
    session_id = "0b0e2c9a-5d0f-4c57-9d5c-6a1c8c1c2f11"
    identifier = conversation_id(session_id)
    assert identifier == "conv_0b0e2c9a5d0f4c579d5c6a1c8c1c2f11"
    assert session_of_conversation(identifier) == session_of_conversation(f"conv_{session_id.upper()}") == session_id


@pytest.mark.parametrize("wrong", ["", "conv_", "conv_x", "CONV_" + "0" * 32, "0" * 32, f"conv_{{{'0' * 32}}}", "é"])
def test_another_id_is_not_found(wrong: str) -> None:
    with pytest.raises(NotFound, match=r"Conversation '.*' not found"):
        session_of_conversation(wrong)
