"""python llama-stack-client 0.1 and 0.2: agents under `client.agents`, and the Agent classes over them."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from checks import (
    CARAVAN_URL,
    DIMENSIONS,
    EMBEDDING_MODEL,
    MCP_URL,
    MODEL,
    NOBODY,
    Absent,
    check,
    expect,
    expect_in,
    main,
    model_requests,
    needs,
    raises,
    unique,
    user,
)
from llama_stack_client import AsyncLlamaStackClient, LlamaStackClient, NotFoundError
from llama_stack_client.lib.agents.agent import Agent, AsyncAgent
from llama_stack_client.lib.agents.event_logger import EventLogger
from llama_stack_client.lib.agents.react.agent import ReActAgent

# `Agent` leaves the stream of a failed turn unread. Where a collection then closes it while httpcore's pool holds its
# lock, which it wants too, the SDK hangs for ever, whatever the server does; without collections it never does.
gc.disable()

client = LlamaStackClient(base_url=CARAVAN_URL, max_retries=0)


def get_boiling_point(liquid_name: str, celsius: bool = True) -> int:
    """Gives the boiling point of a liquid.

    :param liquid_name: the name of the liquid
    :param celsius: whether the answer is in degrees Celsius
    """
    return -100 if liquid_name == "polyjuice" and celsius else -1


async def get_boiling_point_async(liquid_name: str) -> int:
    """Gives the boiling point of a liquid.

    :param liquid_name: the name of the liquid
    """
    return -100 if liquid_name == "polyjuice" else -1


def new_agent(**more: Any) -> tuple[Agent, str]:
    """An agent of the SDK's class, and a session of it."""
    agent = Agent(client, **{"model": MODEL, "instructions": "You are helpful", **more})
    return agent, agent.create_session(unique("session"))


def new_ids(**config: Any) -> dict[str, str]:
    """The ids of a new agent and of a session of it, as the raw calls take them."""
    fields: Any = {"model": MODEL, "instructions": "You are helpful", **config}
    agent_id = client.agents.create(agent_config=fields).agent_id
    session_id = client.agents.session.create(agent_id=agent_id, session_name=unique("session")).session_id
    return {"agent_id": agent_id, "session_id": session_id}


def logged(chunks: Iterator[Any]) -> str:
    return "".join(f"{printable}{printable.end}" for printable in EventLogger().log(chunks))


def new_toolgroup() -> str:
    toolgroup_id = unique("mcp::group")
    client.toolgroups.register(
        toolgroup_id=toolgroup_id, provider_id="model-context-protocol", mcp_endpoint={"uri": MCP_URL}
    )
    return toolgroup_id


def new_shield() -> str:
    shield_id = unique("guard")
    client.shields.register(shield_id=shield_id, provider_id="llama-guard", provider_shield_id=MODEL)
    return shield_id


def new_vector_db() -> str:
    vector_db_id = unique("db")
    registered = client.vector_dbs.register(
        vector_db_id=vector_db_id,
        embedding_model=EMBEDDING_MODEL,
        embedding_dimension=DIMENSIONS,
        provider_id="pgvector",
    )
    return str(registered.identifier)


def insert_documents(vector_db_id: str) -> None:
    document: Any = {"document_id": "d1", "content": "Camels drink water.", "mime_type": "text/plain", "metadata": {}}
    client.tool_runtime.rag_tool.insert(documents=[document], vector_db_id=vector_db_id, chunk_size_in_tokens=64)


@check
def models() -> None:
    listed = {model.identifier: model.api_model_type for model in client.models.list()}
    expect((listed.get(MODEL), listed.get(EMBEDDING_MODEL)), ("llm", "embedding"))
    expect(client.models.retrieve(MODEL).identifier, MODEL)


@check
def tools() -> None:
    toolgroup_id = new_toolgroup()
    expect_in(toolgroup_id, {group.identifier for group in client.toolgroups.list()})
    listed = {tool.identifier: tool for tool in client.tools.list(toolgroup_id=toolgroup_id)}
    expect(
        [(parameter.name, parameter.parameter_type, parameter.required) for parameter in listed["add"].parameters],
        [("a", "integer", True), ("b", "integer", True)],
    )
    expect(listed["add"].toolgroup_id, toolgroup_id)
    expect_in("5", str(client.tool_runtime.invoke_tool(tool_name="add", kwargs={"a": 2, "b": 3}).content))
    # Not the one with the tools: a call by name may come to be that of another program's group, while they run at once.
    client.toolgroups.unregister(new_toolgroup())


@check
def agent_create_list_delete() -> None:
    agent_id = new_ids()["agent_id"]
    if hasattr(client.agents, "retrieve"):
        expect(client.agents.retrieve(agent_id).agent_config.model, MODEL)
        expect_in(agent_id, {row["agent_id"] for row in client.agents.list(limit=1000).data})
    client.agents.delete(agent_id)
    with raises(NotFoundError):
        client.agents.session.create(agent_id=agent_id, session_name="late")


@check
def session_create_list_delete() -> None:
    ids = new_ids()
    expect(client.agents.session.retrieve(**ids).session_id, ids["session_id"])
    if hasattr(client.agents.session, "list"):
        expect(
            [row["session_id"] for row in client.agents.session.list(agent_id=ids["agent_id"]).data],
            [ids["session_id"]],
        )
    client.agents.session.delete(**ids)
    with raises(NotFoundError):
        client.agents.session.retrieve(**ids)


@check
def streamed_turn() -> None:
    agent, session_id = new_agent()
    chunks = list(agent.create_turn(messages=user("SAY hello there world"), session_id=session_id))
    kinds = [chunk.event.payload.event_type for chunk in chunks]
    expect((kinds[0], kinds[-2:]), ("step_start", ["step_complete", "turn_complete"]))
    deltas = [chunk.event.payload.delta for chunk in chunks if chunk.event.payload.event_type == "step_progress"]
    expect("".join(delta.text for delta in deltas), "hello there world ")
    expect(chunks[-1].event.payload.turn.output_message.content, "hello there world ")


@check
def event_logger() -> None:
    agent, session_id = new_agent(tools=[get_boiling_point])
    script = 'CALL get_boiling_point {"liquid_name":"polyjuice"} | SAY it is cold'
    text = logged(agent.create_turn(messages=user(script), session_id=session_id))
    expect_in("it is cold", text)
    expect_in("Tool:get_boiling_point Response:-100", text)


@check
def unicode_text() -> None:
    agent, session_id = new_agent()
    turn: Any = agent.create_turn(messages=user("UNICODE"), session_id=session_id, stream=False)
    expect_in("日本語 🐫🚐 ", turn.output_message.content)


@check
def non_streaming() -> None:
    turn: Any = client.agents.turn.create(**new_ids(), messages=user("SAY all at once"), stream=False)
    expect((turn.output_message.content, turn.output_message.stop_reason), ("all at once ", "end_of_turn"))
    agent, session_id = new_agent()
    turn = agent.create_turn(messages=user("SAY all at once"), session_id=session_id, stream=False)
    expect(turn.output_message.content, "all at once ")


@check
def two_turn_history() -> None:
    agent, session_id = new_agent()
    agent.create_turn(messages=user("SAY first"), session_id=session_id, stream=False)
    second: Any = agent.create_turn(messages=user("HISTORY"), session_id=session_id, stream=False)
    history = json.loads(second.output_message.content)
    expect([message["role"] for message in history], ["system", "user", "assistant", "user"])
    expect(history[2]["content"], "first ")


@check
def turn_without_session_id() -> None:
    agent, _ = new_agent()
    turn: Any = agent.create_turn(messages=user("SAY hello"), stream=False)
    expect(turn.output_message.content, "hello ")


@check
def client_tool() -> None:
    agent, session_id = new_agent(tools=[get_boiling_point])
    marker = unique("marker")
    script = f'{marker}\nCALL get_boiling_point {{"liquid_name":"polyjuice","celsius":true}}'
    turn: Any = agent.create_turn(messages=user(script), session_id=session_id, stream=False)
    expect(turn.output_message.content, "The tool said: -100 ")
    expect([step.step_type for step in turn.steps], ["inference", "tool_execution", "inference"])
    offered = model_requests(marker)[0]["tools"][0]["function"]
    expect(offered["parameters"]["properties"]["liquid_name"]["description"], "the name of the liquid")
    expect(offered["parameters"]["required"], ["liquid_name"])


@check
def client_tool_resume() -> None:
    ids = new_ids(client_tools=[definition()])
    script = 'CALL get_boiling_point {"liquid_name":"polyjuice"}'
    chunks = list(client.agents.turn.create(**ids, messages=user(script), stream=True))
    payload: Any = chunks[-1].event.payload
    expect(payload.event_type, "turn_awaiting_input")
    call = payload.turn.output_message.tool_calls[0]
    expect((call.tool_name, call.arguments), ("get_boiling_point", {"liquid_name": "polyjuice"}))
    expect(json.loads(call.arguments_json), {"liquid_name": "polyjuice"})
    turn: Any = client.agents.turn.resume(
        **ids,
        turn_id=payload.turn.turn_id,
        tool_responses=[{"call_id": call.call_id, "tool_name": call.tool_name, "content": "-100"}],
        stream=False,
    )
    expect(turn.output_message.content, "The tool said: -100 ")


def definition() -> dict[str, Any]:
    name: Any = {"name": "liquid_name", "parameter_type": "str", "description": "the liquid", "required": True}
    return {"name": "get_boiling_point", "description": "Gives the boiling point", "parameters": [name]}


@check
def tool_calls_in_steps() -> None:
    """Where the model streams a call, and in the steps, arguments are objects."""
    ids = new_ids(client_tools=[definition()])
    script = 'CALL get_boiling_point {"liquid_name":"polyjuice"}'
    chunks = list(client.agents.turn.create(**ids, messages=user(script), stream=True))
    deltas = [chunk.event.payload.delta for chunk in chunks if chunk.event.payload.event_type == "step_progress"]
    last: Any = [delta for delta in deltas if delta.type == "tool_call"][-1]
    expect((last.parse_status, last.tool_call.arguments), ("succeeded", {"liquid_name": "polyjuice"}))
    turn: Any = client.agents.turn.retrieve(turn_id=chunks[-1].event.payload.turn.turn_id, **ids)
    expect(turn.steps[0].api_model_response.tool_calls[0].arguments, {"liquid_name": "polyjuice"})


@check
async def client_tool_async() -> None:
    async with AsyncLlamaStackClient(base_url=CARAVAN_URL, max_retries=0) as asynchronous:
        agent = AsyncAgent(
            asynchronous, model=MODEL, instructions="You are helpful", tools=[get_boiling_point_async, new_toolgroup()]
        )
        session_id = await agent.create_session(unique("session"))
        script = 'CALL get_boiling_point_async {"liquid_name":"polyjuice"}'
        stream: AsyncIterator[Any] = await agent.create_turn(messages=user(script), session_id=session_id)
        chunks = [chunk async for chunk in stream]
    expect(chunks[-1].event.payload.turn.output_message.content, "The tool said: -100 ")


def thought(**rest: Any) -> str:
    return "SAY " + json.dumps({"thought": "so", "action": None, "answer": None, **rest})


def react(tools: list[Any], action: dict[str, Any]) -> str:
    """What a ReAct agent answers after one action of the model's."""
    agent = ReActAgent(client, model=MODEL, tools=tools, json_response_format=True)
    session_id = agent.create_session(unique("session"))
    script = f"{thought(action=action)} | {thought(answer='found')}"
    chunks: list[Any] = list(agent.create_turn(messages=user(script), session_id=session_id))
    if hasattr(chunks[-1], "error"):
        raise AssertionError(chunks[-1].error)
    return str(json.loads(chunks[-1].event.payload.turn.output_message.content)["answer"])


@check
def react_client_tool() -> None:
    action = {"tool_name": "get_boiling_point", "tool_params": [{"name": "liquid_name", "value": "polyjuice"}]}
    expect(react([get_boiling_point], action), "found")


@check
def react_toolgroup() -> None:
    action = {"tool_name": "add", "tool_params": [{"name": "a", "value": 2}, {"name": "b", "value": 3}]}
    expect(react([new_toolgroup()], action), "found")


@check
def max_infer_iters() -> None:
    agent, session_id = new_agent(tools=[new_toolgroup()], max_infer_iters=2)
    script = 'CALL add {"a":1,"b":1} | CALL add {"a":2,"b":2} | CALL add {"a":3,"b":3} | SAY never'
    turn: Any = agent.create_turn(messages=user(script), session_id=session_id, stream=False)
    expect([step.step_type for step in turn.steps].count("inference"), 2)


@check
def max_tokens_zero() -> None:
    marker = unique("marker")
    agent, session_id = new_agent(sampling_params={"strategy": {"type": "greedy"}, "max_tokens": 0})
    turn: Any = agent.create_turn(messages=user(f"{marker}\nSAY no limit"), session_id=session_id, stream=False)
    expect(turn.output_message.content, "no limit ")
    asked = model_requests(marker)[0]
    expect((asked.get("max_tokens"), asked.get("max_completion_tokens")), (None, None))


@check
def mcp() -> None:
    agent, session_id = new_agent(tools=[new_toolgroup()])
    turn: Any = agent.create_turn(messages=user('CALL add {"a":2,"b":3}'), session_id=session_id, stream=False)
    expect([step.step_type for step in turn.steps], ["inference", "tool_execution", "inference"])
    expect_in("5", str(turn.steps[1].tool_responses[0].content))
    expect_in("5", turn.output_message.content)


@check
def shields() -> None:
    shield_id = new_shield()
    expect_in(shield_id, {shield.identifier for shield in client.shields.list()})
    agent, session_id = new_agent(input_shields=[shield_id], output_shields=[shield_id])
    text = logged(agent.create_turn(messages=user("SAY hello"), session_id=session_id))
    expect(text.count("No Violation"), 2)
    refused = user("SAY hello\nGUARD Assistant UNSAFE S1")
    turn: Any = agent.create_turn(messages=refused, session_id=session_id, stream=False)
    expect([step.step_type for step in turn.steps], ["shield_call", "inference", "shield_call"])
    violation = turn.steps[2].violation
    expect((violation.violation_level, violation.metadata), ("error", {"violation_type": "S1"}))
    expect(turn.output_message.content, violation.user_message)
    refused = user("SAY hello\nGUARD User UNSAFE S1")
    text = logged(agent.create_turn(messages=refused, session_id=session_id))
    expect_in(f"{violation.metadata} {violation.user_message}", text)
    expect(run_shield(shield_id, "fine"), None)
    expect(run_shield(shield_id, "GUARD User UNSAFE S1"), violation)


def run_shield(shield_id: str, content: str) -> Any:
    return client.safety.run_shield(shield_id=shield_id, messages=user(content), params={}).violation


@check
def documents() -> None:
    agent, session_id = new_agent()
    document: Any = {"content": "\nSAY from the document", "mime_type": "text/plain"}
    turn: Any = agent.create_turn(
        messages=user("Do as the document says."), documents=[document], session_id=session_id, stream=False
    )
    expect(turn.output_message.content, "from the document ")


@check
def vector_db_register_list_delete() -> None:
    vector_db_id = new_vector_db()
    expect(client.vector_dbs.retrieve(vector_db_id).embedding_dimension, DIMENSIONS)
    expect_in(vector_db_id, {row.identifier for row in client.vector_dbs.list()})
    client.vector_dbs.unregister(vector_db_id)
    expect(vector_db_id in {row.identifier for row in client.vector_dbs.list()}, False)


@check
def vector_db_insert_and_query() -> None:
    vector_db_id = new_vector_db()
    chunk: Any = {"content": "dates are sweet", "mime_type": "text/plain", "metadata": {"document_id": "d2"}}
    client.vector_io.insert(vector_db_id=vector_db_id, chunks=[chunk])
    found = client.vector_io.query(vector_db_id=vector_db_id, query="sweet dates")
    expect(found.chunks[0].content, "dates are sweet")


@check
def rag_tool_insert_and_query() -> None:
    vector_db_id = new_vector_db()
    insert_documents(vector_db_id)
    found = client.tool_runtime.rag_tool.query(content="camels drink", vector_db_ids=[vector_db_id])
    expect_in("Camels drink water.", str(found.content))


@check
def rag_in_a_turn() -> None:
    vector_db_id = new_vector_db()
    insert_documents(vector_db_id)
    search: Any = {"name": "builtin::rag/knowledge_search", "args": {"vector_db_ids": [vector_db_id]}}
    agent, session_id = new_agent(tools=[search])
    script = 'CALL knowledge_search {"query":"camels drink"}'
    turn: Any = agent.create_turn(messages=user(script), session_id=session_id, stream=False)
    expect_in("Camels drink water.", turn.output_message.content)


@check
def retrieve_turn_and_step() -> None:
    ids = new_ids(toolgroups=[new_toolgroup()])
    turns: list[Any] = [
        client.agents.turn.create(**ids, messages=user(script), stream=False)
        for script in ('CALL add {"a":2,"b":3}', "SAY second")
    ]
    expect(client.agents.turn.retrieve(turn_id=turns[0].turn_id, **ids).turn_id, turns[0].turn_id)
    step = client.agents.steps.retrieve(step_id=turns[0].steps[1].step_id, turn_id=turns[0].turn_id, **ids).step
    expect((step.step_type, step.step_id), ("tool_execution", turns[0].steps[1].step_id))
    session = client.agents.session.retrieve(**ids)
    expect([turn.turn_id for turn in session.turns], [turn.turn_id for turn in turns])
    chosen = client.agents.session.retrieve(**ids, turn_ids=[turns[1].turn_id])
    expect([turn.turn_id for turn in chosen.turns], [turns[1].turn_id])


@check
def unknown_ids() -> None:
    ids = new_ids()
    for wrong in ({"session_id": NOBODY}, {"agent_id": NOBODY}, {"session_id": "nope"}):
        with raises(NotFoundError):
            list(client.agents.turn.create(**{**ids, **wrong}, messages=user("SAY x"), stream=True))
    with raises(NotFoundError):
        client.agents.turn.retrieve(turn_id=NOBODY, **ids)


@check
def model_error() -> None:
    for status in (400, 500):
        agent, session_id = new_agent()
        text = logged(agent.create_turn(messages=user(f"PART one | ERR {status} no luck"), session_id=session_id))
        expect_in("no luck", text)
        with raises(RuntimeError) as caught:
            agent.create_turn(messages=user(f"ERR {status} no luck"), session_id=session_id, stream=False)
        expect_in("no luck", str(caught[0]))
        turn: Any = agent.create_turn(messages=user("SAY still here"), session_id=session_id, stream=False)
        expect(turn.output_message.content, "still here ")


@check
def chat_completion() -> None:
    answer: Any = client.inference.chat_completion(model_id=MODEL, messages=user("SAY hello there"))
    expect((answer.completion_message.content, answer.completion_message.stop_reason), ("hello there ", "end_of_turn"))


@check
def chat_completion_streamed() -> None:
    stream: Any = client.inference.chat_completion(model_id=MODEL, messages=user("SAY hello there"), stream=True)
    events = [chunk.event for chunk in stream]
    expect((events[0].event_type, events[-1].event_type), ("start", "complete"))
    expect("".join(event.delta.text for event in events), "hello there ")


@check
def chat_completion_tool_call() -> None:
    parameter = {"param_type": "str", "description": "the liquid", "required": True}
    tool: Any = {"tool_name": "get_boiling_point", "description": "bp", "parameters": {"liquid_name": parameter}}
    script = 'CALL get_boiling_point {"liquid_name":"polyjuice"}'
    answer: Any = client.inference.chat_completion(model_id=MODEL, messages=user(script), tools=[tool])
    call = answer.completion_message.tool_calls[0]
    expect((call.tool_name, call.arguments), ("get_boiling_point", {"liquid_name": "polyjuice"}))


@check
def openai_chat_completion() -> None:
    create = needs(client, "chat", "completions", "create")
    expect(create(model=MODEL, messages=user("SAY hello")).choices[0].message.content, "hello ")
    chunks = create(model=MODEL, messages=user("SAY hello there"), stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    expect("".join(texts), "hello there ")


@check
def embeddings() -> None:
    if hasattr(client, "embeddings"):
        answer: Any = client.embeddings.create(model=EMBEDDING_MODEL, input=["camels", "dates"])
        vectors = [row.embedding for row in answer.data]
    elif hasattr(client.inference, "embeddings"):
        vectors = client.inference.embeddings(model_id=EMBEDDING_MODEL, contents=["camels", "dates"]).embeddings
    else:
        raise Absent("the SDK has no embeddings")
    expect([len(vector) for vector in vectors], [DIMENSIONS, DIMENSIONS])


if __name__ == "__main__":
    main()
