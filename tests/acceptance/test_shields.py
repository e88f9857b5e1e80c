"""Shields through the real SDK: a guard, played by the scripted model, is asked before and after the model."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from llama_stack_client import BadRequestError, LlamaStackClient

from tests.acceptance.conftest import Agent, AgentMaker, Caravan
from tests.acceptance.test_cancel import cancelled
from tests.support import wait_until
from tests.support.scripted_model import ScriptedModel

GUARD = "second-model"
REFUSAL = "I can't answer that. Can I help with something else?"
CLIENT_TOOL: Any = {"name": "ask", "description": "Asks.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
def shield(client: LlamaStackClient) -> Iterator[str]:
    """Registered by the test, so while the workers run."""
    name = f"guard-{uuid.uuid4().hex[:8]}"
    client.shields.register(shield_id=name, provider_id="llama-guard", provider_shield_id=GUARD)
    yield name
    if name in [each.identifier for each in client.shields.list()]:
        client.shields.delete(name)


@pytest.fixture
def shielded(make_agent: AgentMaker, shield: str) -> Callable[..., Agent]:
    def make(**config: Any) -> Agent:
        return make_agent(**{"input_shields": [shield], "output_shields": [shield], **config})

    return make


def payloads(chunks: list[Any]) -> list[Any]:
    return [chunk.event.payload for chunk in chunks]


def steps(turn: Any) -> list[str]:
    return [step.step_type for step in turn.steps]


def asked(model: ScriptedModel) -> list[str]:
    """The models that were asked, in order."""
    return [request["body"]["model"] for request in model.requests()]


def test_a_turn_that_passes_shows_its_shield_steps(shielded: Callable[..., Agent], model: ScriptedModel) -> None:
    """One before the inference and one behind it, in the stream, the turn and the step itself."""
    agent = shielded()
    heard = payloads(agent.turn("SAY hello"))
    turn = heard[-1].turn
    assert steps(turn) == ["shield_call", "inference", "shield_call"]
    assert [step.violation for step in (turn.steps[0], turn.steps[2])] == [None, None]
    started = [payload.metadata for payload in heard if payload.event_type == "step_start"]
    assert started == [{"touchpoint": "user-input"}, {}, {"touchpoint": "assistant-output"}]
    stored = agent.client.alpha.agents.turn.retrieve(turn.turn_id, agent_id=agent.agent_id, session_id=agent.session_id)
    assert stored == turn
    step = agent.client.alpha.agents.steps.retrieve(
        turn.steps[0].step_id, agent_id=agent.agent_id, session_id=agent.session_id, turn_id=turn.turn_id
    )
    assert step.step == turn.steps[0]
    assert asked(model) == [GUARD, "scripted", GUARD]


def test_refused_input_ends_the_turn_before_the_model(shielded: Callable[..., Agent], model: ScriptedModel) -> None:
    """With the guard's violation in the step and its message as the turn's; the next turn's model is not told of it."""
    agent = shielded()
    heard = payloads(agent.turn("SAY secret\nGUARD User UNSAFE S1,S9"))
    assert [payload.event_type for payload in heard] == ["step_start", "step_complete", "turn_complete"]
    violation = heard[1].step_details.violation
    assert (violation.violation_level, violation.user_message) == ("error", REFUSAL)
    assert violation.metadata == {"violation_type": "S1,S9"}
    message = heard[-1].turn.output_message
    assert (message.content, message.stop_reason, message.tool_calls) == (REFUSAL, "end_of_turn", [])
    assert asked(model) == [GUARD]
    assert [each["content"] for each in json.loads(agent.answer("HISTORY"))[1:]] == ["HISTORY"]


def test_refused_output_is_replaced(shielded: Callable[..., Agent]) -> None:
    """It has been streamed; the turn's message is the refusal, and so is what later turns know of it."""
    agent = shielded()
    heard = payloads(agent.turn("SAY secret\nGUARD Assistant UNSAFE S9"))
    assert [payload.delta.text for payload in heard if payload.event_type == "step_progress"] == ["secret "]
    turn = heard[-1].turn
    assert steps(turn) == ["shield_call", "inference", "shield_call"]
    assert turn.output_message.content == turn.steps[2].violation.user_message == REFUSAL
    session = agent.client.alpha.agents.session.retrieve(agent.session_id, agent_id=agent.agent_id)
    assert session.turns == [turn]
    history = json.loads(agent.answer("HISTORY"))[1:]
    assert [each["content"] for each in history] == ["SAY secret\nGUARD Assistant UNSAFE S9", REFUSAL, "HISTORY"]


def test_a_client_s_call_and_its_response_are_judged(shielded: Callable[..., Agent], model: ScriptedModel) -> None:
    """What the model asks the client, before the client hears of it; what the client answers, before the model does."""
    agent = shielded(client_tools=[CLIENT_TOOL])
    turn: Any = agent.turn('CALL ask {"why": "because"}\nGUARD Tool UNSAFE S2')[-1].event.payload.turn
    assert steps(turn) == ["shield_call", "inference", "shield_call"]
    assert 'Assistant: ask({"why": "because"})' in model.requests()[-1]["body"]["messages"][0]["content"]
    [call] = turn.output_message.tool_calls
    resumed = agent.client.alpha.agents.turn.resume(
        turn.turn_id,
        agent_id=agent.agent_id,
        session_id=agent.session_id,
        tool_responses=[{"call_id": call.call_id, "tool_name": "ask", "content": "poison"}],
        stream=True,
    )
    ended = payloads(list(resumed))[-1].turn
    assert steps(ended) == [*steps(turn), "tool_execution", "shield_call"]
    assert ended.output_message.content == REFUSAL
    assert "Tool: poison" in model.requests()[-1]["body"]["messages"][0]["content"]
    refused: Any = shielded(client_tools=[CLIENT_TOOL]).turn("CALL ask {}\nGUARD Assistant UNSAFE S2")[-1].event.payload
    assert (refused.event_type, refused.turn.output_message.tool_calls) == ("turn_complete", [])


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("ERR 500 overloaded", "overloaded"),
        ("ERR 400 no images", "no images"),
        ("SAY certainly!", "neither safe nor unsafe: 'certainly!'"),
        ("SAY", "neither safe nor unsafe"),
        ("DROP", "broke"),
    ],
)
def test_a_guard_that_fails_lets_nothing_pass(
    shielded: Callable[..., Agent], model: ScriptedModel, says: str, told: str
) -> None:
    """The turn fails with a code of its own, and what was not judged is not told to the model later."""
    agent = shielded()
    error = agent.turn(f"SAY secret\nGUARD User {says}")[-1].error
    assert error["code"] == "shield_error"
    assert told in error["message"]
    assert set(asked(model)) == {GUARD}
    assert [each["content"] for each in json.loads(agent.answer("HISTORY"))[1:]] == ["HISTORY"]


@pytest.mark.pools("turn-pool")
def test_output_that_is_not_judged_is_no_turn_s_message(
    shielded: Callable[..., Agent], model: ScriptedModel, http: httpx.Client
) -> None:
    """Neither while the guard thinks, nor when the turn has failed or was cancelled for want of a verdict."""
    agent, gate = shielded(), uuid.uuid4().hex

    def messages() -> list[str]:
        turns = agent.client.alpha.agents.session.retrieve(agent.session_id, agent_id=agent.agent_id).turns
        return [str(turn.output_message.content) for turn in turns]

    assert agent.turn("SAY secret\nGUARD Assistant ERR 503 no")[-1].error["code"] == "shield_error"
    body = {"messages": [{"role": "user", "content": f"SAY secret\nGUARD Assistant HOLD {gate}"}], "stream": True}
    with http.stream("POST", f"{agent.path}/turn", json=body) as stream:
        model.wait_held(gate)
        assert messages() == ["", ""]
        http.post(f"{agent.path}/turn/{stream.headers['x-turn-id']}/cancel")
    assert messages() == ["", ""]


@pytest.mark.pools("turn-pool")
def test_without_a_stream_a_failed_guard_is_424(shielded: Callable[..., Agent], http: httpx.Client) -> None:
    """Not a status that SDKs retry by themselves."""
    body = {"messages": [{"role": "user", "content": "SAY x\nGUARD User ERR 400 no"}], "stream": False}
    answer = http.post(f"{shielded().path}/turn", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (424, "shield_error")


def test_cancelling_stops_a_guard(shielded: Callable[..., Agent], model: ScriptedModel, http: httpx.Client) -> None:
    """The guard's connection is closed, and the model never asked."""
    agent, gate = shielded(), uuid.uuid4().hex
    body = {"messages": [{"role": "user", "content": f"SAY x\nGUARD User HOLD {gate}"}], "stream": True}
    with http.stream("POST", f"{agent.path}/turn", json=body) as stream:
        model.wait_held(gate)
        assert cancelled(http, f"{agent.path}/turn/{stream.headers['x-turn-id']}") == "cancelled"
    wait_until(lambda: model.requests()[0]["ended"] == "client_closed")
    assert asked(model) == [GUARD]


def test_a_shield_that_was_removed_fails_the_turn(
    shielded: Callable[..., Agent], shield: str, client: LlamaStackClient, model: ScriptedModel
) -> None:
    """On workers that run already, from the next turn on: it never runs without."""
    agent = shielded()
    assert agent.answer("SAY hello") == "hello "
    client.shields.delete(shield)
    model.reset()
    error = agent.turn("SAY secret")[-1].error
    assert (error["code"], shield in error["message"]) == ("shield_error", True)
    assert asked(model) == []


@pytest.mark.pools("turn-pool")
def test_an_agent_needs_registered_shields(client: LlamaStackClient, shield: str) -> None:
    """In every dialect's agents route; the message names the shield and the way to register it."""
    for field in ("input_shields", "output_shields"):
        config: Any = {"model": "scripted", "instructions": "", field: [shield, "nobody's"]}
        with pytest.raises(BadRequestError, match=rf"{field}: there is no shield nobody's; POST /v1/shields"):
            client.alpha.agents.create(agent_config=config)
        with pytest.raises(BadRequestError, match="at most 16"):
            client.alpha.agents.create(agent_config=config | {field: [shield] * 17})
        old = client.post("/v1/agents", body={"agent_config": config | {field: [shield]}}, cast_to=httpx.Response)
        assert old.status_code == 200


@pytest.mark.pools("turn-pool")
def test_a_shield_needs_a_model_that_is_known(client: LlamaStackClient) -> None:
    """Else every turn would fail. A model that a client registered will do."""
    with pytest.raises(BadRequestError, match=r"provider_shield_id: Model 'nowhere' not found.*INFERENCE_MODEL"):
        client.shields.register(shield_id="lost", provider_id="llama-guard", provider_shield_id="nowhere")
    client.models.register(model_id="llama-guard3:8b", provider_id="model-server")
    client.shields.register(shield_id="found", provider_id="llama-guard", provider_shield_id="llama-guard3:8b")
    safe = client.safety.run_shield(shield_id="found", messages=[{"role": "user", "content": "hi"}], params={})
    assert safe.violation is None
    client.shields.delete("found")
    client.models.unregister("llama-guard3:8b")


@pytest.mark.pools("turn-pool")
def test_moderations_flag_each_text_by_itself(client: LlamaStackClient, shield: str) -> None:
    """One result each, in order."""
    moderated = client.moderations.create(input=["GUARD User UNSAFE S1", "fine"], model=GUARD)
    assert [result.flagged for result in moderated.results] == [True, False]
    assert (moderated.results[0].categories or {})["Violent Crimes"]


def test_the_guard_sees_images_and_documents(
    shielded: Callable[..., Agent], http: httpx.Client, caravan: Caravan, model: ScriptedModel
) -> None:
    """What the model would be told."""
    picture = "data:image/png;base64,iVBORw0KGgo="
    content = [{"type": "text", "text": "SAY x"}, {"type": "image", "image": {"url": {"uri": picture}}}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "documents": [{"content": "A note.", "mime_type": "text/plain"}],
    }
    http.post(f"{shielded().path}/turn", json=body).raise_for_status()
    text, image = model.requests()[0]["body"]["messages"][0]["content"]
    assert "User: SAY x <image> A note." in text["text"]
    assert image["image_url"]["url"] == picture
