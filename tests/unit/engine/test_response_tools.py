"""What of a response's tools is offered to the model, and whose a call is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.errors import TurnFailure
from app.domain.items import checked
from app.domain.responses.steps import IndexedItem, ListStep, Step
from app.identity.secrets import Secrets
from tasks.engine.mcp import Connections
from tasks.engine.responding import CallItem
from tasks.engine.response_tools import ResponseTools
from tests.unit.domain.responses.journals import call, request, said

FUNCTION = {"type": "function", "name": "f", "description": "F", "parameters": {"type": "object"}, "strict": None}
SERVER: dict[str, Any] = {"type": "mcp", "server_label": "calc", "server_url": "http://mcp", "allowed_tools": None}
FILES: dict[str, Any] = {"type": "file_search", "vector_store_ids": ["vs"]}
WEB: dict[str, Any] = {"type": "web_search_preview"}
ALL: list[dict[str, Any]] = [FUNCTION, SERVER, FILES, WEB]
ANNOTATIONS = {"look": {"readOnlyHint": True}, "put": {"idempotentHint": True}}


def listed(tool_index: int, *names: str) -> ListStep:
    shown: list[dict[str, Any]] = [
        {"name": name, "description": None, "input_schema": {}, "annotations": None} for name in names
    ]
    item = {"type": "mcp_list_tools", "id": "l", "tools": shown}
    annotations = {name: ANNOTATIONS[name] for name in names if name in ANNOTATIONS}
    items = [IndexedItem(output_index=0, item=item)]
    return ListStep(step_id="s", items=items, tool_index=tool_index, annotations=annotations)


def tools_of(tools: list[dict[str, Any]], journal: list[Step] | None = None, **fields: Any) -> ResponseTools:
    settings = SimpleNamespace(tools_safe_to_repeat=["safe"], tool_timeout_seconds=1.0, tool_result_max_bytes=10_000)
    claim: Any = SimpleNamespace(request={"tools": tools, **fields}, turn_id="t")
    given: Any = SimpleNamespace(settings=settings, stack=None)
    journal = journal if journal is not None else [listed(1, "add", "look")]
    return ResponseTools(given, claim, journal, Secrets(), Connections(10_000))


def names(tools: ResponseTools) -> list[str]:
    return [each["function"]["name"] for each in tools.offered()]


def test_what_is_offered() -> None:
    """Functions as they are, the servers' tools by their names, and a function for each search."""
    tools = tools_of(ALL)
    assert names(tools) == ["f", "add", "look", "knowledge_search", "web_search"]
    assert tools.offered()[0] == {
        "type": "function",
        "function": {"name": "f", "description": "F", "parameters": {"type": "object"}},
    }
    kinds = {name: tools.kind_of(name) for name in (*names(tools), "never_offered")}
    assert kinds == {
        "f": "function",
        "add": "mcp",
        "look": "mcp",
        "knowledge_search": "file_search",
        "web_search": "web_search",
        "never_offered": "function",
    }


@pytest.mark.parametrize(
    ("tools", "journal"),
    [
        ([FUNCTION, SERVER], [listed(1, "f")]),
        ([SERVER, {**SERVER, "server_label": "b"}], [listed(0, "add"), listed(1, "add")]),
        ([{**FUNCTION, "name": "knowledge_search"}, FILES], []),
    ],
)
def test_a_name_that_is_offered_twice(tools: list[dict[str, Any]], journal: list[Step]) -> None:
    with pytest.raises(TurnFailure, match="offered") as failed:
        tools_of(tools, journal).offered()
    assert failed.value.code == "invalid_request"


def allowed(*tools: dict[str, Any], mode: str = "auto") -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": list(tools)}


@pytest.mark.parametrize(
    ("choice", "told", "offered"),
    [
        (None, "auto", None),
        ("auto", "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "f"}, "f", None),
        ({"type": "mcp", "server_label": "calc", "name": "add"}, "add", None),
        ({"type": "mcp", "server_label": "calc"}, "required", ["add", "look"]),
        ({"type": "file_search"}, "knowledge_search", None),
        ({"type": "web_search_preview"}, "web_search", None),
        (allowed({"type": "function", "name": "f"}), "auto", ["f"]),
        (allowed({"type": "mcp", "server_label": "calc"}, mode="required"), "required", ["add", "look"]),
        (allowed({"type": "mcp", "server_label": "calc", "name": "add"}, FILES), "auto", ["add", "knowledge_search"]),
        (allowed({"type": "web_search"}), "auto", ["web_search"]),
    ],
)
def test_tool_choice(choice: Any, told: str, offered: list[str] | None) -> None:
    """In the chat completions' spelling. What is forced is forced once, or there would be no answer."""
    everything = ["f", "add", "look", "knowledge_search", "web_search"]
    tools = tools_of(ALL, tool_choice=choice)
    spelled = told if told in ("auto", "none", "required") else {"type": "function", "function": {"name": told}}
    assert tools.choice() == spelled
    assert names(tools) == (offered or everything)
    later = tools_of(ALL, [listed(1, "add", "look"), said("", [call("1")])], tool_choice=choice)
    assert later.choice() == ("none" if choice == "none" else "auto")
    limited = isinstance(choice, dict) and choice["type"] == "allowed_tools"
    assert names(later) == (offered if limited else everything)


@pytest.mark.parametrize(
    ("required", "asked"),
    [
        (None, set()),
        ("never", set()),
        ("always", {"add", "look"}),
        ({"always": {"tool_names": ["add"]}}, {"add"}),
        ({"always": ["add"]}, {"add"}),
        ({"never": {"tool_names": ["add"]}}, {"look"}),
        ({"never": {"read_only": True}}, {"add"}),
        ({"always": {"read_only": False}}, {"add"}),
        ({"always": {"tool_names": ["add", "look"], "read_only": True}}, {"look"}),
        ({"always": ["add", "look"], "never": ["look"]}, {"add"}),
    ],
)
def test_what_needs_approval(required: Any, asked: set[str]) -> None:
    tools = tools_of([FUNCTION, {**SERVER, "require_approval": required}])
    assert {name for name in ("add", "look") if tools.kind_of(name) == "approval"} == asked


def test_what_is_approved_must_be_there() -> None:
    """An approval is of one server's tool: another one's of the same name is not called in its place."""
    asked = {**request("r"), "name": "add"}
    tools_of([FUNCTION, SERVER]).check_approved(asked)
    for elsewhere in ({**asked, "server_label": "other"}, {**asked, "name": "gone"}):
        with pytest.raises(TurnFailure, match="whose call the input approves"):
            tools_of([FUNCTION, SERVER]).check_approved(elsewhere)


def test_what_may_be_repeated() -> None:
    """A call that only reads, or whose server says so, or that the operator named."""
    tools = tools_of([SERVER], [listed(0, "add", "look", "put", "safe")])
    calls = {name: call("1").model_copy(update={"name": name}) for name in ("add", "look", "put", "safe")}
    assert {name for name, each in calls.items() if tools.repeatable(each)} == {"look", "put", "safe"}
    assert tools.repeatable(call("1", "file_search"))


@pytest.mark.parametrize(
    "arguments", ["not json", "[1]", '"text"', "[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
)
async def test_arguments_that_are_no_object(arguments: str) -> None:
    """The model is told, in a result like any other; the item is shown all the same."""
    tools = tools_of([SERVER, FILES], [listed(0, "do_1")])
    for kind in ("mcp", "file_search", "web_search"):
        result = await tools.make(call("1", kind, arguments=arguments), "key", ignored=False)
        assert result["error"].startswith("The arguments are not")
        assert tools.done(call("1", kind, arguments=arguments), result)["status"] == "failed"


async def test_a_call_beyond_the_limit_is_not_made() -> None:
    result = await tools_of([SERVER]).make(call("1"), "key", ignored=True)
    assert "max_tool_calls" in result["error"]


def test_output_items_can_be_given_again() -> None:
    """A client that keeps its own history sends what it got."""
    tools = tools_of(ALL)
    result = {"content": "x", "error": None, "results": [{"file_id": "f", "text": "x"}]}
    shown = []
    for name in ("f", "add", "knowledge_search", "web_search"):
        kind = tools.kind_of(name)
        one = call(name, kind).model_copy(update={"name": name, "item_id": f"i_{name}"})
        begun = CallItem(one.call_id, name, "{}", kind, f"b_{name}")
        shown += [tools.begun(begun), tools.cut(one.model_copy(update={"item_id": f"c_{name}"})).item]
        shown.append(tools.asked(one) if kind == "function" else tools.done(one, result))
    shown.append(tools.asked(call("a", "approval").model_copy(update={"name": "add"})))
    shown.append({"id": "l2", "server_label": "calc", "error": None, **listed(1, "add").items[0].item})
    assert [item["type"] for item in checked(shown)] == [item["type"] for item in shown if item]
