"""python llama-stack-client 0.3: agents under `client.alpha.agents`. Its Agent class is tried by responses_py."""

from __future__ import annotations

import json
from typing import Any

from checks import (
    CARAVAN_URL,
    DIMENSIONS,
    EMBEDDING_MODEL,
    MCP_URL,
    MODEL,
    NOBODY,
    check,
    expect,
    expect_in,
    main,
    model_requests,
    raises,
    unique,
    user,
)
from llama_stack_client import APIStatusError, AsyncLlamaStackClient, LlamaStackClient, NotFoundError

client = LlamaStackClient(base_url=CARAVAN_URL, max_retries=0)
agents = client.alpha.agents

BOILING_POINT = {
    "name": "get_boiling_point",
    "description": "Gives the boiling point",
    "input_schema": {
        "type": "object",
        "properties": {"liquid_name": {"type": "string", "description": "the name of the liquid"}},
        "required": ["liquid_name"],
    },
}
CALL = 'CALL get_boiling_point {"liquid_name":"polyjuice"}'


def new_ids(**config: Any) -> dict[str, str]:
    """The ids of a new agent and of a session of it, as the calls take them."""
    fields: Any = {"model": MODEL, "instructions": "You are helpful", **config}
    agent_id = agents.create(agent_config=fields).agent_id
    return {"agent_id": agent_id, "session_id": agents.session.create(agent_id, session_name="s").session_id}


def stream_turn(ids: dict[str, str], script: str, **more: Any) -> list[Any]:
    return list(agents.turn.create(**ids, messages=user(script), stream=True, **more))


def run_turn(ids: dict[str, str], script: str, **more: Any) -> Any:
    return agents.turn.create(**ids, messages=user(script), stream=False, **more)


def new_toolgroup() -> str:
    toolgroup_id = unique("mcp::group")
    client.toolgroups.register(
        toolgroup_id=toolgroup_id, provider_id="model-context-protocol", mcp_endpoint={"uri": MCP_URL}
    )
    return toolgroup_id


def new_vector_store() -> str:
    body = {"embedding_model": EMBEDDING_MODEL, "embedding_dimension": DIMENSIONS}
    return client.vector_stores.create(name=unique("store"), extra_body=body).id


def insert_documents(vector_store_id: str) -> None:
    document: Any = {"document_id": "d1", "content": "Camels drink water.", "mime_type": "text/plain", "metadata": {}}
    client.tool_runtime.rag_tool.insert(documents=[document], vector_db_id=vector_store_id, chunk_size_in_tokens=64)


@check
def models() -> None:
    listed = {model.identifier: model.api_model_type for model in client.models.list()}
    expect((listed.get(MODEL), listed.get(EMBEDDING_MODEL)), ("llm", "embedding"))
    expect(client.models.retrieve(MODEL).identifier, MODEL)


@check
def tools() -> None:
    toolgroup_id = new_toolgroup()
    expect_in(toolgroup_id, {group.identifier for group in client.toolgroups.list()})
    listed = {tool.name: tool for tool in client.tools.list(toolgroup_id=toolgroup_id)}
    expect(listed["add"].input_schema["required"], ["a", "b"])
    expect_in("5", str(client.tool_runtime.invoke_tool(tool_name="add", kwargs={"a": 2, "b": 3}).content))
    # Not the one with the tools: a call by name may come to be that of another program's group, while they run at once.
    client.toolgroups.unregister(new_toolgroup())


@check
def agent_create_list_delete() -> None:
    agent_id = new_ids()["agent_id"]
    expect(agents.retrieve(agent_id).agent_config.model, MODEL)
    expect_in(agent_id, {row["agent_id"] for row in agents.list(limit=1000).data})
    agents.delete(agent_id)
    with raises(NotFoundError):
        agents.retrieve(agent_id)


@check
def session_create_list_delete() -> None:
    ids = new_ids()
    expect(agents.session.retrieve(**ids).session_id, ids["session_id"])
    expect([row["session_id"] for row in agents.session.list(ids["agent_id"]).data], [ids["session_id"]])
    agents.session.delete(**ids)
    with raises(NotFoundError):
        agents.session.retrieve(**ids)


@check
def streamed_turn() -> None:
    chunks = stream_turn(new_ids(), "SAY hello there world")
    kinds = [chunk.event.payload.event_type for chunk in chunks]
    expect((kinds[0], kinds[-2:]), ("step_start", ["step_complete", "turn_complete"]))
    deltas = [chunk.event.payload.delta for chunk in chunks if chunk.event.payload.event_type == "step_progress"]
    expect("".join(delta.text for delta in deltas), "hello there world ")
    expect(chunks[-1].event.payload.turn.output_message.content, "hello there world ")


@check
async def streamed_turn_async() -> None:
    async with AsyncLlamaStackClient(base_url=CARAVAN_URL, max_retries=0) as asynchronous:
        stream = await asynchronous.alpha.agents.turn.create(**new_ids(), messages=user("SAY hello"), stream=True)
        chunks = [chunk async for chunk in stream]
    expect(chunks[-1].event.payload.turn.output_message.content, "hello ")


@check
def unicode_text() -> None:
    expect_in("日本語 🐫🚐 ", stream_turn(new_ids(), "UNICODE")[-1].event.payload.turn.output_message.content)


@check
def non_streaming() -> None:
    turn = run_turn(new_ids(), "SAY all at once")
    expect((turn.output_message.content, turn.output_message.stop_reason), ("all at once ", "end_of_turn"))


@check
def two_turn_history() -> None:
    ids = new_ids()
    run_turn(ids, "SAY first")
    history = json.loads(run_turn(ids, "HISTORY").output_message.content)
    expect([message["role"] for message in history], ["system", "user", "assistant", "user"])
    expect(history[2]["content"], "first ")


@check
def client_tool_resume() -> None:
    ids = new_ids(client_tools=[BOILING_POINT])
    marker = unique("marker")
    payload = stream_turn(ids, f"{marker}\n{CALL}")[-1].event.payload
    expect(payload.event_type, "turn_awaiting_input")
    call = payload.turn.output_message.tool_calls[0]
    expect((call.tool_name, json.loads(call.arguments)), ("get_boiling_point", {"liquid_name": "polyjuice"}))
    response: Any = {"call_id": call.call_id, "tool_name": call.tool_name, "content": "-100"}
    turn: Any = agents.turn.resume(payload.turn.turn_id, **ids, tool_responses=[response], stream=False)
    expect(turn.output_message.content, "The tool said: -100 ")
    expect([step.step_type for step in turn.steps], ["inference", "tool_execution", "inference"])
    offered = model_requests(marker)[0]["tools"][0]["function"]
    expect(offered["parameters"]["required"], ["liquid_name"])


@check
def tool_calls_in_steps() -> None:
    """Where the model streams a call, and in the steps, arguments are JSON."""
    ids = new_ids(client_tools=[BOILING_POINT])
    chunks = stream_turn(ids, CALL)
    deltas = [chunk.event.payload.delta for chunk in chunks if chunk.event.payload.event_type == "step_progress"]
    last = [delta for delta in deltas if delta.type == "tool_call"][-1]
    expect((last.parse_status, json.loads(last.tool_call.arguments)), ("succeeded", {"liquid_name": "polyjuice"}))
    turn: Any = agents.turn.retrieve(chunks[-1].event.payload.turn.turn_id, **ids)
    expect(json.loads(turn.steps[0].api_model_response.tool_calls[0].arguments), {"liquid_name": "polyjuice"})


@check
def max_infer_iters() -> None:
    ids = new_ids(toolgroups=[new_toolgroup()], max_infer_iters=2)
    turn = run_turn(ids, 'CALL add {"a":1,"b":1} | CALL add {"a":2,"b":2} | CALL add {"a":3,"b":3} | SAY never')
    expect([step.step_type for step in turn.steps].count("inference"), 2)


@check
def max_tokens_zero() -> None:
    marker = unique("marker")
    ids = new_ids(sampling_params={"strategy": {"type": "greedy"}, "max_tokens": 0})
    expect(run_turn(ids, f"{marker}\nSAY no limit").output_message.content, "no limit ")
    asked = model_requests(marker)[0]
    expect((asked.get("max_tokens"), asked.get("max_completion_tokens")), (None, None))


@check
def mcp() -> None:
    turn = run_turn(new_ids(toolgroups=[new_toolgroup()]), 'CALL add {"a":2,"b":3}')
    expect([step.step_type for step in turn.steps], ["inference", "tool_execution", "inference"])
    expect_in("5", str(turn.steps[1].tool_responses[0].content))
    expect_in("5", turn.output_message.content)


@check
def shields() -> None:
    shield_id = unique("guard")
    client.shields.register(shield_id=shield_id, provider_id="llama-guard", provider_shield_id=MODEL)
    ids = new_ids(input_shields=[shield_id], output_shields=[shield_id])
    turn = run_turn(ids, "SAY hello\nGUARD Assistant UNSAFE S1")
    expect([step.step_type for step in turn.steps], ["shield_call", "inference", "shield_call"])
    violation = turn.steps[2].violation
    expect((violation.violation_level, violation.metadata), ("error", {"violation_type": "S1"}))
    expect(turn.output_message.content, violation.user_message)
    run_shield = client.safety.run_shield
    expect(run_shield(shield_id=shield_id, messages=user("fine"), params={}).violation, None)
    refused: Any = user("GUARD User UNSAFE S1")
    expect(run_shield(shield_id=shield_id, messages=refused, params={}).violation, violation)


@check
def documents() -> None:
    document = {"content": "\nSAY from the document", "mime_type": "text/plain"}
    turn = run_turn(new_ids(), "Do as the document says.", documents=[document])
    expect(turn.output_message.content, "from the document ")


@check
def response_format() -> None:
    marker = unique("marker")
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    ids = new_ids(response_format={"type": "json_schema", "json_schema": schema})
    turn = run_turn(ids, f'{marker}\nSAY {{"answer":"yes"}}')
    expect(json.loads(turn.output_message.content), {"answer": "yes"})
    asked = model_requests(marker)[0]["response_format"]
    expect((asked["type"], asked["json_schema"]["schema"]["required"]), ("json_schema", ["answer"]))


@check
def vector_db_register_list_delete() -> None:
    store = new_vector_store()
    expect(client.vector_stores.retrieve(store).id, store)
    expect_in(store, {row.id for row in client.vector_stores.list(limit=100).data})
    client.vector_stores.delete(store)
    expect(store in {row.id for row in client.vector_stores.list(limit=100).data}, False)


@check
def vector_db_insert_and_query() -> None:
    store = new_vector_store()
    chunk: Any = {
        "content": "dates are sweet",
        "metadata": {"document_id": "d2"},
        "chunk_metadata": {"chunk_id": "c1", "document_id": "d2"},
    }
    client.vector_io.insert(vector_db_id=store, chunks=[chunk])
    found = client.vector_io.query(vector_db_id=store, query="sweet dates")
    expect(found.chunks[0].content, "dates are sweet")


@check
def rag_tool_insert_and_query() -> None:
    store = new_vector_store()
    insert_documents(store)
    found = client.tool_runtime.rag_tool.query(content="camels drink", vector_db_ids=[store])
    expect_in("Camels drink water.", str(found.content))


@check
def rag_in_a_turn() -> None:
    store = new_vector_store()
    insert_documents(store)
    search = {"name": "builtin::rag/knowledge_search", "args": {"vector_db_ids": [store]}}
    turn = run_turn(new_ids(toolgroups=[search]), 'CALL knowledge_search {"query":"camels drink"}')
    expect_in("Camels drink water.", turn.output_message.content)


@check
def retrieve_turn_and_step() -> None:
    ids = new_ids(toolgroups=[new_toolgroup()])
    turns = [run_turn(ids, script) for script in ('CALL add {"a":2,"b":3}', "SAY second")]
    expect(agents.turn.retrieve(turns[0].turn_id, **ids).turn_id, turns[0].turn_id)
    step = agents.steps.retrieve(turns[0].steps[1].step_id, turn_id=turns[0].turn_id, **ids).step
    expect((step.step_type, step.step_id), ("tool_execution", turns[0].steps[1].step_id))
    expect([turn.turn_id for turn in agents.session.retrieve(**ids).turns], [turn.turn_id for turn in turns])
    chosen = agents.session.retrieve(**ids, turn_ids=[turns[1].turn_id])
    expect([turn.turn_id for turn in chosen.turns], [turns[1].turn_id])


@check
def unknown_ids() -> None:
    ids = new_ids()
    for wrong in ({"session_id": NOBODY}, {"agent_id": NOBODY}, {"session_id": "nope"}):
        with raises(NotFoundError):
            stream_turn({**ids, **wrong}, "SAY x")
    with raises(NotFoundError):
        agents.turn.retrieve(NOBODY, **ids)


@check
def model_error() -> None:
    for status in (400, 500):
        ids = new_ids()
        expect_in("no luck", stream_turn(ids, f"PART one | ERR {status} no luck")[-1].error["message"])
        with raises(APIStatusError) as caught:
            run_turn(ids, f"ERR {status} no luck")
        expect_in("no luck", str(caught[0]))
        expect_in(caught[0].status_code, range(400, 500))
        expect(run_turn(ids, "SAY still here").output_message.content, "still here ")


if __name__ == "__main__":
    main()
