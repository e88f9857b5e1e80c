"""What the model is told: no call without its answer, no answer without its call, in the order in which it happened."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.domain.errors import TurnFailure
from app.domain.history import UNANSWERED
from app.domain.responses.context import Entry, Past, approved_calls, entries, messages
from app.domain.responses.steps import Item, Step
from tests.unit.domain.responses.journals import (
    answer,
    approved,
    assistant,
    call,
    function_call,
    made,
    output,
    request,
    said,
    user,
)


def told(*items: Item, past: list[Past] | None = None, journal: list[Step] | None = None) -> list[str]:
    """Each message in short: its role and text, the ids of its calls, the id of the call that it answers."""
    given = messages(None, past or [], items, journal or [])
    open_calls: list[str] = []
    for message in given:
        if message["role"] == "tool":
            open_calls.remove(message["tool_call_id"])
        else:
            assert not open_calls, "a call without its answer"
            open_calls = [call["id"] for call in message.get("tool_calls", ())]
        assert message["content"] or message.get("tool_calls") or message["role"] != "assistant", "empty"
    assert not open_calls, "a call without its answer"
    return [_short(message) for message in given]


def _short(message: dict[str, Any]) -> str:
    calls = "".join(f" >{call['id']}" for call in message.get("tool_calls", ()))
    answers = f"{message['tool_call_id']}=" if message["role"] == "tool" else ""
    return f"{message['role']}: {answers}{message['content'] or ''}{calls}"


def test_instructions_come_first_and_once() -> None:
    given = messages("Be kind.", [Past(entries([user("a")]))], [user("b")], [])
    assert [(each["role"], each["content"]) for each in given] == [
        ("system", "Be kind."),
        ("user", "a"),
        ("user", "b"),
    ]


def test_a_chain() -> None:
    """Each response's input, then what was said and done in it."""
    before = Past(
        entries([user("a")]), [said("let me see", [call("1"), call("2")]), made("1", "x"), made("2", "y"), said("z")]
    )
    assert told(user("b"), past=[before], journal=[said("", [call("3")]), made("3", "w")]) == [
        "user: a",
        "assistant: let me see >1 >2",
        "tool: 1=x",
        "tool: 2=y",
        "assistant: z",
        "user: b",
        "assistant:  >3",
        "tool: 3=w",
    ]


def test_a_function_is_answered_by_the_next_response() -> None:
    """Whatever stands between; what was not answered is said to be unknown."""
    before = Past(
        entries([user("a")]), [said("", [call("f", "function"), call("g", "function"), call("1")]), made("1", "x")]
    )
    assert told(user("b"), output("f", "5"), past=[before]) == [
        "user: a",
        "assistant:  >f >g >1",
        "tool: f=5",
        f"tool: g={UNANSWERED}",
        "tool: 1=x",
        "user: b",
    ]


def test_a_lost_attempts_calls() -> None:
    """A failed response whose calls were under way can be gone on from."""
    before = Past(entries([user("a")]), [said("", [call("1"), call("2")]), made("1", "x")])
    assert told(user("b"), past=[before])[1:4] == ["assistant:  >1 >2", "tool: 1=x", f"tool: 2={UNANSWERED}"]


def test_items_of_a_client_that_keeps_its_own_history() -> None:
    """Calls side by side are of one message, with the text before them, as the model said it."""
    given = (user("a"), assistant("hm"), function_call("f"), function_call("g"), output("g", "2"), output("f", "1"))
    assert told(*given, assistant("so"), user("b")) == [
        "user: a",
        "assistant: hm >f >g",
        "tool: f=1",
        "tool: g=2",
        "assistant: so",
        "user: b",
    ]


def test_an_id_that_a_model_used_twice() -> None:
    """An output answers the call of its id that was asked for last before it."""
    given = (function_call("f"), output("f", "1"), user("again"), function_call("f"), output("f", "2"))
    assert told(*given) == ["assistant:  >f", "tool: f=1", "user: again", "assistant:  >f", "tool: f=2"]


def test_an_output_without_a_call() -> None:
    """Also one that comes before its call: OpenAI's words for it."""
    for given in ([output("f", "1")], [output("f", "1"), function_call("f")]):
        with pytest.raises(TurnFailure, match="No tool call found for function call output with call_id f") as failed:
            told(*given)
        assert failed.value.code == "invalid_request"


def test_an_output_of_content_parts() -> None:
    """One text as such, several as parts."""
    part = {"type": "input_text", "text": "x"}
    for parts, content in ([[part], "x"], [[part, part], [{"type": "text", "text": "x"}] * 2], [[], ""]):
        given = messages(None, [], [function_call("f"), output("f", parts)], [])
        assert given[-1]["content"] == content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("plain", "plain"),
        ([{"type": "input_text", "text": "one"}], "one"),
        ([], ""),
        (
            [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": "data:x", "detail": "low"}],
            [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}],
        ),
    ],
)
def test_a_users_message(content: Any, expected: Any) -> None:
    [message] = messages(None, [], [{**user(""), "content": content}], [])
    assert message == {"role": "user", "content": expected}


def test_an_assistants_message() -> None:
    """Its texts in one, a refusal among them. An empty one is left out: model servers refuse it."""
    refusal = {**assistant("no"), "content": [{"type": "refusal", "refusal": "I will not."}]}
    assert told(user("a"), refusal, user("b"), assistant(""), user("c")) == [
        "user: a",
        "assistant: I will not.",
        "user: b",
        "user: c",
    ]
    assert told(user("a"), past=[Past([], [said("")])]) == ["user: a"]


def test_tools_of_ours_as_items_of_a_conversation() -> None:
    """Each as a call and its answer; the result that was kept beside an item goes before what the item shows."""
    mcp = {"type": "mcp_call", "id": "m", "name": "add", "arguments": "{}", "output": "3", "error": None}
    search = {"type": "file_search_call", "id": "s", "queries": ["a", "b"], "results": [{"text": "t"}]}
    web = {"type": "web_search_call", "id": "w", "action": {"query": "q"}}
    ignored: list[Item] = [
        {"type": "mcp_list_tools", "id": "l", "tools": []},
        {"type": "reasoning", "id": "r", "summary": []},
    ]
    failed = {**mcp, "id": "n", "error": {"message": "no"}, "output": None}
    ours = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": "no luck"}]}
    past = Past([Entry(mcp, "3"), Entry(failed), Entry({**failed, "id": "o", "error": ours})])
    found = Past([Entry(search, "found"), Entry({**search, "id": "t"}), Entry(web, "pages"), Entry({**web, "id": "x"})])
    assert told(*ignored, past=[past, found]) == [
        "assistant:  >m",
        "tool: m=3",
        "assistant:  >n",
        'tool: n={"message": "no"}',
        "assistant:  >o",
        "tool: o=no luck",
        "assistant:  >s",
        "tool: s=found",
        "assistant:  >t",
        'tool: t=[{"text": "t"}]',
        "assistant:  >w",
        "tool: w=pages",
    ]
    asked = messages(None, [found], [], [])[0]["tool_calls"][0]["function"]
    assert (asked["name"], json.loads(asked["arguments"])) == ("knowledge_search", {"query": "a b"})


def test_an_approval() -> None:
    """Nothing is told of a call whose approval is still open. One that is approved is told when it is made, one that is
    denied where it was asked for, beside the calls that were made at once."""
    asked = said("hm", [call("1"), call("a", "approval")])
    before = Past(entries([user("x")]), [asked, made("1", "y")])
    assert told(user("b"), past=[before]) == ["user: x", "assistant: hm >1", "tool: 1=y", "user: b"]
    assert told(answer("i_a"), past=[before], journal=[approved(call("2")), made("2", "z")])[3:] == [
        "assistant:  >2",
        "tool: 2=z",
    ]
    denied = told(answer("i_a", approve=False, reason="Why?"), past=[before])
    assert denied[1:3] == ["assistant: hm >1 >a", "tool: 1=y"]
    assert denied[3].endswith("not made. Why?")


def test_an_approval_in_a_conversation() -> None:
    """There the request is an item, and so is the call that was made."""
    mcp = {"type": "mcp_call", "id": "m", "name": "f", "arguments": "{}", "output": "3"}
    assert told(user("a"), request("r"), answer("r"), mcp) == ["user: a", "assistant:  >m", "tool: m=3"]
    denied = told(user("a"), request("r"), answer("r", approve=False))
    assert denied[1] == "assistant:  >r"
    assert "not approved" in denied[2]


def test_what_is_approved() -> None:
    """The requests in the order in which they were asked, in what came before or in the input itself."""
    before = [request("1"), request("2"), request("3"), user("x")]
    given = [answer("3"), answer("1"), answer("2", approve=False), request("4"), answer("4")]
    assert [item["id"] for item in approved_calls(given, before)] == ["1", "3", "4"]
    assert approved_calls([user("x")], before) == []


@pytest.mark.parametrize(
    ("given", "before", "problem"),
    [
        ([answer("9")], [request("1")], "Approval request 9 not found"),
        ([answer("9", approve=False)], [], "Approval request 9 not found"),
        ([answer("1")], [request("1"), answer("1")], "Approval request 1 was answered before"),
        ([answer("1")], [request("1"), answer("1", approve=False)], "Approval request 1 was answered before"),
        ([answer("1"), answer("1", approve=False)], [request("1")], "Approval request 1 was answered before"),
    ],
)
def test_what_cannot_be_approved(given: list[Item], before: list[Item], problem: str) -> None:
    """A request that is not there; one that is answered, whose call would be made a second time."""
    with pytest.raises(TurnFailure, match=problem) as failed:
        approved_calls(given, before)
    assert failed.value.code == "invalid_request"
