"""The turn pool: many turns at once in one process, and one of them cancelled through Celery."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import AgentMaker, Caravan
from tests.support import wait_until
from tests.support.scripted_model import ScriptedModel

TURNS = 64


pytestmark = pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)


def test_one_process_runs_many_turns_at_once(
    caravan: Caravan, make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel
) -> None:
    """64 turns of 64 sessions wait for the model together; then all complete, each with its own answer."""
    agent = make_agent()
    gate = uuid.uuid4().hex
    answers: dict[int, str] = {}

    def run(number: int) -> None:
        session = http.post(f"/v1/agents/{agent.agent_id}/session", json={"session_name": str(number)}).json()
        body = {"messages": [{"role": "user", "content": f"HOLD {gate} | SAY answer {number}"}], "stream": False}
        path = f"/v1/agents/{agent.agent_id}/session/{session['session_id']}/turn"
        answers[number] = httpx.post(caravan.url + path, json=body, timeout=60).json()["output_message"]["content"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(TURNS)]
    for thread in threads:
        thread.start()
    model.wait_held(gate, TURNS, timeout=60)
    model.release(gate)
    for thread in threads:
        thread.join(60)
    assert answers == {number: f"answer {number} " for number in range(TURNS)}


def test_revoke_terminate_cancels_the_one_turn(
    caravan: Caravan, make_agent: AgentMaker, http: httpx.Client, model: ScriptedModel
) -> None:
    """`celery control revoke --terminate` (and Flower's Terminate) ends that turn; the worker and its turns go on."""
    agent, other = make_agent(), make_agent()
    gate = uuid.uuid4().hex
    ended: dict[str, Any] = {}

    def run(name: str, session: str) -> None:
        body = {"messages": [{"role": "user", "content": f"PART a | HOLD {gate} | SAY done"}], "stream": False}
        ended[name] = httpx.post(caravan.url + session + "/turn", json=body, timeout=60).json()

    threads = [threading.Thread(target=run, args=args) for args in (("it", agent.path), ("other", other.path))]
    for thread in threads:
        thread.start()
    model.wait_held(gate, 2)
    turn_id = http.get(agent.path).json()["turns"][0]["turn_id"]
    celery = caravan.worker.app
    [task] = [
        task["id"]
        for tasks in celery.control.inspect(timeout=5).active().values()
        for task in tasks
        if task["args"] == [turn_id]
    ]
    celery.control.revoke(task, terminate=True)
    threads[0].join(30)
    assert ended["it"]["error"]["code"] == "cancelled"
    wait_until(lambda: model.held(gate) == 1)
    model.release(gate)
    threads[1].join(30)
    assert ended["other"]["output_message"]["content"] == "a done "
