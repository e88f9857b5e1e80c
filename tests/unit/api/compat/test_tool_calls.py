"""Arguments of tool calls, to clients before 0.3 and from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import JSONResponse

from app.api.compat import tool_calls
from app.api.compat.dialect import BEFORE_03, CANONICAL
from app.domain import events
from app.domain.errors import TurnFailure
from app.domain.events import Event, EventId, EventKind, StepProgress

CALL = {"call_id": "c", "tool_name": "boil", "arguments": '{"liquid":"caf\\u00e9"}'}
OLD_CALL = {**CALL, "arguments": {"liquid": "café"}, "arguments_json": CALL["arguments"]}
MESSAGE = {"role": "assistant", "content": "", "stop_reason": "end_of_message", "tool_calls": [CALL]}
INFERENCE = {"step_type": "inference", "step_id": "s", "model_response": MESSAGE}
EXECUTION = {"step_type": "tool_execution", "step_id": "t", "tool_calls": [CALL], "tool_responses": []}
TURN: dict[str, Any] = {
    "turn_id": "t",
    "input_messages": [{"role": "user", "content": "x"}, {"role": "tool", "call_id": "c", "content": "y"}],
    "steps": [INFERENCE, EXECUTION],
    "output_message": MESSAGE,
}


def test_arguments_become_an_object_with_the_string_beside() -> None:
    """0.1 and 0.2 read either."""
    assert tool_calls.with_object(CALL) == OLD_CALL


@pytest.mark.parametrize("text", ["{not json", "[1]", "3", ""])
def test_arguments_that_are_no_object_stay_a_string(text: str) -> None:
    """Models write such; the client's tool fails and the model is told."""
    assert tool_calls.with_object({**CALL, "arguments": text}) == {**CALL, "arguments": text, "arguments_json": text}


@pytest.mark.parametrize(
    "text",
    [
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":1e999}',
        '{"a":"\\ud83d"}',
        '{"a":' + "[" * 5000,
        '{"a":' + "[" * 999 + "]" * 999 + "}",
    ],
)
def test_arguments_that_no_answer_can_hold_stay_a_string(text: str) -> None:
    """The turn, its session and its stream are sent and read all the same."""
    told = tool_calls.with_object({**CALL, "arguments": text})
    assert told == {**CALL, "arguments": text, "arguments_json": text}
    JSONResponse(told)


def test_an_object_from_a_client_becomes_the_string() -> None:
    """`arguments_json` goes first, since it is what the model wrote."""
    assert tool_calls.with_string(OLD_CALL) == CALL
    assert json.loads(tool_calls.with_string({**CALL, "arguments": {"a": 1}})["arguments"]) == {"a": 1}
    for as_it_is in (CALL, "no call", {"call_id": "c"}):
        assert tool_calls.with_string(as_it_is) == as_it_is


def test_every_call_of_a_turn_has_an_object() -> None:
    """In inference and tool execution steps and in the output message; tool messages get the name that 0.1 wants."""
    turn = tool_calls.in_turn(TURN)
    assert turn["steps"][0]["model_response"]["tool_calls"] == [OLD_CALL]
    assert turn["steps"][1]["tool_calls"] == [OLD_CALL]
    assert turn["output_message"]["tool_calls"] == [OLD_CALL]
    assert turn["input_messages"] == [TURN["input_messages"][0], {**TURN["input_messages"][1], "tool_name": ""}]
    assert TURN["steps"][0]["model_response"]["tool_calls"] == [CALL], "what is given is not changed"


def test_other_steps_and_messages_without_calls_stay_as_they_are() -> None:
    """A shield call, and a message whose `tool_calls` is null."""
    shield = {"step_type": "shield_call", "violation": None}
    assert tool_calls.in_step(shield) == shield
    assert tool_calls.in_message({**MESSAGE, "tool_calls": None}) == {**MESSAGE, "tool_calls": None}


def event(kind: EventKind, data: str) -> Event:
    return Event(EventId(1, 2), EventId(1, 1), kind, data)


def test_events_are_rewritten_where_they_hold_a_call() -> None:
    """Ids stay, the data are ASCII, and rewriting the same event gives the same bytes."""
    progress = StepProgress("inference", "s")
    told = [
        event(EventKind.STEP_PROGRESS, progress.tool_call(CALL, "succeeded")),
        event(
            EventKind.STEP_COMPLETE,
            events.payload(EventKind.STEP_COMPLETE, step_type="inference", step_id="s", step_details=INFERENCE),
        ),
        event(EventKind.TURN_AWAITING_INPUT, events.turn_awaiting_input(TURN)),
        event(EventKind.TURN_COMPLETE, events.turn_complete(TURN)),
    ]
    for each in told:
        rewritten = tool_calls.in_event(each)
        assert rewritten == tool_calls.in_event(each)
        assert (rewritten.id, rewritten.after, rewritten.kind) == (each.id, each.after, each.kind)
        assert '"arguments":{"liquid":"caf\\u00e9"},"arguments_json":"{' in rewritten.data
        assert rewritten.data.isascii()


def test_other_events_are_not_touched() -> None:
    """Text (also one that speaks of tools), calls in progress, starts and errors stay byte for byte."""
    progress = StepProgress("inference", "s")
    for each in (
        event(EventKind.STEP_PROGRESS, progress.text('a "tool_name" é')),
        event(EventKind.STEP_PROGRESS, progress.tool_call('boil({"liq', "in_progress")),
        event(EventKind.STEP_START, events.step_start("inference", "s")),
        event(EventKind.ERROR, events.error(TurnFailure("model_error", 'the "tool" broke'))),
    ):
        assert tool_calls.in_event(each) == each


async def test_a_client_since_03_gets_the_stream_itself() -> None:
    """Nothing stands between, and nothing is parsed; before 0.3 the source is closed with the stream."""
    closed = []

    async def batches() -> Any:
        try:
            yield [event(EventKind.TURN_COMPLETE, "not even JSON")]
            yield []
        finally:
            closed.append(True)

    source = batches()
    assert CANONICAL.events(source) is source
    rewritten = BEFORE_03.events(source)
    assert await anext(rewritten) == [event(EventKind.TURN_COMPLETE, "not even JSON")]
    await rewritten.aclose()  # type: ignore[attr-defined]  # an async generator
    assert closed == [True]
