"""What clients of 0.1 to 0.3 send and are sent, over HTTP, on one running system.

The clients themselves are in `tests/compat`; here are the shapes, and what no client shows: that the same turn is read
in each dialect, by whoever follows or resumes it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Caravan
from tests.support.scripted_model import ScriptedModel

pytestmark = pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True, scope="package")

ALIAS = "meta-llama/Llama-3.2-3B-Instruct"
PARAMETER = {
    "name": "liquid",
    "parameter_type": "str",
    "description": "The liquid",
    "required": True,
    "default": None,
}
SCHEMA = {
    "type": "object",
    "properties": {"liquid": {"type": "string", "description": "The liquid"}},
    "required": ["liquid"],
}
BOIL = 'CALL boil {"liquid":"caf\\u00e9"}'
TEXT = '{"liquid":"caf\\u00e9"}'
OBJECT = {"liquid": "café"}


class Sdk(httpx.Client):
    """What an SDK of a version sends, without the SDK."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        super().__init__(base_url=url, headers=headers, timeout=60)

    def ok(self, method: str, path: str, **more: Any) -> Any:
        answer = self.request(method, path, **more)
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    def session(self, **config: Any) -> str:
        """The path of a session of a new agent."""
        fields = {"model": "scripted", "instructions": "", **config}
        agent = self.ok("POST", "/v1/agents", json={"agent_config": fields})["agent_id"]
        session = self.ok("POST", f"/v1/agents/{agent}/session", json={"session_name": "s"})["session_id"]
        return f"/v1/agents/{agent}/session/{session}"

    def turn(self, session: str, script: str, **more: Any) -> Any:
        body = {"messages": [{"role": "user", "content": script}], **more}
        return self.ok("POST", f"{session}/turn", json=body)

    def stream(self, method: str, path: str, body: Any = None) -> bytes:  # type: ignore[override]  # simpler here
        answer = self.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.content


@pytest.fixture(scope="module")
def sdks(caravan: Caravan) -> Iterator[dict[str, Sdk]]:
    versions = {
        "0.2": {"x-llamastack-client-version": "0.2.23"},
        "0.3": {"x-llamastack-client-version": "0.3.5"},
        "npm 0.2": {"x-stainless-package-version": "0.2.23"},
        "plain": {},
    }
    clients = {name: Sdk(caravan.url, headers) for name, headers in versions.items()}
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture
def old(sdks: dict[str, Sdk], model: ScriptedModel) -> Sdk:
    return sdks["0.2"]


@pytest.fixture
def new(sdks: dict[str, Sdk], model: ScriptedModel) -> Sdk:
    return sdks["0.3"]


def payloads(stream: bytes) -> list[Any]:
    data = [line.removeprefix(b"data: ") for line in stream.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(each)["event"]["payload"] for each in data]


def ids(stream: bytes) -> list[bytes]:
    return [line for line in stream.split(b"\n") if line.startswith(b"id: ")]


def arguments(turn: Any) -> list[Any]:
    """The arguments of all calls of a turn, wherever they stand."""
    calls: list[Any] = []
    for step in turn["steps"]:
        calls += step.get("tool_calls") or step.get("model_response", {}).get("tool_calls") or []
    return [(call["arguments"], call.get("arguments_json")) for call in [*calls, *turn["output_message"]["tool_calls"]]]


def responses(turn: Any) -> dict[str, Any]:
    call = turn["output_message"]["tool_calls"][0]
    return {"tool_responses": [{"call_id": call["call_id"], "tool_name": "boil", "content": "100"}]}


# --- agents -----------------------------------------------------------------------------------------------------------


def test_parameters_of_a_client_tool_reach_the_model(old: Sdk, new: Sdk, model: ScriptedModel) -> None:
    """As a schema; the agent is read back with what the reader knows."""
    session = old.session(client_tools=[{"name": "boil", "description": "d", "parameters": [PARAMETER]}])
    old.turn(session, "SAY x")
    assert model.requests()[-1]["body"]["tools"][0]["function"]["parameters"] == SCHEMA
    agent = session.split("/session")[0]
    read_by_old = old.ok("GET", agent)["agent_config"]["client_tools"][0]
    assert read_by_old["parameters"] == [{**PARAMETER, "parameter_type": "string"}]
    read_by_new = new.ok("GET", agent)["agent_config"]["client_tools"][0]
    assert read_by_new["input_schema"] == SCHEMA
    assert "parameters" not in read_by_new
    listed = old.ok("GET", "/v1/agents", params={"limit": 1000})["data"]
    assert [read_by_old] in [row["agent_config"]["client_tools"] for row in listed if row["agent_id"] in agent]


def test_wrong_parameters_are_refused(old: Sdk) -> None:
    """400, and not a tool without a schema."""
    config = {"model": "m", "instructions": "", "client_tools": [{"name": "boil", "parameters": [{"type": "str"}]}]}
    answer = old.post("/v1/agents", json={"agent_config": config})
    assert answer.status_code == 400
    assert "name" in answer.text


def test_fields_that_only_old_clients_know_are_accepted(old: Sdk) -> None:
    """`allow_turn_resume` of 0.1.5, and whatever else; `max_tokens` of 0 means none."""
    config = {"sampling_params": {"strategy": {"type": "greedy"}, "max_tokens": 0}, "enable_something": True}
    turn = old.turn(old.session(**config), "SAY fine", allow_turn_resume=True, unknown={"a": 1})
    assert turn["output_message"]["content"] == "fine "


def test_a_json_schema_is_asked_of_the_model(old: Sdk, model: ScriptedModel) -> None:
    """`response_format` of an agent, and no `max_tokens` where it is 0."""
    schema = {"type": "json_schema", "json_schema": {"type": "object", "title": "Answer"}}
    old.turn(old.session(response_format=schema, sampling_params={"strategy": {"type": "greedy"}}), "SAY x")
    body = model.requests()[-1]["body"]
    assert body["response_format"]["json_schema"]["schema"] == schema["json_schema"]
    assert "max_tokens" not in body


def test_arguments_have_the_shape_of_the_reader_everywhere(sdks: dict[str, Sdk], model: ScriptedModel) -> None:
    """One turn, read by all: in its stream, its replay, the turn, the step, the session; the same for each dialect."""
    old, new = sdks["0.2"], sdks["0.3"]
    session = old.session(client_tools=[{"name": "boil", "input_schema": SCHEMA}])
    live = old.stream("POST", f"{session}/turn", {"messages": [{"role": "user", "content": BOIL}], "stream": True})
    awaiting = payloads(live)[-1]["turn"]
    path = f"{session}/turn/{awaiting['turn_id']}"
    for name in ("0.2", "npm 0.2"):
        assert sdks[name].stream("GET", f"{path}/events") == live
    stored = new.stream("GET", f"{path}/events")
    assert sdks["plain"].stream("GET", f"{path}/events") == stored
    assert ids(live) == ids(stored)
    deltas = [each["delta"] for each in payloads(live) if each["event_type"] == "step_progress"]
    assert {type(delta["tool_call"]) for delta in deltas if delta["parse_status"] == "in_progress"} == {str}
    assert deltas[-1]["tool_call"]["arguments"] == OBJECT
    assert payloads(live)[-2]["step_details"]["model_response"]["tool_calls"][0]["arguments_json"] == TEXT
    for sdk, shape in ((old, (OBJECT, TEXT)), (new, (TEXT, None)), (sdks["plain"], (TEXT, None))):
        assert arguments(sdk.ok("GET", path)) == [shape] * 2, "of the inference and of the output message"
        assert arguments(sdk.ok("GET", session)["turns"][0]) == [shape] * 2
        step = sdk.ok("GET", f"{path}/step/{awaiting['steps'][0]['step_id']}")["step"]
        assert step["model_response"]["tool_calls"][0]["arguments"] == shape[0]
    assert arguments(awaiting) == [(OBJECT, TEXT)] * 2
    assert arguments(payloads(stored)[-1]["turn"]) == [(TEXT, None)] * 2


def test_a_turn_of_one_sdk_is_resumed_by_another(old: Sdk, new: Sdk) -> None:
    """Each in its own dialect, also without a stream; all follow it to the same end."""
    for one, other, shape in ((old, new, (TEXT, None)), (new, old, (OBJECT, TEXT))):
        session = one.session(client_tools=[{"name": "boil", "input_schema": SCHEMA}])
        awaiting = one.turn(session, BOIL)
        path = f"{session}/turn/{awaiting['turn_id']}"
        done = other.ok("POST", f"{path}/resume", json=responses(awaiting))
        assert done["output_message"]["content"] == "The tool said: 100 "
        assert arguments(done) == [shape] * 2, "of the inference and of the execution"
        assert [each["event_type"] for each in payloads(one.stream("GET", f"{path}/events"))] == [
            each["event_type"] for each in payloads(other.stream("GET", f"{path}/events"))
        ]


def test_a_react_agent_goes_on_after_a_complete_turn(old: Sdk) -> None:
    """It finds the call in the text and resumes the turn: the session's next turn, told in the resume's stream."""
    session = old.session()
    first = old.turn(session, "SAY do boil | SAY done")
    body = {"tool_responses": [{"call_id": str(uuid.uuid4()), "tool_name": "boil", "content": "100"}], "stream": True}
    path = f"{session}/turn/{first['turn_id']}/resume"
    last = payloads(old.stream("POST", path, body))[-1]
    assert (last["event_type"], last["turn"]["output_message"]["content"]) == ("turn_complete", "done ")
    turns = old.ok("GET", session)["turns"]
    assert [turn["turn_id"] for turn in turns] == [first["turn_id"], last["turn"]["turn_id"]]
    message = turns[1]["input_messages"][0]
    assert (message["role"], message["content"], message["tool_name"]) == ("tool", "100", "")
    assert old.post(path, json=body).status_code == 409, "it is no longer the last"
    again = old.post(path, json=body, headers={"x-stainless-retry-count": "1"})
    assert payloads(again.content)[-1]["turn"]["turn_id"] == last["turn"]["turn_id"], "the SDK did not hear the answer"


def test_turn_ids_select_and_ids_are_checked_before_a_stream(old: Sdk) -> None:
    """Comma-separated or repeated; a failed turn is stored; missing ids are 404, whether a stream is asked for."""
    session = old.session()
    ids = [old.turn(session, f"SAY {n}")["turn_id"] for n in range(2)]
    failed = old.post(f"{session}/turn", json={"messages": [{"role": "user", "content": "ERR 400 no"}]})
    assert failed.status_code == 400
    assert [turn.get("error", {}).get("code") for turn in old.ok("GET", session)["turns"]] == [
        None,
        None,
        "model_error",
    ]
    for params in ({"turn_ids": ",".join(ids)}, {"turn_ids": ids}):
        assert [turn["turn_id"] for turn in old.ok("GET", session, params=params)["turns"]] == ids
    assert [turn["turn_id"] for turn in old.ok("GET", session, params={"turn_ids": ids[1]})["turns"]] == [ids[1]]
    missing = str(uuid.uuid4())
    body = {"messages": [{"role": "user", "content": "SAY x"}], "stream": True}
    assert old.get(f"{session}/turn/{missing}").status_code == 404
    assert old.post(f"{session[:-36]}{missing}/turn", json=body).status_code == 404
    assert old.post(f"/v1/agents/{missing}/session/{session[-36:]}/turn", json=body).status_code == 404


# --- models, tools, older paths ---------------------------------------------------------------------------------------


def test_one_list_of_models_serves_all(sdks: dict[str, Sdk]) -> None:
    """Whoever asks, on both paths; a model is described by its id and by its alias."""
    listed = sdks["0.2"].ok("GET", "/v1/models")
    for sdk in sdks.values():
        assert sdk.ok("GET", "/v1/models") == listed == sdk.ok("GET", "/v1/openai/v1/models")
    assert listed["object"] == "list"
    for model_id in ("scripted", ALIAS):
        (row,) = [row for row in listed["data"] if row["id"] == model_id]
        assert (row["identifier"], row["model_id"], row["provider_resource_id"]) == (model_id, model_id, "scripted")
        assert sdks["0.3"].ok("GET", f"/v1/models/{model_id}") == row
    missing = sdks["0.3"].get("/v1/models/no/such")
    assert missing.status_code == 404
    assert "no/such" in missing.text


def test_an_alias_is_its_model_everywhere(new: Sdk, model: ScriptedModel) -> None:
    """Agents, chat completions and responses ask the model server for the model; `provider/model` works too."""
    messages = [{"role": "user", "content": "SAY x"}]
    for name in (ALIAS, "model-server/scripted"):
        new.turn(new.session(model=name), "SAY x")
        new.ok("POST", "/v1/chat/completions", json={"model": name, "messages": messages})
        new.ok("POST", "/v1/responses", json={"model": name, "input": "SAY x"})
    assert [request["body"]["model"] for request in model.requests()] == ["scripted"] * 6


def test_tools_have_rows_for_all(sdks: dict[str, Sdk]) -> None:
    """`/v1/tools`, one tool, and the tool runtime's list; toolgroups have been the same since 0.1."""
    for sdk in sdks.values():
        (group,) = [row for row in sdk.ok("GET", "/v1/toolgroups")["data"] if row["identifier"] == "builtin::rag"]
        assert (group["type"], group["provider_id"]) == ("tool_group", "rag-runtime")
        rows = sdk.ok("GET", "/v1/tools", params={"toolgroup_id": "builtin::rag"})["data"]
        row = {row["identifier"]: row for row in rows}["knowledge_search"]
        assert (row["name"], row["provider_id"]) == ("knowledge_search", "rag-runtime")
        assert [(each["name"], each["parameter_type"]) for each in row["parameters"]] == [("query", "string")]
        assert row["input_schema"]["required"] == ["query"]
        assert sdk.ok("GET", "/v1/tools/knowledge_search") == row
        assert sdk.ok("GET", "/v1/tool-runtime/list-tools", params={"tool_group_id": "builtin::rag"})["data"] == rows


def test_older_paths_are_other_names(old: Sdk) -> None:
    """`/v1/openai/v1/…` of anything, and the providers of 0.1.4."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "SAY x"}]}
    told = old.ok("POST", "/v1/openai/v1/chat/completions", json=body)
    assert told["choices"][0]["message"]["content"] == "x "
    assert old.ok("GET", "/v1/openai/v1/toolgroups") == old.ok("GET", "/v1/toolgroups")
    assert old.ok("GET", "/v1/inspect/providers") == old.ok("GET", "/v1/providers")
    missing = old.get("/v1/openai/v1/responses/resp_nope")
    assert missing.status_code == 404


# --- vector databases -------------------------------------------------------------------------------------------------


@pytest.fixture
def embedder(old: Sdk) -> Iterator[str]:
    """An embedding model, as 0.2's clients register one."""
    row = old.ok(
        "POST",
        "/v1/models",
        json={"model_id": "embedder", "model_type": "embedding", "metadata": {"embedding_dimension": 8}},
    )
    assert (row["identifier"], row["id"], row["model_type"]) == ("embedder", "embedder", "embedding")
    yield row["identifier"]
    old.ok("DELETE", "/v1/models/embedder")


def test_a_vector_database_has_the_id_that_its_client_chose(old: Sdk, new: Sdk, embedder: str) -> None:
    """Registered, found again, listed, a vector store for newer clients, filled and searched under either name of its
    id, searched by an agent, gone."""
    asked = {"vector_db_id": "Dunes-1", "embedding_model": embedder}
    row = old.ok("POST", "/v1/vector-dbs", json=asked)
    assert row.items() >= {"identifier": "Dunes-1", "type": "vector_db", "embedding_dimension": 8}.items()
    assert old.ok("POST", "/v1/vector-dbs", json={**asked, "embedding_dimension": 8}) == row
    assert old.ok("GET", "/v1/vector-dbs/Dunes-1") == row
    assert row in old.ok("GET", "/v1/vector-dbs")["data"]
    assert new.ok("GET", "/v1/vector_stores/Dunes-1")["name"] == "Dunes-1"
    document = {"document_id": "d", "content": "A camel drinks at the well", "mime_type": "text/plain", "metadata": {}}
    for name in ("vector_db_id", "vector_store_id"):
        body = {name: "Dunes-1", "documents": [document], "chunk_size_in_tokens": 50}
        old.ok("POST", "/v1/tool-runtime/rag-tool/insert", json=body)
        chunk = {"content": "An oasis has water", "chunk_id": name, "metadata": {"document_id": 7}}
        old.ok("POST", "/v1/vector-io/insert", json={name: "Dunes-1", "chunks": [chunk]})
        found = old.ok("POST", "/v1/vector-io/query", json={name: "Dunes-1", "query": "oasis water"})
        assert found["chunks"][0]["content"] == "An oasis has water"
        query = {f"{name}s": ["Dunes-1"], "content": "camel well"}
        assert "A camel drinks" in json.dumps(old.ok("POST", "/v1/tool-runtime/rag-tool/query", json=query))
    toolgroup = {"name": "builtin::rag/knowledge_search", "args": {"vector_db_ids": ["Dunes-1"]}}
    turn = old.turn(old.session(toolgroups=[toolgroup]), 'CALL knowledge_search {"query":"oasis water"}')
    assert "An oasis has water" in turn["output_message"]["content"]
    assert old.delete("/v1/vector-dbs/Dunes-1").status_code == 204
    assert old.get("/v1/vector-dbs/Dunes-1").status_code == 404
    assert old.delete("/v1/vector-dbs/Dunes-1").status_code == 404


def test_names_that_look_alike_are_databases_of_their_own(old: Sdk, embedder: str) -> None:
    """Names of tables know neither case nor signs, and end after 63 characters."""
    names = ["a-b", "a_b", "A-B", "l" * 70 + "1", "l" * 70 + "2"]
    for name in names:
        old.ok("POST", "/v1/vector-dbs", json={"vector_db_id": name, "embedding_model": embedder})
        old.ok(
            "POST", "/v1/vector-io/insert", json={"vector_db_id": name, "chunks": [{"content": name, "chunk_id": "c"}]}
        )
    for name in names:
        found = old.ok("POST", "/v1/vector-io/query", json={"vector_db_id": name, "query": "x"})["chunks"]
        assert [chunk["content"] for chunk in found] == [name]
        assert old.delete(f"/v1/vector-dbs/{name}").status_code == 204


def test_what_is_wrong_with_a_vector_database_is_told(old: Sdk, embedder: str) -> None:
    """400 and 404, never a database error, and never a 200 for a document that was not inserted."""

    def refused(**fields: Any) -> tuple[int, str]:
        answer = old.post("/v1/vector-dbs", json={"vector_db_id": "x", "embedding_model": embedder, **fields})
        return answer.status_code, answer.text

    for wrong in ("", "a/b", "a:b", "a b", "é", "-a", "a" * 129):
        assert refused(vector_db_id=wrong)[0] == 400, wrong
    assert refused(embedding_model="nope")[0] in (400, 404)
    assert refused(provider_id="nope")[0] == 400
    old.ok("POST", "/v1/vector-dbs", json={"vector_db_id": "x", "embedding_model": embedder})
    assert refused(embedding_dimension=9) == (400, refused(embedding_dimension=9)[1])
    assert "8 dimensions" in refused(embedding_dimension=9)[1]
    assert old.delete("/v1/vector-dbs/x").status_code == 204
    document = {"document_id": "d", "content": "c", "metadata": {}}
    insert = {"vector_db_id": "x", "documents": [document], "chunk_size_in_tokens": 100}
    assert old.post("/v1/tool-runtime/rag-tool/insert", json=insert).status_code == 404
    assert old.post("/v1/vector-io/query", json={"query": "x"}).status_code == 400
    assert old.post("/v1/vector-io/query", json=[]).status_code == 400


# --- inference --------------------------------------------------------------------------------------------------------


def test_chat_completions_of_old(old: Sdk, model: ScriptedModel) -> None:
    """Whole, with a tool call, and streamed."""
    body = {"model_id": ALIAS, "messages": [{"role": "user", "content": "SAY yes"}]}
    path = "/v1/inference/chat-completion"
    told = old.ok("POST", path, json=body)["completion_message"]
    assert told == {"role": "assistant", "content": "yes ", "stop_reason": "end_of_turn", "tool_calls": []}
    assert model.requests()[-1]["body"]["model"] == "scripted"
    body["messages"] = [{"role": "user", "content": BOIL}]
    (call,) = old.ok("POST", path, json=body)["completion_message"]["tool_calls"]
    assert (call["tool_name"], call["arguments"], call["arguments_json"]) == ("boil", OBJECT, TEXT)
    streamed = old.stream("POST", path, {**body, "stream": True})
    assert streamed.isascii()
    events = [json.loads(line[6:])["event"] for line in streamed.split(b"\n") if line.startswith(b"data: ")]
    assert [event["event_type"] for event in events] == ["start", "progress", "complete"]
    assert events[1]["delta"]["tool_call"]["arguments"] == OBJECT


def test_what_is_wrong_with_old_inference_is_told(old: Sdk) -> None:
    """The model server's error, one in a stream, a missing model, and a wrong body."""
    path = "/v1/inference/chat-completion"

    def asked(script: str, **more: Any) -> httpx.Response:
        body = {"model_id": "scripted", "messages": [{"role": "user", "content": script}], **more}
        return old.post(path, json=body)

    assert asked("ERR 400 no").status_code == 400
    assert asked("SAY x", model_id="nope").status_code in (400, 404)
    assert asked("SAY x", messages="x").status_code == 400
    last = [line for line in asked("PART a | ERR 500 broke", stream=True).text.split("\n") if line][-1]
    assert "error" in json.loads(last.removeprefix("data: "))
    image = {"type": "image", "image": {"data": "x"}}
    assert old.post("/v1/inference/embeddings", json={"model_id": "m", "contents": [image]}).status_code == 400
    grammar = {"type": "grammar", "bnf": {}}
    for path in ("chat-completion", "completion"):
        body = {"model_id": "scripted", "messages": [{"role": "user", "content": "x"}], "content": "x"}
        answer = old.post(f"/v1/inference/{path}", json={**body, "response_format": grammar})
        assert (answer.status_code, "response_format" in answer.text) == (400, True)


def test_embeddings_of_old(old: Sdk, embedder: str) -> None:
    """One vector for each text, given as a string or as an item."""
    item = {"type": "text", "text": "a"}
    body = {"model_id": embedder, "contents": ["a", "b", item], "task_type": "query"}
    vectors = old.ok("POST", "/v1/inference/embeddings", json=body)["embeddings"]
    assert [len(vector) for vector in vectors] == [8, 8, 8]
    assert vectors[0] == vectors[2] != vectors[1]
