"""Names of events that Llama Stack's clients know otherwise than OpenAI's."""

from __future__ import annotations

from app.api.compat.response_events import with_llama_stack_names
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


def test_a_search_tells_a_list_of_queries() -> None:
    assert with_query_list({"search_query": "camels", "data": []}) == {"search_query": ["camels"], "data": []}
    assert with_query_list({"search_query": ["camels"]}) == {"search_query": ["camels"]}
