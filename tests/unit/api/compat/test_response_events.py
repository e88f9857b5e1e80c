"""What Llama Stack's clients read otherwise than OpenAI's: names of events, and the error of an MCP call."""

from __future__ import annotations

import json

import pytest

from app.api.compat.response_events import LLAMA_STACK, OPENAI, with_llama_stack_names
from app.api.compat.vectors import with_query_list
from app.domain.events import START, Event, EventId, EventKind
from app.domain.responses.events import event


def logged(data: str) -> Event:
    return Event(EventId(1, 1), START, EventKind.RESPONSE, data)


def test_arguments_of_an_mcp_call() -> None:
    """Only the name changes."""
    told = with_llama_stack_names(logged(event("mcp_call_arguments.delta", item_id="mcp_1", delta="{")))
    assert told.data == event("mcp_call.arguments.delta", item_id="mcp_1", delta="{")


def test_all_else_is_passed_on() -> None:
    """The very same event."""
    for type_ in ("output_text.delta", "function_call_arguments.delta", "mcp_call.completed"):
        given = logged(event(type_, delta='{"type":"response.mcp_call_arguments.'))
        assert with_llama_stack_names(given) is given


FAILED = {"type": "mcp_call", "id": "mcp_1", "error": "no luck", "output": None}
OBJECT = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": "no luck"}]}


def test_the_error_of_an_mcp_call_is_an_object_to_openais_clients() -> None:
    """In a response, in a page of items, of responses with their input, and by itself; Llama Stack's read a text."""
    for place in (
        lambda item: item,
        lambda item: {"object": "response", "output": [item, {"type": "message"}]},
        lambda item: {"object": "list", "data": [item]},
        lambda item: [{"object": "response", "input": [item], "output": []}],
    ):
        assert OPENAI.told(place(FAILED)) == place(FAILED | {"error": OBJECT})
        assert LLAMA_STACK.told(place(FAILED)) == place(FAILED)


@pytest.mark.parametrize("error", [None, OBJECT])
def test_an_error_that_is_no_text_stays(error: object) -> None:
    assert OPENAI.told(FAILED | {"error": error}) == FAILED | {"error": error}


def test_the_error_of_an_mcp_call_in_events() -> None:
    """Those that tell an item, and those that tell the response."""
    for members in ({"item": FAILED}, {"response": {"output": [FAILED]}}):
        given = logged(event("some", **members))
        told = json.loads(OPENAI.event(given).data)
        assert told == OPENAI.told(json.loads(given.data))
        assert "mcp_tool_execution_error" in str(told)
        assert LLAMA_STACK.event(given) is given
    other = logged(event("some", item={"type": "message"}))
    assert OPENAI.event(other) is other


def test_a_search_tells_a_list_of_queries() -> None:
    assert with_query_list({"search_query": "camels", "data": []}) == {"search_query": ["camels"], "data": []}
    assert with_query_list({"search_query": ["camels"]}) == {"search_query": ["camels"]}
