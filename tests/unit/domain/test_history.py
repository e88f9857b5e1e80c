"""What the model is given."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from llama_stack.apis.inference import CompletionMessage, SystemMessage, ToolResponseMessage, UserMessage

from app.domain.history import UNANSWERED, complete, conversation, turn_messages
from tests.unit.domain.journals import call, config, executed, inference, message, shielded

ASK = call("ask", "k")


def said(text: str) -> UserMessage:
    return UserMessage(content=text)


def answer(call_id: str, content: str = "r") -> ToolResponseMessage:
    return ToolResponseMessage(call_id=call_id, content=content)


def test_instructions_come_first_if_there_are_any() -> None:
    """An empty one is none."""
    agent = config().model_copy(update={"instructions": "Be brief."})
    assert conversation(agent, []) == [SystemMessage(content="Be brief.")]
    assert conversation(config(), []) == []


def test_a_turn_is_its_input_and_its_steps_in_order() -> None:
    """Tool steps become tool messages."""
    one, two = call("add", "1"), call("echo", "2")
    steps = [inference(message(one, two)), executed(one), executed(two), inference(message(content="done"))]
    assert turn_messages([said("hi")], steps) == [
        said("hi"),
        message(one, two),
        answer("1"),
        answer("2"),
        message(content="done"),
    ]


def test_context_is_not_repeated_and_the_input_stays_as_it_is() -> None:
    """It belongs to the turn that it was given with."""
    given_message = UserMessage(content="hi", context="much")
    assert turn_messages([given_message], []) == [said("hi")]
    assert given_message.context == "much"


def test_an_input_that_a_step_repeats_is_given_once() -> None:
    """Tool responses in the input, as llama_stack's resumed turns had them."""
    steps = [inference(message(ASK)), executed(ASK)]
    assert turn_messages([said("hi"), answer("k")], steps) == [said("hi"), message(ASK), answer("k")]


def test_a_refused_answer_is_told_as_its_refusal() -> None:
    """In place of all that was said in its turn."""
    steps = [shielded(), inference(message(ASK)), executed(ASK), inference(message(content="bad")), shielded("no")]
    assert turn_messages([said("hi")], steps) == [said("hi"), message(content="no")]


def test_what_no_input_shield_has_let_pass_is_not_told() -> None:
    """It was refused, or its turn failed before that; of the current turn it is told, for the shields to judge."""
    agent = config(input_shields=["guard"])
    answered = [shielded(), inference(message(content="done"))]
    past: list[Any] = [([said("bad")], [shielded("no")]), ([said("unknown")], []), ([said("good")], answered)]
    now: Any = ([said("now")], [])
    assert conversation(agent, [*past, now]) == [said("good"), message(content="done"), said("now")]
    assert conversation(config(), [past[1], now]) == [said("unknown"), said("now")]


def test_a_client_s_response_that_no_input_shield_has_let_pass_is_not_told() -> None:
    """Its call is answered as one whose outcome is unknown; a server tool's result is told."""
    agent, add = config(input_shields=["guard"]), call("add", "a")
    for asked, told in ((ASK, UNANSWERED), (add, "r")):
        past = ([said("hi")], [shielded(), inference(message(asked)), executed(asked)])
        messages = conversation(agent, [past, ([said("now")], [])])
        assert messages == [said("hi"), message(asked), answer(asked.call_id, told), said("now")]


def test_an_open_call_is_answered_before_the_next_message() -> None:
    """In the order of the calls, behind the answers that there are."""
    one, two, three = (call("add", name) for name in "123")
    completed = complete([said("hi"), message(one, two, three), answer("2"), said("and?")])
    assert completed == [
        said("hi"),
        message(one, two, three),
        answer("2"),
        answer("1", UNANSWERED),
        answer("3", UNANSWERED),
        said("and?"),
    ]


def test_each_past_turn_is_completed() -> None:
    """One that was cancelled with an open call does not spoil the session."""
    turns: list[Any] = [([said("one")], [inference(message(ASK))]), ([said("two")], [])]
    assert conversation(config(), turns) == [said("one"), message(ASK), answer("k", UNANSWERED), said("two")]


def test_a_tool_response_given_as_a_turn_of_its_own_answers_the_call() -> None:
    """Clients before 0.1.6 do not resume: they post the response as the next turn's input."""
    turns: list[Any] = [([said("one")], [inference(message(ASK))]), ([answer("k", "because")], [])]
    assert conversation(config(), turns) == [said("one"), message(ASK), answer("k", "because")]


@st.composite
def conversations(draw: st.DrawFn) -> list[Any]:
    """Messages in any order, each call with an id of its own, each answered at most once, right behind or never."""
    made: list[Any] = []
    for number in range(draw(st.integers(0, 6))):
        asked = [call("add", f"{number}.{index}") for index in range(draw(st.integers(0, 3)))]
        made.append(draw(st.sampled_from([said("hi"), message(*asked)])))
        if isinstance(made[-1], CompletionMessage):
            made += [answer(one.call_id) for one in draw(st.permutations(asked)) if draw(st.booleans())]
    return made


@given(conversations())
def test_every_call_is_answered_exactly_once_before_the_next_message(given_messages: list[Any]) -> None:
    """Whatever the conversation; nothing that was there is lost or moved; completing again changes nothing."""
    completed = complete(given_messages)
    open_calls: Counter[str] = Counter()
    for one in [*completed, said("the end")]:
        if isinstance(one, ToolResponseMessage):
            open_calls[one.call_id] -= 1
            assert open_calls[one.call_id] == 0
        else:
            assert not any(open_calls.values())
            if isinstance(one, CompletionMessage):
                open_calls.update(asked.call_id for asked in one.tool_calls)
    kept = [one for one in completed if getattr(one, "content", None) != UNANSWERED]
    assert kept == given_messages
    assert complete(completed) == completed
