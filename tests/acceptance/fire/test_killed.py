"""A worker is killed in mid-turn: guarantees 3, 4, 5 and 6."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable

import pytest

from tests.acceptance.fire.system import (
    Session,
    Stream,
    System,
    check_stream,
    check_turn,
    requests_of,
    steps_completed,
)
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.mcp_server import McpServer
from tests.support.proxy import TcpProxy
from tests.support.scripted_model import ScriptedModel

CLIENT_TOOL = {"name": "ask", "description": "Asks the client", "input_schema": {"type": "object", "properties": {}}}

Kill = Callable[[System, list[int]], None]


def kill_children(system: System, owners: list[int]) -> None:
    """Each child that runs a turn; their parents live, and start others."""
    for pid in set(owners):
        os.kill(pid, signal.SIGKILL)


def kill_worker(system: System, owners: list[int]) -> None:
    """All processes of worker `a`."""
    own = [system.workers["a"].pid, *system.workers["a"].children()]
    assert set(owners) <= set(own)
    system.workers["a"].kill_all()


def test_a_killed_worker_costs_a_step(system: System, model: ScriptedModel, mcp: McpServer) -> None:
    """All processes of a worker are killed at once."""
    check_survival(system, kill_worker, model, mcp)


@pytest.mark.parametrize("pool", ["prefork"], indirect=True)
def test_killed_children_cost_a_step(system: System, model: ScriptedModel, mcp: McpServer) -> None:
    """The children that run turns are killed; their parent lives (celery#3541)."""
    check_survival(system, kill_children, model, mcp)


def check_survival(system: System, kill: Kill, model: ScriptedModel, mcp: McpServer) -> None:
    """Turns killed in mid-chunk, in the inference after a recorded tool call, and in mid-tool go on in the streams
    that clients have open, after their last recorded step; one that is queued behind and one that awaits input are
    served as ever. What was recorded is not made again."""
    system.stop_consuming("b")
    key, gate = uuid.uuid4().hex, uuid.uuid4().hex
    group = system.toolgroup(mcp)
    scripts = {
        "after tool": f'CALL count {{"key": "{key}"}} | PART some words | HOLD {gate} | SAY done',
        "mid-tool": f'CALL slow {{"seconds": 60, "text": "{key}"}} | SAY {key} done',
        "mid-chunk": f"PART {key} chunk | CHUNKS 300 30",
    }
    sessions = {name: system.session(number % 2, toolgroups=[group]) for number, name in enumerate(scripts)}
    asking = system.session(client_tools=[CLIENT_TOOL])
    asked = asking.post("CALL ask {}").ended()[-1].payload["turn"]
    streams = {name: sessions[name].accepted(scripts[name]) for name in ("after tool", "mid-tool")}
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    wait_until(lambda: len(mcp.calls()) == 2, PATIENCE_SECONDS)
    owners = [sessions[name].owner(stream.turn_id) for name, stream in streams.items()]
    streams["mid-chunk"] = sessions["mid-chunk"].accepted(scripts["mid-chunk"])
    behind = sessions["mid-chunk"].accepted("HISTORY")
    streams["mid-chunk"].wait_for(10)
    owners.append(sessions["mid-chunk"].owner(streams["mid-chunk"].turn_id))
    assert "step_complete" not in streams["mid-chunk"].kinds

    killed_at = time.monotonic()
    kill(system, owners)
    system.consume("b")
    for name, stream in streams.items():
        print(f"{name}: the next attempt's first event after {stream.wait_attempt(2) - killed_at:.2f} s")
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    model.release(gate)

    turns = {name: check_turn(sessions[name], stream) for name, stream in streams.items()}
    assert [len(requests_of(model, script)) for script in scripts.values()] == [3, 2, 2]
    assert sorted(call["tool"] for call in mcp.calls()) == ["count", "slow"]
    assert turns["mid-chunk"]["output_message"]["content"].startswith(f"{key} chunk w0 w1 ")
    assert [step["step_type"] for step in turns["after tool"]["steps"]] == ["inference", "tool_execution", "inference"]
    assert "unknown" in turns["mid-tool"]["steps"][1]["tool_responses"][0]["content"]
    check_history(behind, scripts["mid-chunk"], turns["mid-chunk"]["output_message"]["content"])
    check_abandoned(streams["after tool"])
    check_awaiting(asking, asked["turn_id"], asked["output_message"]["tool_calls"][0]["call_id"])


def test_a_step_recorded_and_not_published_is_not_lost(
    system: System, model: ScriptedModel, mcp: McpServer, events_proxy: TcpProxy
) -> None:
    """The worker dies when two steps are committed and Redis has heard of none: readers get them from Postgres, and
    the next attempt goes on after them."""
    system.stop_consuming("b")
    key, first, second = (uuid.uuid4().hex for _ in range(3))
    script = f'HOLD {first} | CALL count {{"key": "{key}"}} | PART words | HOLD {second} | SAY done'
    session = system.session(toolgroups=[system.toolgroup(mcp)])
    stream = session.accepted(script)
    model.wait_held(first, timeout=PATIENCE_SECONDS)
    stream.wait_for(1)
    events_proxy.stall()
    model.release(first)
    steps = "SELECT * FROM journal WHERE turn_id = :turn_id"
    wait_until(lambda: len(system.rows(steps, turn_id=stream.turn_id)) == 2, PATIENCE_SECONDS)
    model.wait_held(second, timeout=PATIENCE_SECONDS)
    assert "step_complete" not in stream.kinds

    kill_worker(system, [session.owner(stream.turn_id)])
    killed_at = time.monotonic()
    events_proxy.cut()
    events_proxy.flow()
    system.consume("b")
    print(f"recorded, not published: the next attempt after {stream.wait_attempt(2) - killed_at:.2f} s")
    model.release(second)
    turn = check_turn(session, stream)
    assert [step["step_type"] for step in turn["steps"]] == ["inference", "tool_execution", "inference"]
    assert turn["output_message"]["content"] == "words done "
    assert len(requests_of(model, script)) == 3
    assert mcp.counts() == {key: 1}


def test_a_killed_worker_does_not_ask_its_shields_again(system: System, model: ScriptedModel) -> None:
    """It dies behind a turn's input shields, and in another's output shields: a recorded verdict holds for the next
    attempt, one that was not given is asked for again, and the model is asked only where it had not answered."""
    system.stop_consuming("b")
    key, thinking, judging = (uuid.uuid4().hex for _ in range(3))
    shields = [system.shield("second-model")]
    scripts = [f"PART {key} 1 | HOLD {thinking} | SAY done", f"SAY {key} 2\nGUARD Assistant HOLD {judging}"]
    sessions = [system.session(number, input_shields=shields, output_shields=shields) for number in range(2)]
    streams = [session.accepted(script) for session, script in zip(sessions, scripts, strict=True)]
    for gate in (thinking, judging):
        model.wait_held(gate, timeout=PATIENCE_SECONDS)

    kill_worker(system, [session.owner(stream.turn_id) for session, stream in zip(sessions, streams, strict=True)])
    system.consume("b")
    for stream in streams:
        stream.wait_attempt(2)
    for gate in (thinking, judging):
        model.release(gate)
    for session, stream in zip(sessions, streams, strict=True):
        turn = check_turn(session, stream)
        assert [step["step_type"] for step in turn["steps"]] == ["shield_call", "inference", "shield_call"]
    asked = [
        [request["body"]["model"] for request in model.requests() if f"{key} {number}" in str(request["body"])]
        for number in (1, 2)
    ]
    assert asked == [
        ["second-model", "scripted", "scripted", "second-model"],
        ["second-model", "scripted", "second-model", "second-model"],
    ]


def check_history(behind: Stream, script: str, said: str) -> None:
    """The turn that was queued behind saw one exchange, and nothing of the attempt that died."""
    answer = behind.ended()[-1].payload["turn"]["output_message"]["content"]
    assert answer.count(said.strip()) == 1
    assert answer.count(script) == 1
    assert answer.count('"role":"assistant"') == 1


def check_abandoned(stream: Stream) -> None:
    """The deltas of the step that the dead attempt did not finish stay in the log, under a step id of their own."""
    started = [each.payload["step_id"] for each in stream.heard if each.kind == "step_start"]
    assert len(started) == len(set(started)) == 4
    assert [step for step in started if step in steps_completed(stream.heard)] == [started[0], started[1], started[3]]
    texts = [each.payload["delta"].get("text") for each in stream.heard if each.kind == "step_progress"]
    assert texts.count("some ") == 2


def check_awaiting(session: Session, turn_id: str, call_id: str) -> None:
    """A turn that awaited input while workers died is resumed."""
    body = {"tool_responses": [{"call_id": call_id, "tool_name": "ask", "content": "42"}], "stream": True}
    heard = Stream("POST", f"{session.url}/turn/{turn_id}/resume", body).ended()
    check_stream(heard)
    assert heard[-1].payload["turn"]["output_message"]["content"] == "The tool said: 42 "
