"""The requests that the captures answer, in the order in which they were made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from tests.compat.contract import Answer, Json, received

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
NOWHERE = "nope"
TOOLGROUP = "mcp::fake"
LIQUID_SCHEMA = {"type": "object", "properties": {"liquid": {"type": "string"}}, "required": ["liquid"]}
CLIENT_TOOL = {"name": "get_boiling_point", "description": "bp", "input_schema": LIQUID_SCHEMA}
CLIENT_TOOL_OF_0_2 = {
    "name": "get_boiling_point",
    "description": "bp",
    "parameters": [{"name": "liquid", "parameter_type": "string", "description": "l", "required": True}],
}
FUNCTION = {
    "type": "function",
    "name": "gbp",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
ROWS = {
    "models": "/v1/models",
    "toolgroups": "/v1/toolgroups",
    "tools": "/v1/tools",
    "version": "/v1/version",
    "health": "/v1/health",
    "routes": "/v1/inspect/routes",
}

Replay = Callable[[httpx.Client, str], dict[str, Answer]]


class Replayed:
    """The answers so far, by the name of their capture."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.answers: dict[str, Answer] = {}

    def send(self, name: str, method: str, path: str, body: Json = None, **headers: str) -> Json:
        """The body of the answer."""
        response = self._http.request(method, path, json=body, headers=headers)
        self.answers[name] = received(response)
        return self.answers[name].body


def replay_agents(prefix: str, tool: dict[str, Any], http: httpx.Client, _mcp_url: str) -> dict[str, Answer]:
    """Agents, sessions and turns, and what the server tells about itself."""
    replayed = Replayed(http)
    agent, session = _make_agent(replayed, f"{prefix}/agents", tool)
    turn = f"{session}/turn"
    _take_turns(replayed, turn)
    replayed.send("get_session", "GET", session)
    replayed.send("list_agents", "GET", f"{prefix}/agents")
    replayed.send("get_agent", "GET", agent)
    replayed.send("list_sessions", "GET", f"{agent}/sessions")
    replayed.send("turn_nonstream", "POST", turn, _turn("SAY nonstream", stream=False))
    replayed.send("turn_model_err500", "POST", turn, _turn("ERR 500"))
    replayed.send("turn_model_err400", "POST", turn, _turn("ERR 400"))
    _make_mistakes(replayed, f"{prefix}/agents", agent, session)
    for name, path in ROWS.items():
        replayed.send(name, "GET", path)
    replayed.send("version_426", "GET", "/v1/models", **{"X-LlamaStack-Client-Version": "0.2.23"})
    replayed.send("delete_session", "DELETE", session)
    replayed.send("delete_agent", "DELETE", agent)
    return replayed.answers


def _make_agent(replayed: Replayed, agents: str, tool: dict[str, Any]) -> tuple[str, str]:
    """Paths of the agent and of its session."""
    config = {
        "model": MODEL,
        "instructions": "You are helpful",
        "client_tools": [tool],
        "toolgroups": [],
        "max_infer_iters": 5,
        "sampling_params": {"strategy": {"type": "greedy"}, "max_tokens": 128},
    }
    agent = f"{agents}/{replayed.send('create_agent', 'POST', agents, {'agent_config': config})['agent_id']}"
    created = replayed.send("create_session", "POST", f"{agent}/session", {"session_name": "s1"})
    return agent, f"{agent}/session/{created['session_id']}"


def _turn(content: str, *, stream: bool = True, role: str = "user") -> Json:
    return {"messages": [{"role": role, "content": content}], "stream": stream}


def _take_turns(replayed: Replayed, turn: str) -> None:
    replayed.send("turn_plain", "POST", turn, _turn("SAY hello there world"))
    call = 'CALL get_boiling_point {"liquid":"polyjuice"}'
    events = replayed.send("turn_client_tool_1_awaiting", "POST", turn, _turn(call))
    awaiting = events[-1]["data"]["event"]["payload"]["turn"]
    [asked] = awaiting["output_message"]["tool_calls"]
    response = {"call_id": asked["call_id"], "tool_name": "get_boiling_point", "content": "-100"}
    taken = f"{turn}/{awaiting['turn_id']}"
    resumption = {"tool_responses": [response], "stream": True}
    replayed.send("turn_client_tool_2_resume", "POST", f"{taken}/resume", resumption)
    replayed.send("get_turn", "GET", taken)
    replayed.send("get_step", "GET", f"{taken}/step/{awaiting['steps'][0]['step_id']}")


def _make_mistakes(replayed: Replayed, agents: str, agent: str, session: str) -> None:
    said = _turn("SAY nothing")
    replayed.send("turn_bad_session", "POST", f"{agent}/session/{NOWHERE}/turn", said)
    replayed.send("turn_bad_agent", "POST", f"{session.replace(agent, f'{agents}/{NOWHERE}')}/turn", said)
    replayed.send("turn_bad_body", "POST", f"{session}/turn", _turn("SAY nothing", role="bogus"))
    replayed.send("get_agent_missing", "GET", f"{agents}/{NOWHERE}")
    replayed.send("get_session_missing", "GET", f"{agent}/session/{NOWHERE}")
    replayed.send("get_turn_missing", "GET", f"{session}/turn/{NOWHERE}")


def replay_responses(http: httpx.Client, mcp_url: str) -> dict[str, Answer]:
    """Responses, one of them in a conversation."""
    replayed = Replayed(http)

    def respond(name: str, text: str, *, stream: bool = True, **more: Json) -> None:
        replayed.send(name, "POST", "/v1/responses", {"model": MODEL, "input": text, "stream": stream, **more})

    conversation = replayed.send("conversation_create", "POST", "/v1/conversations", {"metadata": {"name": "s"}})["id"]
    respond("response_stream", "SAY hello world", instructions="hi", conversation=conversation)
    respond("response_function_call", 'CALL gbp {"a":1}', tools=[FUNCTION])
    server = {"type": "mcp", "server_label": "fake", "server_url": mcp_url}
    respond("response_mcp", 'CALL add {"a":1,"b":2}', tools=[server])
    respond("response_nonstream", "SAY hi", stream=False)
    respond("response_err", "ERR 400")
    replayed.send("conv_items", "GET", f"/v1/conversations/{conversation}/items")
    return replayed.answers


VERSIONS = {"s35-v1": "0.3.5", "s35-v1alpha": "0.3.5", "s24-v1": "0.2.23", "s35-responses": "0.3.5"}
"""Of the client that each set was captured for."""

REPLAYS: dict[str, Replay] = {
    "s35-v1": partial(replay_agents, "/v1", CLIENT_TOOL),
    "s35-v1alpha": partial(replay_agents, "/v1alpha", CLIENT_TOOL),
    "s24-v1": partial(replay_agents, "/v1", CLIENT_TOOL_OF_0_2),
    "s35-responses": replay_responses,
}
