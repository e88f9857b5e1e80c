"""What a turn does next."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_stack.apis.agents import Step
from llama_stack.apis.inference import StopReason, ToolResponse
from pydantic import TypeAdapter

from app.domain.decide import AwaitInput, Finish, Infer, RecordResponses, RunShields, RunTools, decide, split_calls
from tests.unit.domain.journals import call, config, executed, inference, message, messages, responses, shielded

ADD, ECHO, ASK, SHOW = call("add", "a"), call("echo", "e"), call("ask", "k"), call("show", "s")
END, MORE, CUT = StopReason.end_of_turn, StopReason.end_of_message, StopReason.out_of_tokens
MIXED = inference(message(ADD, ASK, ECHO, SHOW))
TEXT = message(content="Hello")

CASES: dict[str, tuple[list[Any], dict[int, Any], Any]] = {
    "a new turn": ([], {}, Infer()),
    "an answer": ([inference(TEXT)], {}, Finish(TEXT)),
    "a message that is to go on": ([inference(message(reason=MORE))], {}, Infer()),
    "out of tokens": ([inference(message(reason=CUT))], {}, Finish(message(reason=CUT))),
    "out of tokens with calls": ([inference(message(ADD, ASK, reason=CUT))], {}, Finish(message(reason=CUT))),
    "a server call": ([inference(message(ADD))], {}, RunTools(0, ((0, ADD),))),
    "calls although the turn's end is told": ([inference(message(ADD, reason=END))], {}, RunTools(0, ((0, ADD),))),
    "parallel calls": ([inference(message(ADD, ECHO))], {}, RunTools(0, ((0, ADD), (1, ECHO)))),
    "one of them done": ([inference(message(ADD, ECHO)), executed(ADD)], {}, RunTools(0, ((1, ECHO),))),
    "all of them done": ([inference(message(ADD, ECHO)), executed(ADD), executed(ECHO)], {}, Infer()),
    "a client call": ([inference(message(ASK))], {}, AwaitInput(message(ASK, reason=MORE))),
    "its answer": ([inference(message(ASK))], {0: responses(ASK)}, RecordResponses((ASK,), tuple(responses(ASK)))),
    "no answer to it": ([inference(message(ASK))], {0: []}, RecordResponses((ASK,), ())),
    "its answer recorded": ([inference(message(ASK)), executed(ASK)], {0: responses(ASK)}, Infer()),
    "both kinds": ([MIXED], {}, RunTools(0, ((0, ADD), (2, ECHO)))),
    "both kinds, one server call done": ([MIXED, executed(ADD)], {}, RunTools(0, ((2, ECHO),))),
    "both kinds, the server's done": (
        [MIXED, executed(ADD), executed(ECHO)],
        {},
        AwaitInput(message(ASK, SHOW, reason=MORE)),
    ),
    "both kinds, the client's answered": (
        [MIXED, executed(ADD), executed(ECHO)],
        {0: responses(ASK, SHOW)},
        RecordResponses((ASK, SHOW), tuple(responses(ASK, SHOW))),
    ),
    "both kinds, all recorded": ([MIXED, executed(ADD), executed(ECHO), executed(ASK, SHOW)], {0: []}, Infer()),
    "the second time": (
        [inference(message(ASK)), executed(ASK), inference(message(ASK))],
        {0: responses(ASK)},
        AwaitInput(message(ASK, reason=MORE)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_action(case: str) -> None:
    """Of each kind of journal."""
    journal, answered, action = CASES[case]
    assert decide(config(), journal, answered) == action


SHIELDS: dict[str, Any] = {"input_shields": ["in", "in2", "in"], "output_shields": ["out"]}
ASKING = message(ASK, reason=MORE)
SHIELDED: dict[str, tuple[list[Any], dict[int, Any], Any]] = {
    "a new turn": ([], {}, RunShields(("in", "in2"), 0)),
    "input that passed": ([shielded()], {}, Infer()),
    "input that was refused": ([shielded("no")], {}, Finish(message(content="no"))),
    "an answer": ([shielded(), inference(TEXT)], {}, RunShields(("out",), 1, TEXT)),
    "an answer that passed": ([shielded(), inference(TEXT), shielded()], {}, Finish(TEXT)),
    "an answer that was refused": ([shielded(), inference(TEXT), shielded("no")], {}, Finish(message(content="no"))),
    "a message that is to go on": ([shielded(), inference(message(reason=MORE))], {}, Infer()),
    "out of tokens": (
        [shielded(), inference(message(ADD, reason=CUT))],
        {},
        RunShields(("out",), 1, message(reason=CUT)),
    ),
    "a server call": ([shielded(), inference(message(ADD))], {}, RunTools(1, ((0, ADD),))),
    "a server call done": ([shielded(), inference(message(ADD)), executed(ADD)], {}, Infer()),
    "a client call": ([shielded(), inference(message(ASK))], {}, RunShields(("out",), 1, ASKING)),
    "a client call that passed": ([shielded(), inference(message(ASK)), shielded()], {}, AwaitInput(ASKING)),
    "its answer": (
        [shielded(), inference(message(ASK)), shielded()],
        {1: responses(ASK)},
        RecordResponses((ASK,), tuple(responses(ASK))),
    ),
    "its answer recorded": (
        [shielded(), inference(message(ASK)), shielded(), executed(ASK)],
        {1: responses(ASK)},
        RunShields(("in", "in2"), 4),
    ),
    "its answer that passed": (
        [shielded(), inference(message(ASK)), shielded(), executed(ASK), shielded()],
        {1: responses(ASK)},
        Infer(),
    ),
    "its answer that was refused": (
        [shielded(), inference(message(ASK)), shielded(), executed(ASK), shielded("no")],
        {1: responses(ASK)},
        Finish(message(content="no")),
    ),
    "both kinds, the server's done": (
        [shielded(), inference(message(ADD, ASK)), executed(ADD)],
        {},
        RunShields(("out",), 1, ASKING),
    ),
}


@pytest.mark.parametrize("case", SHIELDED)
def test_the_next_action_with_shields(case: str) -> None:
    """Input shields at the beginning of each leg, output shields at its end; a refusal is the turn's end."""
    journal, answered, action = SHIELDED[case]
    assert decide(config(**SHIELDS), journal, answered) == action


@pytest.mark.parametrize("last", [message(ADD), message(ASK), message(ADD, ASK), TEXT, message(reason=MORE)])
def test_a_turn_out_of_iterations_ends_without_open_calls(last: Any) -> None:
    """Nobody would run them."""
    journal = [inference(message(ADD)), executed(ADD), inference(last)]
    expected = last.model_copy(update={"tool_calls": [], "stop_reason": END})
    assert decide(config(max_infer_iters=2), journal, {}) == Finish(expected)
    assert decide(config(max_infer_iters=3), journal, {}) != Finish(expected) or last == TEXT


def test_no_limit_is_ten_iterations() -> None:
    """As llama_stack's default."""
    limitless = config().model_copy(update={"max_infer_iters": None})
    step = inference(message(reason=MORE))
    assert decide(limitless, [step] * 9, {}) == Infer()
    assert isinstance(decide(limitless, [step] * 10, {}), Finish)


def test_the_journal_is_not_changed() -> None:
    """What is recorded is what the model said, also where the turn ends with less."""
    step = inference(message(ADD, ASK))
    for limit in (1, 5):
        decide(config(limit), [step, executed(ADD)], {})
    assert step == inference(message(ADD, ASK))


@pytest.mark.parametrize("name", ["ask", "code_interpreter", "brave_search"])
def test_a_call_of_a_client_tool_is_the_clients(name: str) -> None:
    """Also where llama_stack takes the name for that of a builtin tool."""
    agent = config().model_copy(deep=True)
    agent.client_tools[0].name = name
    client, server = split_calls(agent, message(call(name), ADD))
    assert (len(client), server) == (1, [(1, ADD)])


_steps: TypeAdapter[list[Any]] = TypeAdapter(list[Step])


@given(st.data(), st.integers(1, 4))
def test_every_reachable_journal_leads_to_an_end(data: st.DataObject, limit: int) -> None:
    """A turn is played with any messages, crashes included: it ends, in time, and makes each call once.

    Every decision is the same when it is made again, also from the journal as it is stored; none asks for a call that
    was answered.
    """
    shields = {kind: data.draw(st.sampled_from(([], ["guard"]))) for kind in ("input_shields", "output_shields")}
    agent, journal, answered = config(limit, **shields), list[Any](), dict[int, list[ToolResponse]]()
    for _ in itertools.repeat(None, 60):
        action = decide(agent, journal, answered)
        stored = _steps.validate_python(_steps.dump_python(journal, mode="json"))
        assert decide(agent, stored, answered) == decide(agent, journal, answered) == action
        match action:
            case RunShields(message=asking):
                assert shields["input_shields" if asking is None else "output_shields"]
                journal.append(shielded(data.draw(st.sampled_from((None, None, "no")))))
            case Infer():
                assert not shields["input_shields"] or any(step.step_type == "shield_call" for step in journal)
                journal.append(inference(data.draw(messages)))
            case RunTools(ordinal, asked):
                assert asked
                assert [one for _, one in asked] == pending(agent, journal, ordinal)
                done = data.draw(st.integers(1, len(asked)), "recorded before the worker is lost")
                journal += [executed(one) for _, one in asked[:done]]
            case AwaitInput(asking):
                ordinal = max(index for index, step in enumerate(journal) if step.step_type == "inference")
                assert ordinal not in answered
                assert asking.tool_calls == split_calls(agent, journal[ordinal].model_response)[0]
                answered[ordinal] = responses(*asking.tool_calls)
            case RecordResponses(asked, given_responses):
                assert len(asked) == len(given_responses)
                journal.append(executed(*asked))
            case Finish(last):
                assert last.tool_calls == []
                assert not shields["output_shields"] or journal[-1].step_type == "shield_call"
                break
    else:
        pytest.fail("the turn does not end")
    assert sum(step.step_type == "inference" for step in journal) <= limit


def pending(agent: Any, journal: list[Any], ordinal: int) -> list[Any]:
    """The server calls of an inference step that no step has answered yet."""
    _, server = split_calls(agent, journal[ordinal].model_response)
    done = sum(step.step_type == "tool_execution" for step in journal[ordinal + 1 :])
    return [one for _, one in server][done:]
