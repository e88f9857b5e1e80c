"""What a response does next, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.responses.decide import MAX_INFER_ITERS, Approve, Finish, Infer, ListTools, RunCalls, decide
from app.domain.responses.steps import Step
from tests.unit.domain.responses.journals import MCP, approved, call, listed, made, said

ONE, TWO, THREE = call("1"), call("2"), call("3")
FUNCTION, APPROVAL = call("f", "function"), call("a", "approval")
FUNCTIONS = {"type": "function", "name": "f"}
TWO_SERVERS: dict[str, Any] = {"tools": [FUNCTIONS, MCP, {**MCP, "server_label": "b"}]}


@pytest.mark.parametrize(
    ("request_", "journal", "approves", "action"),
    [
        ({}, [], False, Infer()),
        ({"tools": None}, [], False, Infer()),
        ({"tools": [FUNCTIONS]}, [], False, Infer()),
        (TWO_SERVERS, [], False, ListTools(1)),
        (TWO_SERVERS, [listed(1)], True, ListTools(2)),
        (TWO_SERVERS, [listed(1), listed(2)], True, Approve()),
        (TWO_SERVERS, [listed(1), listed(2)], False, Infer()),
        ({}, [approved(ONE, TWO)], True, RunCalls(0, ((0, ONE), (1, TWO)))),
        ({}, [approved(ONE, TWO), made("1")], True, RunCalls(0, ((1, TWO),))),
        ({}, [approved(ONE), made("1")], True, Infer()),
        ({}, [said("hello")], False, Finish("completed")),
        ({}, [said("")], False, Finish("completed")),
        ({}, [said("", finish_reason="tool_calls")], False, Finish("completed")),
        ({}, [said("", [FUNCTION], "tool_calls")], False, Finish("completed")),
        ({}, [said("", [APPROVAL])], False, Finish("completed")),
        ({}, [said("", [ONE, TWO])], False, RunCalls(0, ((0, ONE), (1, TWO)))),
        ({}, [said("", [ONE, FUNCTION, APPROVAL, TWO]), made("1")], False, RunCalls(0, ((3, TWO),))),
        ({}, [said("", [ONE, FUNCTION]), made("1")], False, Finish("completed")),
        ({}, [said("", [ONE]), made("1")], False, Infer()),
        ({}, [said("", [ONE]), made("1"), said("", [TWO])], False, RunCalls(2, ((0, TWO),))),
        ({}, [said("", [ONE]), made("1"), said("hello")], False, Finish("completed")),
        ({"max_infer_iters": 1}, [said("", [ONE])], False, RunCalls(0, ((0, ONE),))),
        ({"max_infer_iters": 1}, [said("", [ONE]), made("1")], False, Finish("incomplete", "max_infer_iters")),
        ({"max_infer_iters": 1}, [said("hello")], False, Finish("completed")),
        ({}, [said("hel", finish_reason="length")], False, Finish("incomplete", "max_output_tokens")),
        ({}, [said("", finish_reason="content_filter")], False, Finish("incomplete", "content_filter")),
        ({}, [said("", [ONE], "length")], False, Finish("incomplete", "max_output_tokens")),
        ({}, [said("", [ONE]), made("1"), said("", [TWO], "length")], False, Finish("incomplete", "max_output_tokens")),
    ],
)
def test_what_comes_next(request_: dict[str, Any], journal: list[Step], approves: bool, action: Any) -> None:
    """List the servers' tools, record what is approved, infer, make the calls, until there are none to make. Of a
    message that was cut off none is made: its last call may lack its arguments."""
    assert decide(request_, journal, approves=approves) == action


def test_a_loop_ends() -> None:
    """A model that calls a tool every time is asked so often, and not more."""
    journal: list[Step] = []
    while not isinstance(action := decide({}, journal), Finish):
        journal.append(made("1") if isinstance(action, RunCalls) else said("", [ONE]))
    assert action == Finish("incomplete", "max_infer_iters")
    assert len(journal) == 2 * MAX_INFER_ITERS
