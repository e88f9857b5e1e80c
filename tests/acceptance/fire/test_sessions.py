"""One session, used through two web processes at once: guarantee 8, and requests that are sent twice."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx

from tests.acceptance.fire.system import Session, System
from tests.acceptance.test_turns import BOILING_POINT
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.scripted_model import ScriptedModel


def post(session: Session, script: str, **headers: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": script}], "stream": False}
    return httpx.post(f"{session.url}/turn", json=body, headers=headers, timeout=PATIENCE_SECONDS)


def turns(session: Session) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(session.url, timeout=60).json()["turns"]
    return found


def test_turns_run_one_at_a_time_in_the_order_accepted(system: System) -> None:
    """Ten at once, through both web processes: each has just the earlier ones in its history."""
    session = system.session()
    doors = [session, system.elsewhere(session)] * 5
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda door: post(door, "HISTORY"), doors))
    assert [answer.status_code for answer in answers] == [200] * 10
    stored = turns(session)
    assert [len(json.loads(turn["output_message"]["content"])) for turn in stored] == [2 + 2 * n for n in range(10)]
    for earlier, later in pairwise(stored):
        assert later["started_at"] >= earlier["completed_at"]


def test_one_key_on_two_web_processes_at_once_is_one_turn(system: System, model: ScriptedModel) -> None:
    """All get the same turn; the model is asked once."""
    session, key = system.session(), uuid.uuid4().hex
    doors = [session, system.elsewhere(session)] * 4
    script = f"SAY {key}"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda door: post(door, script, **{"Idempotency-Key": key}), doors))
    assert {answer.json()["turn_id"] for answer in answers} == {answers[0].headers["x-turn-id"]}
    assert len(turns(session)) == 1
    assert sum(key in str(request["body"]["messages"]) for request in model.requests()) == 1


def test_turns_queued_behind_one_that_awaits_input_wait_for_its_resume(system: System, model: ScriptedModel) -> None:
    """A turn that was there before does not supersede it; one that is posted while it waits does."""
    gate = uuid.uuid4().hex
    session = system.session(client_tools=[BOILING_POINT])
    asking = session.accepted(f'HOLD {gate} | CALL get_boiling_point {{"liquid": "x"}} | SAY first')
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    behind = system.elsewhere(session).accepted("SAY second")
    model.release(gate)
    asked = asking.ended()[-1].payload["turn"]
    assert session.status(behind.turn_id) == "queued"
    call = asked["output_message"]["tool_calls"][0]
    response = {"call_id": call["call_id"], "tool_name": call["tool_name"], "content": "7"}
    resume = f"{system.elsewhere(session).url}/turn/{asked['turn_id']}/resume"
    assert httpx.post(resume, json={"tool_responses": [response]}, timeout=PATIENCE_SECONDS).status_code == 200
    assert behind.ended()[-1].payload["turn"]["output_message"]["content"] == "second "

    asked = session.post('CALL get_boiling_point {"liquid": "y"} | SAY never').ended()[-1].payload["turn"]
    assert session.post("SAY third").ended()[-1].kind == "turn_complete"
    wait_until(lambda: session.status(asked["turn_id"]) == "cancelled", PATIENCE_SECONDS)
    refused = httpx.post(
        f"{session.url}/turn/{asked['turn_id']}/resume", json={"tool_responses": [response]}, timeout=60
    )
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
