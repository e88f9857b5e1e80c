"""A turn is cancelled through the public door, whatever it does at that moment; its session goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import psycopg2
import pytest

from tests.acceptance.conftest import AgentMaker, Caravan
from tests.acceptance.test_turns import BOILING_POINT
from tests.support import ROOT, wait_until
from tests.support.scripted_model import ScriptedModel

# Most of it is the web process's: in the other pool they run with `make test-all`.
pytestmark = pytest.mark.pools("turn-pool")
both_pools = pytest.mark.pools("turn-pool", "prefork")


def body(script: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": script}], "stream": True, **more}


def last_event(raw: bytes) -> dict[str, Any]:
    lines = [line for line in raw.split(b"\n") if line.startswith(b"data: ")]
    event: dict[str, Any] = json.loads(lines[-1].removeprefix(b"data: "))
    return event


def cancelled(http: httpx.Client, turn: str) -> str:
    """The status that a cancelled turn ends with: at once, or, if its worker is slow to answer (202), soon."""
    answer = http.post(f"{turn}/cancel")
    assert (answer.status_code, answer.json()["status"] == "running") in ((200, False), (202, True)), answer.text
    if answer.status_code == 200:
        return str(answer.json()["status"])
    wait_until(lambda: http.get(turn).headers["x-turn-status"] not in ("queued", "running"), 60)
    return str(http.get(turn).headers["x-turn-status"])


@pytest.fixture
def posting() -> Any:
    """Posts in the background: `posting(url, body, **headers)` gives a future answer."""
    with ThreadPoolExecutor(32) as pool:

        def post(url: str, body: dict[str, Any], **headers: str) -> Future[httpx.Response]:
            return pool.submit(httpx.post, url, json=body, headers=headers, timeout=60)

        yield post


def newest(http: httpx.Client, session: str, count: int = 1) -> str:
    """The path of the session's newest turn, once it has so many."""
    wait_until(lambda: len(http.get(session).json()["turns"]) == count)
    return f"{session}/turn/{http.get(session).json()['turns'][-1]['turn_id']}"


@both_pools
def test_a_running_turn_is_cancelled(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel, posting: Any
) -> None:
    """The model's stream is closed, recorded steps are kept, the stream ends with the reason, the session goes on."""
    agent, gate = make_agent(), uuid.uuid4().hex
    script = f'CALL nothing {{"a": 1}}\nPART some words | HOLD {gate} | SAY x'
    posted = posting(f"{caravan.url}{agent.path}/turn", body(script))
    model.wait_held(gate)
    turn = newest(http, agent.path)
    assert cancelled(http, turn) == "cancelled"
    wait_until(lambda: model.open_streams() == 0)
    assert last_event(posted.result(60).content)["error"]["code"] == "cancelled"
    stored = http.get(turn)
    assert stored.headers["x-turn-status"] == "cancelled"
    assert [step["step_type"] for step in stored.json()["steps"]] == ["inference", "tool_execution"]
    assert cancelled(http, turn) == "cancelled"
    roles = [message["role"] for message in json.loads(agent.answer("HISTORY"))]
    assert roles == ["system", "user", "assistant", "tool", "user"]


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
def test_a_cancel_that_was_not_recorded_is_no_202(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel, posting: Any
) -> None:
    """Somebody has the turn's row, for longer than a transaction may take: 503, and the turn goes on; asked again, it
    ends."""
    agent, gate = make_agent(), uuid.uuid4().hex
    posted = posting(f"{caravan.url}{agent.path}/turn", body(f"PART a | HOLD {gate} | SAY x"))
    model.wait_held(gate)
    turn = newest(http, agent.path)
    row = "SELECT cancel_requested_at FROM turns WHERE turn_id = %s"
    with closing(psycopg2.connect(caravan.env["DATABASE_URL"])) as connection, connection.cursor() as cursor:
        cursor.execute(f"{row} FOR UPDATE", [turn.rpartition("/")[2]])
        refused = http.post(f"{turn}/cancel")
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True), refused.text
        connection.rollback()
        cursor.execute(row, [turn.rpartition("/")[2]])
        assert cursor.fetchone() == (None,)
    assert cancelled(http, turn) == "cancelled"
    assert last_event(posted.result(60).content)["error"]["code"] == "cancelled"


def test_a_queued_turn_is_cancelled(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel, posting: Any
) -> None:
    """It never runs; the one before it is not touched."""
    agent, gate = make_agent(), uuid.uuid4().hex
    first = posting(f"{caravan.url}{agent.path}/turn", body(f"HOLD {gate} | SAY one"))
    model.wait_held(gate)
    second = posting(f"{caravan.url}{agent.path}/turn", body("SAY two"))
    turn = newest(http, agent.path, 2)
    assert cancelled(http, turn) == "cancelled"
    assert last_event(second.result(60).content)["error"]["code"] == "cancelled"
    model.release(gate)
    assert last_event(first.result(60).content)["event"]["payload"]["event_type"] == "turn_complete"


def test_a_turn_that_awaits_input_is_cancelled(make_agent: AgentMaker, http: httpx.Client) -> None:
    """It cannot be resumed then."""
    agent = make_agent(client_tools=[BOILING_POINT])
    asked = agent.turn('CALL get_boiling_point {"liquid": "x"}')[-1].event.payload.turn
    turn = f"{agent.path}/turn/{asked.turn_id}"
    assert cancelled(http, turn) == "cancelled"
    call = asked.output_message.tool_calls[0]
    response = {"call_id": call.call_id, "tool_name": call.tool_name, "content": "7"}
    refused = http.post(f"{turn}/resume", json={"tool_responses": [response]})
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
    assert agent.answer("SAY next") == "next "


@pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)
def test_an_operator_cancels_a_turn(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel, posting: Any
) -> None:
    """`caravan turns cancel`, with nothing but the settings; it says what it found."""
    agent, gate = make_agent(), uuid.uuid4().hex
    posted = posting(f"{caravan.url}{agent.path}/turn", body(f"PART a | HOLD {gate} | SAY x"))
    model.wait_held(gate)
    turn = newest(http, agent.path)

    def command() -> str:
        program = [sys.executable, "-c", "from app.cli import main; main()", "turns", "cancel", turn.rpartition("/")[2]]
        env = {**os.environ, **caravan.env}
        ran = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True)
        return ran.stdout

    assert "its worker is asked to cancel it" in command()
    assert last_event(posted.result(60).content)["error"]["code"] == "cancelled"
    assert "had ended before: it is cancelled" in command()


def test_a_cancel_may_lose_to_finishing(make_agent: AgentMaker, http: httpx.Client) -> None:
    """It says so: the status is that of the end that came first."""
    agent = make_agent()
    turn_id = agent.turn("SAY x")[-1].event.payload.turn.turn_id
    assert cancelled(http, f"{agent.path}/turn/{turn_id}") == "completed"
    assert http.post(f"{agent.path}/turn/{uuid.uuid4()}/cancel").status_code == 404


@pytest.mark.parametrize("caravan", ["turn-pool", pytest.param("prefork", marks=pytest.mark.thorough)], indirect=True)
def test_cancels_that_race_with_the_end_agree_with_it(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel, posting: Any
) -> None:
    """Whoever wins, every cancel, the stream, its replay and the stored turn tell the same story. The model is let go
    together with the cancels, to say little or much: turns end just before, just behind and long after."""
    lengths, seen = (1, 5, 20, 60, 150, 400), set[str]()
    agents = [make_agent() for _ in lengths]
    for round_ in range(1, 11):
        gate = uuid.uuid4().hex
        scripts = [f"PART a | HOLD {gate} | CHUNKS {length} 3" for length in lengths]
        posted = [
            posting(f"{caravan.url}{agent.path}/turn", body(script))
            for agent, script in zip(agents, scripts, strict=True)
        ]
        model.wait_held(gate, len(agents), timeout=60)
        turns = [newest(http, agent.path, round_) for agent in agents]
        together = threading.Barrier(len(agents) + 1)

        def race(turn: str, together: threading.Barrier = together) -> str:
            together.wait(60)
            return cancelled(http, turn)

        with ThreadPoolExecutor(len(agents)) as pool:
            racing = [pool.submit(race, turn) for turn in turns]
            together.wait(60)
            model.release(gate)
            said = [one.result(60) for one in racing]
        for turn, status, stream in zip(turns, said, posted, strict=True):
            raw = stream.result(60).content
            assert http.get(turn).headers["x-turn-status"] == status
            assert ("cancelled" if "error" in last_event(raw) else "completed") == status
            assert http.get(f"{turn}/events").content.replace(b": ping\n", b"") == raw.replace(b": ping\n", b"")
        seen.update(said)
        print(f"round {round_}: {said}")
        if round_ >= 2 and seen == {"completed", "cancelled"}:
            return
    raise AssertionError(f"there was no race: all turns were {seen}")


@both_pools
def test_reject_and_interrupt(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel, posting: Any
) -> None:
    """By header or body: 409 that SDKs do not retry; or the running turn gives way, with its steps kept."""
    agent, gate = make_agent(), uuid.uuid4().hex
    first = posting(f"{caravan.url}{agent.path}/turn", body(f"PART a | HOLD {gate} | SAY one"))
    model.wait_held(gate)
    path = f"{agent.path}/turn"
    for refused in (
        http.post(path, json=body("SAY x", multitask_strategy="reject")),
        http.post(path, json=body("SAY x"), headers={"X-Multitask-Strategy": "reject"}),
    ):
        assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
    assert http.post(path, json=body("SAY x", multitask_strategy="shout")).status_code == 400
    assert len(http.get(agent.path).json()["turns"]) == 1
    answer = http.post(path, json=body("SAY two", multitask_strategy="interrupt"))
    assert last_event(answer.content)["event"]["payload"]["turn"]["output_message"]["content"] == "two "
    assert last_event(first.result(60).content)["error"]["code"] == "cancelled"


def test_turns_posted_at_once_run_one_at_a_time_in_order(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, posting: Any
) -> None:
    """Each sees exactly those before it in its history, in the order in which they were accepted."""
    agent = make_agent()
    posted = [posting(f"{caravan.url}{agent.path}/turn", body("HISTORY", stream=False)) for _ in range(8)]
    for answer in posted:
        assert answer.result(60).status_code == 200
    turns = http.get(agent.path).json()["turns"]
    seen = [len(json.loads(turn["output_message"]["content"])) for turn in turns]
    assert seen == [2 + 2 * earlier for earlier in range(8)]
    ended = [turn["completed_at"] for turn in turns]
    started = [turn["started_at"] for turn in turns]
    assert all(start >= end for start, end in zip(started[1:], ended, strict=False))


def test_the_same_key_at_once_is_one_turn_with_one_stream(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, posting: Any
) -> None:
    """All answers are the same bytes and name the same turn; another body is 422; a late one replays."""
    agent, key = make_agent(), uuid.uuid4().hex
    posted = [
        posting(f"{caravan.url}{agent.path}/turn", body("CHUNKS 10 20"), **{"Idempotency-Key": key}) for _ in range(6)
    ]
    answers = [one.result(60) for one in posted]
    assert len({answer.headers["x-turn-id"] for answer in answers}) == 1
    assert len({answer.content.replace(b": ping\n", b"") for answer in answers}) == 1
    late = http.post(f"{agent.path}/turn", json=body("CHUNKS 10 20"), headers={"Idempotency-Key": key})
    assert late.content.replace(b": ping\n", b"") == answers[0].content.replace(b": ping\n", b"")
    other = http.post(f"{agent.path}/turn", json=body("SAY other"), headers={"Idempotency-Key": key})
    assert other.status_code == 422
    assert "Idempotency-Key" in other.json()["detail"]
    too_long = http.post(f"{agent.path}/turn", json=body("SAY x"), headers={"Idempotency-Key": "k" * 300})
    assert too_long.status_code == 400
    assert len(http.get(agent.path).json()["turns"]) == 1


def test_a_resume_with_the_same_key_is_one_leg(make_agent: AgentMaker, http: httpx.Client) -> None:
    """Sent again, it gives the same leg once more."""
    agent = make_agent(client_tools=[BOILING_POINT])
    asked = agent.turn('CALL get_boiling_point {"liquid": "x"}')[-1].event.payload.turn
    call = asked.output_message.tool_calls[0]
    answer = {
        "tool_responses": [{"call_id": call.call_id, "tool_name": call.tool_name, "content": "7"}],
        "stream": True,
    }
    key = {"Idempotency-Key": uuid.uuid4().hex}
    path = f"{agent.path}/turn/{asked.turn_id}/resume"
    first = http.post(path, json=answer, headers=key)
    assert last_event(first.content)["event"]["payload"]["event_type"] == "turn_complete"
    again = http.post(path, json=answer, headers=key).content
    assert again.replace(b": ping\n", b"") == first.content.replace(b": ping\n", b"")
    assert http.post(path, json=answer).status_code == 409


def test_an_sdk_retry_without_a_key_finds_its_turn(make_agent: AgentMaker, http: httpx.Client) -> None:
    """`x-stainless-retry-count` above 0 and the same body: the turn that the first try made is streamed."""
    agent = make_agent()
    first = http.post(f"{agent.path}/turn", json=body("SAY once"), headers={"x-stainless-retry-count": "0"})
    retry = http.post(f"{agent.path}/turn", json=body("SAY once"), headers={"x-stainless-retry-count": "1"})
    assert retry.headers["x-turn-id"] == first.headers["x-turn-id"]
    assert retry.content.replace(b": ping\n", b"") == first.content.replace(b": ping\n", b"")
    again = http.post(f"{agent.path}/turn", json=body("SAY once"))
    assert again.headers["x-turn-id"] != first.headers["x-turn-id"]


@both_pools
def test_leaving_and_cancelling_differ(
    make_agent: AgentMaker, http: httpx.Client, caravan: Caravan, model: ScriptedModel
) -> None:
    """A client that goes away changes nothing; then somebody cancels, and the model's stream is closed."""
    agent, gate = make_agent(), uuid.uuid4().hex
    with http.stream("POST", f"{agent.path}/turn", json=body(f"PART a | HOLD {gate} | SAY b")) as stream:
        next(stream.iter_bytes())
        turn = stream.headers["location"]
    model.wait_held(gate)
    assert http.get(turn).headers["x-turn-status"] == "running"
    done = threading.Event()

    def follow() -> None:
        http.get(f"{turn}/events")
        done.set()

    threading.Thread(target=follow).start()
    assert cancelled(http, turn) == "cancelled"
    assert done.wait(60)
    wait_until(lambda: model.open_streams() == 0)
