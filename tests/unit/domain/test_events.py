"""Events: ids, lines, segments, and the one serialized form."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from llama_stack.apis.agents import (
    AgentTurnResponseStreamChunk,
    InferenceStep,
    ShieldCallStep,
    ToolExecutionStep,
    Turn,
)
from llama_stack.apis.inference import ToolResponse, UserMessage

from app.domain import events, shapes
from app.domain.errors import TurnFailure
from app.domain.events import START, Event, EventId, EventKind, StepProgress, from_line, pack, to_line, unpack
from tests.unit.domain.journals import call, executed, inference, message

any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates, U+0000 and all
sane_text = st.text()
ids = st.builds(EventId, st.integers(0, 10**9 - 1), st.integers(0, 10**15 - 1))
ODD = ['"}}}null}}}', "\u2028\u2029", "🐫👩‍👩‍👧", "a\nb\r\n\0", "\ud83d", "é\\u00e9", "</script>"]


def odd(test: Any) -> Any:
    for text in ODD:
        test = example(text)(test)
    return test


@given(ids)
def test_an_id_is_read_back(identifier: EventId) -> None:
    """`<fence>-<n>`."""
    assert EventId.parse(str(identifier)) == identifier


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1-",
        "-1",
        "1-2-3",
        "a-1",
        "1-b",
        " 1-2",
        "1-2\n",
        "+1-2",
        "1_0-2",
        "0x1-2",
        "9" * 10 + "-1",
        "1-" + "9" * 16,
    ],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    """ValueError, with the text."""
    with pytest.raises(ValueError, match="is not an event id"):
        EventId.parse(text)


@given(ids, ids)
def test_ids_are_ordered_by_fence_and_then_by_number(one: EventId, other: EventId) -> None:
    """A newer attempt's events come after all of an older one's."""
    assert (one < other) == (one.fence < other.fence or (one.fence == other.fence and one.n < other.n))
    assert one >= START


def made(contents: list[tuple[EventKind, str]], after: EventId = START, fence: int = 1) -> list[Event]:
    encoded = [(kind, events.ascii_json({"text": text})) for kind, text in contents]
    return events.number(after, fence, encoded, after.n + 1)


@given(st.lists(st.tuples(st.sampled_from(EventKind), any_text), min_size=1), ids)
def test_a_segment_is_read_back(contents: list[tuple[EventKind, str]], after: EventId) -> None:
    """Whatever the text; each event follows the one before."""
    packed = made(contents, after, after.fence + 1)
    assert unpack(pack(packed)) == packed
    assert [from_line(to_line(event)) for event in packed] == packed
    assert [event.after for event in packed] == [after, *(event.id for event in packed[:-1])]
    assert [event.id.n for event in packed] == list(range(after.n + 1, after.n + 1 + len(packed)))


@given(any_text)
@odd
def test_an_event_on_the_wire_is_ascii_of_three_lines(text: str) -> None:
    """A character split across reads, or a line separator in the text, cannot break it."""
    [event] = made([(EventKind.STEP_PROGRESS, text)])
    wire = event.sse()
    assert wire.isascii()
    assert wire.split(b"\n") == [b"id: 1-1", b"data: " + event.data.encode(), b"", b""]
    assert b"\r" not in wire
    assert json.loads(event.data)["text"] == text


@given(any_text, any_text)
@example("null}}}", "null}}}")
def test_a_text_delta_is_the_generic_payload(text: str, step_id: str) -> None:
    """The fast path writes what the slow one would."""
    delta = {"type": "text", "text": text}
    expected = events.payload(EventKind.STEP_PROGRESS, step_type="inference", step_id=step_id, delta=delta)
    assert StepProgress("inference", step_id).text(text) == expected


@given(any_text, st.sampled_from(["in_progress", "succeeded"]))
@example("null}}}", "succeeded")
def test_a_tool_call_delta_is_the_generic_payload(text: str, status: str) -> None:
    """For pieces of a call, and for the whole of it."""
    for tool_call in (text, {"call_id": text, "tool_name": text, "arguments": text}):
        delta = {"type": "tool_call", "tool_call": tool_call, "parse_status": status}
        expected = events.payload(EventKind.STEP_PROGRESS, step_type="tool_execution", step_id="s", delta=delta)
        assert StepProgress("tool_execution", "s").tool_call(tool_call, status) == expected


def assert_as_llama_stack(data: str) -> None:
    """The bytes are those that llama_stack's own model gives, in ASCII."""
    chunk = AgentTurnResponseStreamChunk.model_validate_json(data)
    assert data == events.ascii_json(chunk.model_dump(mode="json"))
    assert json.loads(data) == json.loads(chunk.model_dump_json())


times = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 hypothesis adds the zone


@given(sane_text, times, times)
@example("\u2028🐫\0", datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC))
def test_every_event_has_llama_stacks_shape(text: str, started: datetime, completed: datetime) -> None:
    """Field for field, in its order and its format of times."""
    asked = call("add", "c1").model_copy(update={"arguments": text})
    answered = ToolResponse(call_id="c1", tool_name="add", content=text, metadata={"score": 0.5, "text": text})
    span = {"step_id": "s", "turn_id": "t", "started_at": started, "completed_at": completed}
    steps = [
        InferenceStep(model_response=message(asked, content=text), **span),
        ToolExecutionStep(tool_calls=[asked], tool_responses=[answered], **span),
        ShieldCallStep(violation=None, **span),
    ]
    turn = shapes.turn(
        turn_id="t",
        session_id="s",
        input_messages=[events.dump(UserMessage(content=text))],
        steps=[events.dump(step) for step in steps],
        output_message=events.dump(message(content=text)),
        started_at=started,
        completed_at=completed,
    )
    assert turn == Turn.model_validate(turn).model_dump(mode="json")
    progress = StepProgress("inference", "s")
    for data in (
        events.step_start("inference", "s"),
        progress.text(text),
        progress.tool_call(text, "in_progress"),
        progress.tool_call(events.dump(asked), "succeeded"),
        *(events.step_complete(step) for step in steps),
        events.turn_awaiting_input(turn),
        events.turn_complete(turn),
    ):
        assert_as_llama_stack(data)


def test_steps_of_a_journal_are_read_back() -> None:
    """A step that was stored is the step that was recorded."""
    for step in (inference(message(content="x")), executed(call("add"))):
        assert type(step).model_validate(events.dump(step)) == step


def test_a_failure_is_an_error_with_its_code() -> None:
    """The status is there only where the model server gave one."""
    assert json.loads(events.error(TurnFailure("cancelled", "Cancelled."))) == {
        "error": {"code": "cancelled", "message": "Cancelled."}
    }
    assert json.loads(events.error(TurnFailure("model_error", "é", 429)))["error"]["status"] == 429
    assert events.error(TurnFailure("model_error", "é")).isascii()


@given(times, st.integers(-12, 12))
def test_times_are_those_of_pydantic(time: datetime, hours: int) -> None:
    """In UTC, with a Z."""
    step = inference(message()).model_copy(update={"started_at": time})
    assert shapes.iso(time.astimezone(timezone(timedelta(hours=hours)))) == events.dump(step)["started_at"]
    assert shapes.iso(None) is None


def test_no_message_is_a_completion_message() -> None:
    """SDKs require the field."""
    assert events.dump(message()) == shapes.NO_MESSAGE


def test_terminal_kinds_end_a_leg() -> None:
    """And so does awaiting input, which ends no turn."""
    assert {EventKind.TURN_AWAITING_INPUT} == events.LEG_END - events.TERMINAL
