"""What clients see of a response: its items, its usage, its status, its events."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from app.domain import events, items
from app.domain.events import START, Event, EventId, EventKind
from app.domain.responses import shape, steps
from app.domain.responses.events import Begun, Delta, ResponseEvent, event, item_event
from app.domain.turns import TurnStatus
from tests.unit.domain.responses.journals import approved, call, indexed, listed, made, said

AT = datetime(2026, 1, 2, 3, 4, 5, 600_000, tzinfo=UTC)


def item(name: str) -> dict[str, Any]:
    return {"type": "message", "id": name}


def dumped(*given: steps.Step) -> list[dict[str, Any]]:
    return [step.model_dump(mode="json") for step in given]


def test_steps_are_read_as_they_were_stored() -> None:
    journal: list[steps.Step] = [listed(), approved(call("a")), said("x", [call("1")]), made("1")]
    assert steps.read(dumped(*journal)) == journal


def test_output_is_in_the_order_in_which_it_was_begun() -> None:
    """Not in that in which it was recorded: a message may be begun behind a call whose result comes later."""
    journal = dumped(
        said("", [call("1", index=1)], items=[indexed(0, item("a")), indexed(2, item("c"))]),
        made("1").model_copy(update={"items": [indexed(1, item("b"))]}),
        said("", items=[indexed(5, item("d"))]),
    )
    assert [each["id"] for each in steps.output(journal)] == ["a", "b", "c", "d"]


def test_usage_is_that_of_all_inferences() -> None:
    """Details may be missing, and so may all of it."""
    full = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": None,
    }
    assert steps.usage(dumped(listed(), said("a"))) is None
    told = steps.usage(
        dumped(said("a", usage=full), said("b", usage={"prompt_tokens": 1, "total_tokens": 1}), said("c"))
    )
    assert told == {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }


@pytest.mark.parametrize(
    ("status", "background", "started", "output", "expected"),
    [
        (TurnStatus.QUEUED, True, False, None, "queued"),
        (TurnStatus.QUEUED, True, True, None, "in_progress"),
        (TurnStatus.QUEUED, False, False, None, "in_progress"),
        (TurnStatus.RUNNING, True, True, None, "in_progress"),
        (TurnStatus.COMPLETED, False, True, {"status": "completed"}, "completed"),
        (TurnStatus.COMPLETED, False, True, {"status": "incomplete", "reason": "x"}, "incomplete"),
        (TurnStatus.FAILED, False, True, None, "failed"),
        (TurnStatus.CANCELLED, True, False, None, "cancelled"),
    ],
)
def test_openais_word_for_a_status(
    status: TurnStatus, background: bool, started: bool, output: dict[str, Any] | None, expected: str
) -> None:
    assert shape.status_of(status, {"background": background}, started, output) == expected


def test_a_response_has_every_field() -> None:
    """Those that SDKs require, and each one of the request that says how the response was made."""
    request = {"model": "m", "metadata": {"a": "b"}, "conversation": "conv_1", "store": False, "temperature": 0.0}
    made_ = shape.response(turn_id="t", request=request, status="completed", created_at=AT, completed_at=AT)
    assert (made_["id"], made_["created_at"], made_["completed_at"]) == ("resp_t", 1767323045, 1767323045)
    assert (made_["conversation"], made_["store"], made_["temperature"]) == ({"id": "conv_1"}, False, 0.0)
    assert (made_["parallel_tool_calls"], made_["error"], made_["usage"], made_["output"]) == (True, None, None, [])
    failure = {"code": "model_error", "message": "no", "status": 500}
    failed = shape.response(
        turn_id="t", request={"model": "m"}, status="failed", created_at=AT, completed_at=AT, error=failure
    )
    assert failed["error"] == {"code": "model_error", "message": "no"}
    assert failed["completed_at"] is None
    cut = shape.response(turn_id="t", request={"model": "m"}, status="incomplete", created_at=AT, reason="x")
    assert cut["incomplete_details"] == {"reason": "x"}


def test_an_event_on_the_wire() -> None:
    """Its type as the name, its number less one in the data, ASCII, LF, and nothing else."""
    logged = Event(
        EventId(3, 8), EventId(1, 7), EventKind.RESPONSE, event("output_text.delta", delta='é"\n\u2028\0\ud800')
    )
    sent = ResponseEvent(logged).sse()
    head, data, *rest = sent.decode("ascii").split("\n")
    assert (head, rest) == ("event: response.output_text.delta", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {
        "sequence_number": 7,
        "type": "response.output_text.delta",
        "delta": 'é"\n\u2028\0\ud800',
    }


@pytest.mark.parametrize("text", ["", "plain", '"}', "\\", "é\u2028\0", "\ud800"])
def test_a_delta_is_the_event_that_it_stands_for(text: str) -> None:
    where = {"item_id": 'm"}', "output_index": 3, "content_index": 0, "logprobs": []}
    assert json.loads(Delta("output_text.delta", **where).data(text)) == {
        "type": "response.output_text.delta",
        **where,
        "delta": text,
    }


def test_what_events_tell_of_the_items() -> None:
    """Which were begun, which are done, wherever the list is cut."""
    contents = [
        (EventKind.RESPONSE, event("created", response={})),
        (EventKind.RESPONSE, event("in_progress", response={})),
        (EventKind.ITEM_ADDED, item_event("added", "r", 0, item("a"))),
        (EventKind.RESPONSE, event("output_text.delta", delta='{"type":"response.output_item.done"')),
        (EventKind.RESPONSE, item_event("done", "r", 0, item("a"))),
        (EventKind.ITEM_ADDED, item_event("added", "r", 1, item("b"))),
        (EventKind.ERROR, '{"error":{}}'),
    ]
    logged = events.number(START, 1, contents, 1)
    for cut in range(len(logged)):
        begun = Begun()
        begun.read(logged[:cut])
        begun.read(logged[cut:])
        assert (begun.items, begun.done, begun.in_progress) == ({0: item("a"), 1: item("b")}, {0}, True)
        assert begun.next_index == 2
    assert Begun().next_index == 0


def test_what_is_kept_of_what_was_begun() -> None:
    """Items in steps, and calls whose results are still to come."""
    journal: list[steps.Step] = [
        said("", [call("1", index=3)], items=[indexed(1, item("a"))]),
        approved(call("2", index=5)),
    ]
    assert steps.kept(journal) == {1, 3, 5}


@pytest.mark.parametrize("kind", sorted(items._KINDS))
def test_an_item_that_will_not_be_whole_is_one_that_can_be_given_again(kind: str) -> None:
    """With a status that its type has in OpenAI's SDK."""
    begun = {"type": kind, "id": "x", "status": "in_progress"}
    unfinished = steps.unfinished(begun)
    assert {**unfinished, "status": "in_progress", "error": None} == {**begun, "error": None}
    assert unfinished["status"] == {"web_search_call": "failed", "mcp_list_tools": "in_progress"}.get(
        kind, "incomplete"
    )
    assert steps.unfinished({"type": "mcp_approval_request"}) == {"type": "mcp_approval_request"}
