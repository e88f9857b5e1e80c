"""Agents and sessions over the SDK: created, read, listed, deleted; wrong ids and bad bodies."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import pytest
from llama_stack_client import BadRequestError, LlamaStackClient, NotFoundError

from tests.acceptance.conftest import AgentMaker, Caravan
from tests.support import wait_until

# Most of it is the web process's: in the other pool they run with `make test-all`.
pytestmark = pytest.mark.pools("turn-pool")

UNKNOWN = str(uuid.uuid4())
PREFIXES = ("/v1", "/v1alpha")


def test_an_agent_is_created_read_listed_and_deleted(client: LlamaStackClient) -> None:
    """An agent comes back with every default of llama-stack 0.3.5 filled in, until it is deleted."""
    agent_id = client.alpha.agents.create(agent_config={"model": "scripted", "instructions": "Be kind"}).agent_id
    agent = client.alpha.agents.retrieve(agent_id)
    assert agent.agent_config.instructions == "Be kind"
    assert agent.agent_config.max_infer_iters == 10
    listed = client.alpha.agents.list(limit=1000).data
    assert agent_id in {row["agent_id"] for row in listed}
    client.alpha.agents.delete(agent_id)
    with pytest.raises(NotFoundError):
        client.alpha.agents.retrieve(agent_id)


def test_lists_are_paged(client: LlamaStackClient) -> None:
    """`start_index` and `limit` cut a page, `has_more` tells whether more follow."""
    agent_id = client.alpha.agents.create(agent_config={"model": "scripted", "instructions": ""}).agent_id
    ids = [client.alpha.agents.session.create(agent_id, session_name=f"s{n}").session_id for n in range(3)]
    first = client.alpha.agents.session.list(agent_id, limit=2)
    rest = client.alpha.agents.session.list(agent_id, start_index=2, limit=2)
    assert [row["session_id"] for row in [*first.data, *rest.data]] == ids
    assert (first.has_more, rest.has_more) == (True, False)


def test_a_session_gives_only_the_turns_asked_for(make_agent: AgentMaker) -> None:
    """`turn_ids` selects; without it all turns come, in order."""
    agent = make_agent()
    turns = [agent.turn(f"SAY turn {n}")[-1].event.payload.turn.turn_id for n in range(3)]
    session = agent.client.alpha.agents.session
    assert [turn.turn_id for turn in session.retrieve(agent.session_id, agent_id=agent.agent_id).turns] == turns
    chosen = session.retrieve(agent.session_id, agent_id=agent.agent_id, turn_ids=[turns[1]])
    assert [turn.turn_id for turn in chosen.turns] == [turns[1]]


def test_a_deleted_session_is_gone_at_once(make_agent: AgentMaker) -> None:
    """A deleted session is 404 at once, and its agent lives on."""
    agent = make_agent()
    agent.client.alpha.agents.session.delete(agent.session_id, agent_id=agent.agent_id)
    with pytest.raises(NotFoundError):
        agent.client.alpha.agents.session.retrieve(agent.session_id, agent_id=agent.agent_id)
    assert agent.client.alpha.agents.retrieve(agent.agent_id).agent_id == agent.agent_id


def test_deleting_an_agent_ends_the_streams_of_its_turns(make_agent: AgentMaker, model: Any) -> None:
    """A running turn is cancelled with its agent: its stream ends with an error, its model call is closed."""
    agent = make_agent()
    with httpx.stream(
        "POST",
        str(agent.client.base_url).rstrip("/") + agent.path + "/turn",
        json={"messages": [{"role": "user", "content": "PART one two | HANG"}], "stream": True},
        timeout=60,
    ) as stream:
        lines = stream.iter_lines()
        assert any("two" in line for line in lines)
        agent.client.alpha.agents.delete(agent.agent_id)
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert '"code":"cancelled"' in last
    wait_until(lambda: model.open_streams() == 0)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_unknown_ids_are_404_before_any_stream(http: httpx.Client, make_agent: AgentMaker, prefix: str) -> None:
    """Agents, sessions, turns and steps that do not exist are 404, as are ids that are no ids at all."""
    agent = make_agent()
    session = f"{prefix}/agents/{agent.agent_id}/session/{agent.session_id}"
    body = {"messages": [{"role": "user", "content": "SAY x"}], "stream": True}
    for unknown in (UNKNOWN, "nope"):
        missing = [
            http.get(f"{prefix}/agents/{unknown}"),
            http.delete(f"{prefix}/agents/{unknown}"),
            http.get(f"{prefix}/agents/{unknown}/sessions"),
            http.post(f"{prefix}/agents/{unknown}/session", json={"session_name": "x"}),
            http.get(f"{prefix}/agents/{agent.agent_id}/session/{unknown}"),
            http.post(f"{prefix}/agents/{unknown}/session/{agent.session_id}/turn", json=body),
            http.post(f"{prefix}/agents/{agent.agent_id}/session/{unknown}/turn", json=body),
            http.get(f"{session}/turn/{unknown}"),
            http.get(f"{session}/turn/{unknown}/events"),
            http.post(f"{session}/turn/{unknown}/resume", json={"tool_responses": [], "stream": True}),
            http.get(f"{session}/turn/{unknown}/step/{UNKNOWN}"),
        ]
        assert {(answer.status_code, unknown in answer.text) for answer in missing} == {(404, True)}


def test_a_bad_body_names_the_field(http: httpx.Client, make_agent: AgentMaker) -> None:
    """A body of the wrong shape is 400 and says where."""
    agent = make_agent()
    bogus = {"messages": [{"role": "bogus", "content": "x"}], "stream": True}
    answer = http.post(f"{agent.path}/turn", json=bogus)
    assert answer.status_code == 400
    assert ["body", "messages", 0, "UserMessage", "role"] in [
        e["loc"] for e in answer.json()["error"]["detail"]["errors"]
    ]
    with pytest.raises(BadRequestError, match="client_tools"):
        agent.client.alpha.agents.create(
            agent_config={"model": "scripted", "instructions": "", "client_tools": [{"name": "a"}, {"name": "a"}]}
        )
    with pytest.raises(BadRequestError, match="input_shields"):
        agent.client.alpha.agents.create(
            agent_config={"model": "scripted", "instructions": "", "input_shields": ["guard"]}
        )


def test_a_body_without_its_content_type_says_so(http: httpx.Client) -> None:
    """`curl -d` without a header sends a form; nothing is wrong with the body itself."""
    body = b'{"agent_config": {"model": "scripted", "instructions": ""}}'
    for given in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}, {}):
        answer = http.post("/v1/agents", content=body, headers=given)
        (error,) = answer.json()["error"]["detail"]["errors"]
        assert (answer.status_code, error["loc"]) == (400, ["header", "content-type"]), given


def test_a_body_that_is_nested_too_deeply_is_400(http: httpx.Client, make_agent: AgentMaker) -> None:
    """Pydantic reads a deeper one than it writes; none of the routes that store one fails on it."""
    agent = make_agent(client_tools=[{"name": "add", "description": "Adds.", "parameters": []}])
    deep: dict[str, Any] = {}
    for _ in range(600):
        deep = {"a": deep}
    message = {"role": "user", "content": "CALL add {} | SAY done"}
    turn = http.post(f"{agent.path}/turn", json={"messages": [message]}).json()
    call_id = turn["output_message"]["tool_calls"][0]["call_id"]
    schema = {"type": "json_schema", "json_schema": deep}
    response = {"call_id": call_id, "tool_name": "add", "content": "1", "metadata": deep}
    refused = {
        "/v1/agents": {"agent_config": {"model": "scripted", "instructions": "", "response_format": schema}},
        f"{agent.path}/turn": {"messages": [message], "toolgroups": [{"name": "x", "args": deep}]},
        f"{agent.path}/turn/{turn['turn_id']}/resume": {"tool_responses": [response]},
    }
    for path, body in refused.items():
        answer = http.post(path, json=body)
        assert (answer.status_code, "nested too deeply" in answer.text) == (400, True), path


def test_half_of_a_surrogate_pair_is_400(http: httpx.Client, make_agent: AgentMaker) -> None:
    """A text cut amid an emoji is sent so by JavaScript; stored, no list with it could ever be read again."""
    agent = make_agent(client_tools=[{"name": "add", "description": "Adds.", "parameters": []}])
    half, message = "so far \ud83d", {"role": "user", "content": "CALL add {} | SAY done"}
    turn = http.post(f"{agent.path}/turn", json={"messages": [message]}).json()
    response = {"call_id": turn["output_message"]["tool_calls"][0]["call_id"], "tool_name": "add", "content": half}
    config = {"model": "scripted", "instructions": ""}
    refused: list[tuple[str, Any]] = [
        ("/v1/agents", {"agent_config": config | {"instructions": half}}),
        ("/v1/agents", {"agent_config": config | {"client_tools": [{"name": half}, {"name": half}]}}),
        ("/v1/agents", {"agent_config": config | {"sampling_params": {"repetition_penalty": float("inf")}}}),
        (f"{agent.path}/turn", {"messages": [{"role": "user", "content": half}]}),
        (f"{agent.path}/turn", {"messages": [message], "documents": [{"content": half, "mime_type": "text/plain"}]}),
        (f"{agent.path}/turn/{turn['turn_id']}/resume", {"tool_responses": [response]}),
    ]
    for path, body in refused:
        answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, answer.text)
    assert http.get("/v1/agents").status_code == 200
    assert http.get(agent.path).status_code == 200


def test_a_body_over_the_limit_is_413(http: httpx.Client, make_agent: AgentMaker) -> None:
    """Whether its length is announced or not."""
    agent = make_agent()
    huge = b'{"messages": [{"role": "user", "content": "' + b"x" * 11_000_000 + b'"}]}'
    headers = {"content-type": "application/json"}
    assert http.post(f"{agent.path}/turn", content=huge, headers=headers).status_code == 413
    assert http.post(f"{agent.path}/turn", content=iter([huge]), headers=headers).status_code == 413


@pytest.mark.parametrize("version", ["0.1.9", "0.2.23", "0.3.5", "0.7.5", "9.9.9"])
def test_clients_of_any_version_are_let_in(caravan: Caravan, version: str) -> None:
    """No 426, on our routes and on the Llama Stack's."""
    headers = {"x-llamastack-client-version": version}
    for path in ("/v1/agents", "/v1/models"):
        assert httpx.get(caravan.url + path, headers=headers, timeout=60).status_code == 200


def test_models_have_exactly_the_configured_ids(client: LlamaStackClient) -> None:
    """`INFERENCE_MODEL` names what clients see, and `MODEL_ALIASES` what else they may call it."""
    listed = [model for model in client.models.list() if model.api_model_type == "llm"]
    assert {model.identifier: model.provider_resource_id for model in listed} == {
        "scripted": "scripted",
        "second-model": "second-model",
        "meta-llama/Llama-3.2-3B-Instruct": "scripted",
    }
