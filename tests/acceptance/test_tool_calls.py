"""Several tool calls in one answer of the model, and calls that cannot be made, through the real SDKs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from llama_stack_client import LlamaStackClient
from openai import OpenAI

from tests.acceptance.conftest import AgentMaker, Caravan
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import ScriptedModel

ASK: Any = {"name": "ask", "description": "Asks.", "input_schema": {"type": "object", "properties": {}}}
DEEP = '{"a": ' + "[" * 5000 + "]" * 5000 + "}"
NO_OBJECTS = ("{oops", "[1]", '{"a": NaN, "b": 1}', DEEP)
TWICE = 'CALL add {"a": 3, "b": 4} | SAY done'


@pytest.fixture(scope="module")
def own_mcp() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


@pytest.fixture
def mcp(own_mcp: McpServer) -> McpServer:
    own_mcp.reset()
    return own_mcp


@pytest.fixture
def toolgroup(client: LlamaStackClient, mcp: McpServer) -> Iterator[str]:
    group = f"mcp::{uuid.uuid4().hex[:8]}"
    client.toolgroups.register(provider_id="model-context-protocol", toolgroup_id=group, mcp_endpoint={"uri": mcp.url})
    yield group
    client.toolgroups.unregister(group)


@pytest.fixture
def openai_sdk(caravan: Caravan) -> Iterator[Any]:
    with OpenAI(base_url=f"{caravan.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def server(mcp: McpServer) -> Any:
    return {"type": "mcp", "server_label": "shop", "server_url": mcp.url, "require_approval": "never"}


def slow_first(gate: str) -> str:
    """The first call and the last one wait for the gate; the one between does not."""
    held = f'{{"key": "%s", "hold": "{gate}"}}'
    return f'CALL order {held % "a"} & CALL count {{"key": "b"}} & CALL put {held % "c"} | SAY done'


def let_the_second_finish_first(mcp: McpServer, gate: str) -> None:
    """All three have begun, and the one between has ended, when the others may end."""
    mcp.wait_held(gate, 2)
    wait_until(lambda: [call["ended"] for call in mcp.calls() if call["tool"] == "count"] == ["finished"])
    mcp.release(gate)


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def tool_steps(turn: Any) -> list[Any]:
    return [step for step in turn.steps if step.step_type == "tool_execution"]


def told(step: Any) -> str:
    return text_of(step.tool_responses[0].content)


def test_calls_of_one_answer_run_at_once_and_are_told_in_order(
    make_agent: AgentMaker, toolgroup: str, mcp: McpServer
) -> None:
    """Each has a step of its own, in the order of the message, whichever ends first; in the stream too."""
    agent, gate = make_agent(toolgroups=[toolgroup]), uuid.uuid4().hex
    with ThreadPoolExecutor(1) as posting:
        turn = posting.submit(agent.turn, slow_first(gate))
        let_the_second_finish_first(mcp, gate)
        payloads: Any = [chunk.event.payload for chunk in turn.result()]
    steps = tool_steps(payloads[-1].turn)
    assert [(step.tool_calls[0].tool_name, told(step)) for step in steps] == [
        ("order", "a"),
        ("count", "1"),
        ("put", "c"),
    ]
    heard = [
        (payload.event_type, payload.step_id)
        for payload in payloads[:-1]
        if payload.step_type == "tool_execution" and payload.event_type != "step_progress"
    ]
    assert heard == [(kind, step.step_id) for step in steps for kind in ("step_start", "step_complete")]
    assert len({step.step_id for step in steps}) == 3


def test_server_and_client_calls_in_one_answer(make_agent: AgentMaker, toolgroup: str) -> None:
    """The server's are made, though one of them fails; the client is asked for its own only; the model hears of all."""
    agent = make_agent(toolgroups=[toolgroup], client_tools=[ASK])
    script = 'CALL ask {} & CALL fail {"message": "out of order"} & CALL add {"a": 1, "b": 2} | HISTORY'
    asked: Any = agent.turn(script)[-1].event.payload
    assert asked.event_type == "turn_awaiting_input"
    failed, added = tool_steps(asked.turn)
    assert "out of order" in told(failed)
    assert told(added) == "3"
    [call] = asked.turn.output_message.tool_calls
    resumed = agent.client.alpha.agents.turn.resume(
        asked.turn.turn_id,
        agent_id=agent.agent_id,
        session_id=agent.session_id,
        tool_responses=[{"call_id": call.call_id, "tool_name": "ask", "content": "because"}],
        stream=True,
    )
    ended: Any = list(resumed)[-1].event.payload
    history = json.loads(ended.turn.output_message.content)
    calls = [(each["id"], each["function"]["name"]) for each in history[2]["tool_calls"]]
    answers = {message["tool_call_id"]: str(message["content"]) for message in history[3:]}
    assert [name for _, name in calls] == ["ask", "fail", "add"]
    assert [[part for part in ("because", "out of order", "3") if part in answers[one]] for one, _ in calls] == [
        ["because"],
        ["out of order"],
        ["3"],
    ]


def test_calls_that_cannot_be_made_go_back_to_the_model(
    make_agent: AgentMaker, toolgroup: str, model: ScriptedModel, mcp: McpServer, http: httpx.Client
) -> None:
    """As errors that it can mend; what can be made is made. Neither a model server that reads the history strictly, nor
    a client of any version, breaks on what the model wrote."""
    agent = make_agent(toolgroups=[toolgroup])
    bad = " & ".join(f"CALLBAD add {arguments}" for arguments in NO_OBJECTS)
    turn: Any = agent.turn(f'{bad} & CALL nowhere {{}} & CALL add {{"a": 1, "b": 2}} | {TWICE}')[-1].event.payload.turn
    *refused, unknown, made, mended = tool_steps(turn)
    assert [told(step).partition(":")[0].rstrip(".") for step in refused] == [
        "The arguments are not valid JSON",
        "The arguments are not a JSON object",
        "The arguments are not valid JSON",
        "The arguments are not valid JSON",
    ]
    assert "There is no tool nowhere. Tools: add," in told(unknown)
    assert [told(made), told(mended), turn.output_message.content] == ["3", "7", "done "]
    assert [call["arguments"] for call in mcp.calls()] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    told_of = [call["function"]["arguments"] for call in model.requests()[1]["body"]["messages"][2]["tool_calls"]]
    assert [json.loads(arguments) for arguments in told_of[:4]] == [{"not_a_json_object": text} for text in NO_OBJECTS]
    for version in ("0.2.23", "0.3.5"):
        shown = http.get(f"{agent.path}/turn/{turn.turn_id}", headers={"x-llamastack-client-version": version}).json()
        calls = shown["steps"][0]["model_response"]["tool_calls"]
        assert tuple(call["arguments"] for call in calls[:4]) == NO_OBJECTS


def test_calls_with_one_id_or_none_are_several(make_agent: AgentMaker, toolgroup: str, mcp: McpServer) -> None:
    """Of the same tool with the same arguments, too: each is made, and has an id by which its response is told."""
    agent = make_agent(toolgroups=[toolgroup])
    same, none = 'CALLID x count {"key": "k"}', 'CALLID \'\' count {"key": "k"}'
    turn: Any = agent.turn(f"{same} & {same} & {none} & {none} | HISTORY")[-1].event.payload.turn
    assert sorted(told(step) for step in tool_steps(turn)) == ["1", "2", "3", "4"]
    history = json.loads(turn.output_message.content)
    ids = [call["id"] for call in history[2]["tool_calls"]]
    assert ids == [message["tool_call_id"] for message in history[3:]]
    assert len({*ids, ""}) == 5


@pytest.mark.pools("turn-pool")
def test_large_arguments_reach_the_tool(make_agent: AgentMaker, toolgroup: str, mcp: McpServer) -> None:
    """Whole."""
    key = "k" * 300_000
    turn: Any = (
        make_agent(toolgroups=[toolgroup]).turn(f'CALL count {{"key": "{key}"}} | SAY done')[-1].event.payload.turn
    )
    assert [told(step) for step in tool_steps(turn)] == ["1"]
    assert mcp.counts() == {key: 1}


def test_calls_of_a_response_run_at_once_and_are_told_in_order(openai_sdk: Any, mcp: McpServer) -> None:
    """As an agent's."""
    gate = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as posting:
        asked = {"model": "scripted", "input": slow_first(gate), "tools": [server(mcp)]}
        response = posting.submit(lambda: openai_sdk.responses.create(**asked))
        let_the_second_finish_first(mcp, gate)
        output = response.result().output
    assert [(item.name, item.output) for item in output[1:4]] == [("order", "a"), ("count", "1"), ("put", "c")]


@pytest.mark.pools("turn-pool")
def test_a_responses_own_and_its_clients_calls_in_one_answer(openai_sdk: Any, mcp: McpServer) -> None:
    """The worker's are made, though one fails or cannot be made; the client's is left to it, and the next response
    tells the model of all."""
    function = {"type": "function", "name": "ask", "parameters": {"type": "object", "properties": {}}}
    bad = " & ".join(f"CALLBAD add {arguments}" for arguments in NO_OBJECTS)
    script = f'CALL ask {{}} & CALL fail {{"message": "out of order"}} & {bad} & CALL add {{"a": 1, "b": 2}}'
    asked = openai_sdk.responses.create(model="scripted", input=script, tools=[server(mcp), function])
    [own] = [item for item in asked.output if item.type == "function_call"]
    failed, *refused, made = [item for item in asked.output if item.type == "mcp_call"]
    said = [item.error.content[0]["text"] for item in (failed, *refused)]
    assert "out of order" in said[0]
    assert [error[:21] for error in said[1:]] == ["The arguments are not"] * 4
    assert made.output == "3"
    answer = [
        {"type": "function_call_output", "call_id": own.call_id, "output": "because"},
        {"role": "user", "content": "HISTORY"},
    ]
    after = openai_sdk.responses.create(model="scripted", input=answer, previous_response_id=asked.id)
    history = json.loads(after.output_text)
    calls = history[1]["tool_calls"]
    answers = {message["tool_call_id"]: message["content"] for message in history[2:-1]}
    assert [call["function"]["name"] for call in calls] == ["ask", "fail", *["add"] * 5]
    assert [answers[call["id"]] for call in (calls[0], calls[-1])] == ["because", "3"]
    assert all("arguments are not" in answers[call["id"]] for call in calls[2:6])


@pytest.mark.pools("turn-pool")
def test_a_response_mends_its_arguments(openai_sdk: Any, mcp: McpServer) -> None:
    """After an error, in the same response."""
    response = openai_sdk.responses.create(model="scripted", input=f"CALLBAD add {{oops | {TWICE}", tools=[server(mcp)])
    assert [(item.output, item.error is None) for item in response.output[1:3]] == [(None, False), ("7", True)]
    assert response.output_text == "done "
