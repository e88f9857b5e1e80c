"""The turn pool: many turns at once in one process."""

from __future__ import annotations

import threading
import uuid

import httpx
import pytest

from tests.acceptance.conftest import AgentMaker, Caravan
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
        answers[number] = httpx.post(caravan.url + path, json=body, timeout=120).json()["output_message"]["content"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(TURNS)]
    for thread in threads:
        thread.start()
    model.wait_held(gate, TURNS, timeout=120)
    model.release(gate)
    for thread in threads:
        thread.join(120)
    assert answers == {number: f"answer {number} " for number in range(TURNS)}
