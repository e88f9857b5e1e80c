"""Turns over the SDK, through the queue, with both pools."""

from __future__ import annotations

import json
import threading
import uuid
from typing import Any

import httpx
import pytest
from llama_stack_client import Agent, AgentEventLogger, APIStatusError, ConflictError

from tests.acceptance.conftest import AgentMaker, Caravan
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import ScriptedModel

# Most of it is the web process's: in the other pool they run with `make test-all`.
pytestmark = pytest.mark.pools("turn-pool")
both_pools = pytest.mark.pools("turn-pool", "prefork")

BOILING_POINT = {
    "name": "get_boiling_point",
    "description": "The boiling point of a liquid",
    "input_schema": {"type": "object", "properties": {"liquid": {"type": "string"}}, "required": ["liquid"]},
}


def kinds(chunks: list[Any]) -> list[str]:
    return [chunk.event.payload.event_type for chunk in chunks if chunk.event is not None]


@both_pools
def test_a_plain_turn_streams_its_steps(make_agent: AgentMaker) -> None:
    """Deltas come as the model says them; the last event holds the whole turn."""
    chunks = make_agent().turn("SAY hello there world")
    assert kinds(chunks) == ["step_start", *["step_progress"] * 3, "step_complete", "turn_complete"]
    assert [chunk.event.payload.delta.text for chunk in chunks[1:4]] == ["hello ", "there ", "world "]
    turn = chunks[-1].event.payload.turn
    assert turn.output_message.content == "hello there world "
    assert [step.step_type for step in turn.steps] == ["inference"]


def test_a_stored_turn_is_the_one_that_was_streamed(make_agent: AgentMaker, http: httpx.Client) -> None:
    """GET turn, GET step and GET session show just what the completion event showed."""
    agent = make_agent()
    with http.stream("POST", f"{agent.path}/turn", json=_body("SAY same")) as stream:
        last = [line for line in stream.iter_lines() if line.startswith("data: ")][-1]
    turn = json.loads(last.removeprefix("data: "))["event"]["payload"]["turn"]
    assert http.get(f"{agent.path}/turn/{turn['turn_id']}").json() == turn
    assert http.get(agent.path).json()["turns"] == [turn]
    step = turn["steps"][0]
    assert http.get(f"{agent.path}/turn/{turn['turn_id']}/step/{step['step_id']}").json() == {"step": step}


@both_pools
def test_the_turn_was_claimed_by_a_worker_process(make_agent: AgentMaker, http: httpx.Client, caravan: Caravan) -> None:
    """The worker that ran a turn is named, and is no web process."""
    agent = make_agent()
    turn_id = agent.turn("SAY x")[-1].event.payload.turn.turn_id
    answer = http.get(f"{agent.path}/turn/{turn_id}")
    pid = int(answer.headers["x-caravan-worker"].rpartition(":")[2])
    process = caravan.worker.container.process
    assert pid in [process.pid, *process.children()]
    assert answer.headers["x-turn-status"] == "completed"
    assert f"[turn {turn_id}] claimed, attempt 1" in caravan.worker.logs()


def test_the_model_is_given_the_history(make_agent: AgentMaker) -> None:
    """A second turn sees the first one, and the instructions."""
    agent = make_agent(instructions="Remember")
    agent.turn("SAY my name is Ada")
    roles = [(m["role"], m["content"]) for m in json.loads(agent.answer("HISTORY"))]
    assert roles == [
        ("system", "Remember"),
        ("user", "SAY my name is Ada"),
        ("assistant", "my name is Ada "),
        ("user", "HISTORY"),
    ]


@both_pools
def test_a_client_tool_awaits_input_and_is_resumed(make_agent: AgentMaker) -> None:
    """The turn asks for the call, the resume records its response in a step of its own, the model goes on."""
    agent = make_agent(client_tools=[BOILING_POINT])
    first = agent.turn('CALL get_boiling_point {"liquid": "polyjuice"}')
    assert kinds(first)[-2:] == ["step_complete", "turn_awaiting_input"]
    asked = first[-1].event.payload.turn
    call = asked.output_message.tool_calls[0]
    resumed: list[Any] = list(
        agent.client.alpha.agents.turn.resume(
            asked.turn_id,
            agent_id=agent.agent_id,
            session_id=agent.session_id,
            tool_responses=[{"call_id": call.call_id, "tool_name": call.tool_name, "content": "-100"}],
            stream=True,
        )
    )
    assert kinds(resumed)[0] == "step_complete"
    turn = resumed[-1].event.payload.turn
    assert turn.output_message.content == "The tool said: -100 "
    assert [step.step_type for step in turn.steps] == ["inference", "tool_execution", "inference"]
    assert len({step.step_id for step in turn.steps}) == 3
    again: Any = {"tool_responses": [{"call_id": call.call_id, "tool_name": call.tool_name, "content": "x"}]}
    with pytest.raises(ConflictError):
        agent.client.alpha.agents.turn.resume(
            asked.turn_id, agent_id=agent.agent_id, session_id=agent.session_id, **again
        )


def test_tool_responses_must_answer_the_calls(make_agent: AgentMaker) -> None:
    """A resume that answers other calls than were asked is 400, names them, and loses nothing."""
    agent = make_agent(client_tools=[BOILING_POINT])
    asked = agent.turn('CALL get_boiling_point {"liquid": "x"}')[-1].event.payload.turn
    resume: Any = agent.client.alpha.agents.turn.resume
    where: dict[str, Any] = {"agent_id": agent.agent_id, "session_id": agent.session_id}
    with pytest.raises(APIStatusError, match="call_id") as refused:
        resume(asked.turn_id, **where, tool_responses=[{"call_id": "other", "tool_name": "x", "content": ""}])
    assert refused.value.status_code == 400
    call = asked.output_message.tool_calls[0]
    right = [{"call_id": call.call_id, "tool_name": call.tool_name, "content": "1"}]
    assert resume(asked.turn_id, **where, tool_responses=right).output_message.content == "The tool said: 1 "


def test_a_turn_without_a_stream_gives_the_turn(make_agent: AgentMaker) -> None:
    """`stream: false` waits for the leg's end: a turn, awaiting input or complete, or the model's error."""
    agent = make_agent(client_tools=[BOILING_POINT])
    create = agent.client.alpha.agents.turn.create
    where: dict[str, Any] = {"session_id": agent.session_id, "agent_id": agent.agent_id}
    done = create(**where, messages=[{"role": "user", "content": "SAY at once"}])
    assert done.output_message.content == "at once "
    asked = create(**where, messages=[{"role": "user", "content": 'CALL get_boiling_point {"liquid": "x"}'}])
    assert asked.output_message.tool_calls[0].tool_name == "get_boiling_point"
    with pytest.raises(APIStatusError, match="no such model") as failed:
        create(**where, messages=[{"role": "user", "content": "ERR 400 no such model"}])
    assert failed.value.status_code == 400


@both_pools
def test_an_mcp_tool_runs_on_the_worker(make_agent: AgentMaker) -> None:
    """A toolgroup registered while the worker runs is usable by the very next turn, with a real MCP server."""
    with McpServer() as server:
        agent = make_agent()
        group = f"mcp::{uuid.uuid4().hex[:8]}"
        agent.client.toolgroups.register(
            provider_id="model-context-protocol", toolgroup_id=group, mcp_endpoint={"uri": server.url}
        )
        chunks = agent.turn('CALL add {"a": 2, "b": 3} & CALL add {"a": 10, "b": 20}', toolgroups=[group])
        turn = chunks[-1].event.payload.turn
        responses = [step.tool_responses[0].content for step in turn.steps if step.step_type == "tool_execution"]
        assert [response[0].text for response in responses] == ["5", "30"]
        assert sorted(call["arguments"]["a"] for call in server.calls()) == [2, 10]
        assert all("session_id" not in call["arguments"] for call in server.calls())
        assert turn.output_message.content.startswith("The tool said:")


def test_a_tool_that_fails_is_told_to_the_model(make_agent: AgentMaker) -> None:
    """Unknown tools, bad arguments and failing tools become responses; the turn goes on and completes."""
    agent = make_agent()
    turn = agent.turn("CALL no_such_tool {}")[-1].event.payload.turn
    assert "There is no tool no_such_tool" in turn.output_message.content


@both_pools
@pytest.mark.parametrize("script", ["ERR 500 it broke", "PART some words | ERR 500 it broke"])
def test_a_model_error_ends_the_turn_and_is_stored(make_agent: AgentMaker, http: httpx.Client, script: str) -> None:
    """Before the stream or in the middle of it: the last event is the error, the turn is stored as failed."""
    agent = make_agent()
    chunks = agent.turn(script)
    assert chunks[-1].error["code"] == "model_error"
    assert "it broke" in chunks[-1].error["message"]
    stored = http.get(agent.path).json()["turns"]
    assert len(stored) == 1
    assert stored[0]["error"]["code"] == "model_error"
    assert agent.answer("SAY still here") == "still here "


def test_of_a_model_servers_long_error_the_beginning_is_told_and_stored(
    make_agent: AgentMaker, http: httpx.Client
) -> None:
    agent = make_agent()
    told = agent.turn(f"ERR 500 <html> {'x' * 100_000}")[-1].error["message"]
    assert told.startswith("500: <html> xxx")
    assert told.endswith("xxx… (cut off)")
    assert len(told) < 2100
    assert http.get(agent.path).json()["turns"][0]["error"]["message"] == told


def test_the_sdks_agent_class_runs_client_tools(make_agent: AgentMaker, caravan: Caravan) -> None:
    """llama-stack-client's own `Agent` for Responses and Conversations works against the web process."""
    client = make_agent().client
    agent = Agent(client, model="scripted", instructions="Be brief")
    session = agent.create_session("s")
    stream = agent.create_turn([{"role": "user", "content": "SAY hello"}], session_id=session, stream=True)
    text = "".join(str(line) for line in AgentEventLogger().log(stream))
    assert "hello" in text


def _body(script: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": script}], "stream": True}


def _blocks(raw: bytes) -> list[bytes]:
    """The events of a stream, as bytes, without comments."""
    lines = [line for line in raw.split(b"\n") if not line.startswith(b":")]
    return [block for block in b"\n".join(lines).split(b"\n\n") if block]


def test_a_stream_is_on_the_wire_as_documented(make_agent: AgentMaker, http: httpx.Client) -> None:
    """Ids on every event, LF, ASCII, and headers that keep proxies from buffering."""
    agent = make_agent()
    answer = http.post(f"{agent.path}/turn", json=_body("UNICODE"))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["location"].endswith(answer.headers["x-turn-id"])
    raw = answer.content
    assert raw.isascii()
    assert b"\r" not in raw
    assert [block.split(b"\n")[0] for block in _blocks(raw)] == [
        f"id: 1-{n}".encode() for n in range(1, len(_blocks(raw)) + 1)
    ]


def test_replay_equals_live_from_any_event(make_agent: AgentMaker, http: httpx.Client) -> None:
    """`Last-Event-ID` and `?after=` give every event behind it, byte for byte, for as long as the turn exists."""
    agent = make_agent()
    live = http.post(f"{agent.path}/turn", json=_body("SAY a b c d e f"))
    events = f"{agent.path}/turn/{live.headers['x-turn-id']}/events"
    blocks = _blocks(live.content)
    assert _blocks(http.get(events).content) == blocks
    for n in (1, 4, len(blocks)):
        assert _blocks(http.get(events, headers={"Last-Event-ID": f"1-{n}"}).content) == blocks[n:]
        assert _blocks(http.get(events, params={"after": f"1-{n}"}).content) == blocks[n:]
    last = blocks[-1].partition(b"\n")[0].removeprefix(b"id: ").decode()
    fence, _, number = last.partition("-")
    for never in ("x", f"{fence}-{int(number) + 1}", "99-1"):
        refused = http.get(events, headers={"Last-Event-ID": never})
        assert (refused.status_code, never in refused.json()["detail"]) == (400, True)


def test_followers_join_a_running_turn(make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel) -> None:
    """Several readers, one from the start and one from the middle, get the same rest while the turn runs."""
    agent = make_agent()
    gate = uuid.uuid4().hex
    heard: dict[str, bytes] = {}

    def create() -> None:
        heard["live"] = http.post(f"{agent.path}/turn", json=_body(f"PART a b c | HOLD {gate} | SAY d e")).content

    creating = threading.Thread(target=create)
    creating.start()
    model.wait_held(gate)
    turn_id = _only_turn(http, agent.path)
    events = f"{agent.path}/turn/{turn_id}/events"
    followers = {
        "whole": threading.Thread(target=lambda: heard.update(whole=http.get(events).content)),
        "rest": threading.Thread(target=lambda: heard.update(rest=http.get(events, params={"after": "1-2"}).content)),
    }
    for follower in followers.values():
        follower.start()
    model.release(gate)
    for thread in (creating, *followers.values()):
        thread.join(60)
    assert _blocks(heard["whole"]) == _blocks(heard["live"])
    assert _blocks(heard["rest"]) == _blocks(heard["live"])[2:]


def _only_turn(http: httpx.Client, session: str) -> str:
    turns = http.get(session).json()["turns"]
    assert len(turns) == 1
    return str(turns[0]["turn_id"])


def test_a_follower_behind_what_is_no_event_of_the_turn_is_refused(
    make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel
) -> None:
    """An id of an attempt that there is not yet (of another turn, say) would be waited for in vain. One that the
    attempt has not come to yet gives nothing, and does not hang once the turn has ended."""
    agent = make_agent()
    gate = uuid.uuid4().hex
    creating = threading.Thread(
        target=http.post, args=(f"{agent.path}/turn",), kwargs={"json": _body(f"HOLD {gate} | SAY x")}
    )
    creating.start()
    model.wait_held(gate)
    events = f"{agent.path}/turn/{_only_turn(http, agent.path)}/events"
    assert http.get(events, params={"after": "9-9"}).status_code == 400
    with http.stream("GET", events, params={"after": "1-99"}) as follower:
        assert follower.status_code == 200
        model.release(gate)
        creating.join(60)
        assert _blocks(follower.read()) == []


def test_an_unknown_model_is_named(make_agent: AgentMaker) -> None:
    """The turn fails and says which model there is not."""
    error = make_agent(model="no-such-model").turn("SAY x")[-1].error
    assert error["code"] == "invalid_request"
    assert "no-such-model" in error["message"]


def test_events_follow_through_later_legs(make_agent: AgentMaker, http: httpx.Client) -> None:
    """A follower goes on through a resume that has happened, and ends at awaiting input while none has."""
    agent = make_agent(client_tools=[BOILING_POINT])
    first = http.post(f"{agent.path}/turn", json=_body('CALL get_boiling_point {"liquid": "x"}'))
    events = f"{agent.path}/turn/{first.headers['x-turn-id']}/events"
    assert _blocks(http.get(events).content) == _blocks(first.content)
    asked = json.loads(_blocks(first.content)[-1].partition(b"data: ")[2])["event"]["payload"]["turn"]
    call = asked["output_message"]["tool_calls"][0]
    response = {"call_id": call["call_id"], "tool_name": call["tool_name"], "content": "7"}
    second = http.post(
        f"{agent.path}/turn/{asked['turn_id']}/resume", json={"tool_responses": [response], "stream": True}
    )
    assert _blocks(http.get(events).content) == _blocks(first.content) + _blocks(second.content)


def test_a_new_turn_supersedes_one_that_awaits_input(make_agent: AgentMaker, http: httpx.Client) -> None:
    """It becomes cancelled, its history is completed, and resuming it is a conflict."""
    agent = make_agent(client_tools=[BOILING_POINT])
    asked = agent.turn('CALL get_boiling_point {"liquid": "x"}')[-1].event.payload.turn
    roles = [message["role"] for message in json.loads(agent.answer("HISTORY"))]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    stored = http.get(f"{agent.path}/turn/{asked.turn_id}")
    assert stored.headers["x-turn-status"] == "cancelled"
    assert stored.json()["error"]["code"] == "superseded"


def test_leaving_the_stream_does_not_cancel(make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel) -> None:
    """A client that goes away changes nothing: the turn completes and can be read."""
    agent = make_agent()
    gate = uuid.uuid4().hex
    with http.stream("POST", f"{agent.path}/turn", json=_body(f"PART a | HOLD {gate} | SAY b")) as stream:
        next(stream.iter_bytes())
        turn_id = stream.headers["x-turn-id"]
    model.wait_held(gate)
    model.release(gate)
    path = f"{agent.path}/turn/{turn_id}"
    wait_until(lambda: http.get(path).headers["x-turn-status"] == "completed")
    assert http.get(path).json()["output_message"]["content"] == "a b "


def test_turns_of_a_session_run_in_order(make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel) -> None:
    """A turn posted while another runs waits for it, then runs with it in its history."""
    agent = make_agent()
    gate = uuid.uuid4().hex
    answers: dict[str, bytes] = {}
    first = threading.Thread(
        target=lambda: answers.update(one=http.post(f"{agent.path}/turn", json=_body(f"HOLD {gate} | SAY one")).content)
    )
    first.start()
    model.wait_held(gate)
    second = threading.Thread(
        target=lambda: answers.update(two=http.post(f"{agent.path}/turn", json=_body("HISTORY")).content)
    )
    second.start()
    wait_until(lambda: len(http.get(agent.path).json()["turns"]) == 2)
    model.release(gate)
    first.join(60)
    second.join(60)
    assert b'\\"one \\"' in answers["two"] or b"one " in answers["two"]
    assert b"turn_complete" in answers["two"]
