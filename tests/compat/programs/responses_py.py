"""python llama-stack-client 0.3 to 0.7 and ogx-client: Responses, Conversations, and the Agent class over them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Any

from checks import (
    CARAVAN_URL,
    DIMENSIONS,
    EMBEDDING_MODEL,
    MCP_URL,
    MODEL,
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
    wait_until,
)

try:
    from ogx_client import AsyncOgxClient as AsyncClient
    from ogx_client import OgxClient
    from ogx_client.exceptions import ApiException as ApiError
    from ogx_client.exceptions import NotFoundException as NotFoundError
    from ogx_client.lib.agents.agent import Agent, AsyncAgent
    from ogx_client.lib.agents.event_logger import AgentEventLogger
    from ogx_client.lib.agents.react.agent import ReActAgent

    client = OgxClient(base_url=CARAVAN_URL)
    NOT_ASKED: dict[str, Any] = {}
except ImportError:
    from llama_stack_client import NOT_GIVEN, LlamaStackClient, NotFoundError
    from llama_stack_client import APIStatusError as ApiError
    from llama_stack_client import AsyncLlamaStackClient as AsyncClient
    from llama_stack_client.lib.agents.agent import Agent, AsyncAgent
    from llama_stack_client.lib.agents.event_logger import AgentEventLogger
    from llama_stack_client.lib.agents.react.agent import ReActAgent

    client = LlamaStackClient(base_url=CARAVAN_URL, max_retries=0)
    NOT_ASKED = {"after": NOT_GIVEN, "include": NOT_GIVEN, "limit": NOT_GIVEN}  # 0.3 wants them all named

BOILING_POINT = {
    "type": "function",
    "name": "get_boiling_point",
    "description": "Gives the boiling point",
    "parameters": {
        "type": "object",
        "properties": {"liquid_name": {"type": "string", "description": "the name of the liquid"}},
        "required": ["liquid_name"],
    },
}
MCP_TOOL = {"type": "mcp", "server_label": "tests", "server_url": MCP_URL, "require_approval": "never"}
CALL = 'CALL get_boiling_point {"liquid_name":"polyjuice"}'


def get_boiling_point(liquid_name: str) -> int:
    """Gives the boiling point of a liquid.

    :param liquid_name: the name of the liquid
    """
    return -100 if liquid_name == "polyjuice" else -1


def respond(script: str, **more: Any) -> Any:
    return client.responses.create(model=MODEL, input=script, **more)


def stream_response(script: str, **more: Any) -> list[Any]:
    return list(client.responses.create(model=MODEL, input=script, stream=True, **more))


def messages_of(response: Any) -> list[dict[str, Any]]:
    """What the model was given, as it says itself when it is asked for its HISTORY."""
    return list(json.loads(response.output_text))


def new_agent(kind: type[Agent] = Agent, **more: Any) -> tuple[Agent, str]:
    agent = kind(client, model=MODEL, **{"instructions": "You are helpful", **more})
    return agent, agent.create_session(unique("session"))


def logged(chunks: Iterable[Any]) -> str:
    return "".join(AgentEventLogger().log(iter(chunks)))


def new_conversation() -> str:
    return str(client.conversations.create(metadata={"name": "check"}).id)


def items_of(conversation_id: str) -> list[Any]:
    """A conversation's items, oldest first."""
    return list(client.conversations.items.list(conversation_id=conversation_id, order="asc", **NOT_ASKED).data)


def new_vector_store() -> str:
    body = {"embedding_model": EMBEDDING_MODEL, "embedding_dimension": DIMENSIONS}
    return str(client.vector_stores.create(name=unique("store"), extra_body=body).id)


def add_file(store: str) -> str:
    file = client.files.create(file=("camels.txt", b"Camels drink water."), purpose="assistants")
    client.vector_stores.files.create(vector_store_id=store, file_id=file.id)
    files = client.vector_stores.files
    wait_until(lambda: files.retrieve(vector_store_id=store, file_id=file.id).status != "in_progress")
    expect(files.retrieve(vector_store_id=store, file_id=file.id).status, "completed")
    return str(file.id)


@check
def models() -> None:
    listed = client.models.list()
    rows = getattr(listed, "data", listed)
    expect_in(MODEL, {getattr(row, "id", None) or row.identifier for row in rows})
    expect(client.models.retrieve(MODEL).identifier, MODEL)


@check
def response() -> None:
    answer = respond("SAY hello there", instructions="Be kind")
    expect((answer.status, answer.output_text), ("completed", "hello there "))
    expect((answer.object, answer.model), ("response", MODEL))


@check
def response_streamed() -> None:
    events = stream_response("SAY hello there world")
    kinds = [event.type for event in events]
    expect((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    expect("".join(deltas), "hello there world ")
    expect((events[-1].response.status, events[-1].response.output_text), ("completed", "hello there world "))


@check
async def response_streamed_async() -> None:
    async with AsyncClient(base_url=CARAVAN_URL) as asynchronous:
        stream = await asynchronous.responses.create(model=MODEL, input="SAY hello", stream=True)
        events = [event async for event in stream]
    expect(events[-1].response.output_text, "hello ")


@check
def unicode_text() -> None:
    expect_in("日本語 🐫🚐 ", stream_response("UNICODE")[-1].response.output_text)


@check
def previous_response_id() -> None:
    first = respond("SAY first")
    history = messages_of(respond("HISTORY", previous_response_id=first.id))
    expect([message["role"] for message in history], ["user", "assistant", "user"])
    expect_in("first", json.dumps(history[1]))


@check
def conversation() -> None:
    conversation_id = new_conversation()
    expect(client.conversations.retrieve(conversation_id=conversation_id).metadata, {"name": "check"})
    respond("SAY first", conversation=conversation_id)
    history = messages_of(respond("HISTORY", conversation=conversation_id))
    expect([message["role"] for message in history], ["user", "assistant", "user"])
    updated = client.conversations.update(conversation_id=conversation_id, metadata={"name": "new"})
    expect(updated.metadata, {"name": "new"})
    client.conversations.delete(conversation_id=conversation_id)
    with raises(NotFoundError):
        client.conversations.retrieve(conversation_id=conversation_id)


@check
def conversation_items() -> None:
    conversation_id = new_conversation()
    note = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a note"}]}
    client.conversations.items.create(conversation_id=conversation_id, items=[note])
    respond("SAY first", conversation=conversation_id)
    items = items_of(conversation_id)
    expect([(item.type, item.role) for item in items], [("message", role) for role in ("user", "user", "assistant")])
    got = client.conversations.items.get(conversation_id=conversation_id, item_id=items[0].id)
    expect_in("a note", str(got.content))


@check
def conversation_item_delete() -> None:
    delete = needs(client, "conversations", "items", "delete")
    conversation_id = new_conversation()
    respond("SAY first", conversation=conversation_id)
    items = items_of(conversation_id)
    delete(conversation_id=conversation_id, item_id=items[0].id)
    expect([item.id for item in items_of(conversation_id)], [items[1].id])


@check
def event_logger() -> None:
    agent, session_id = new_agent(tools=[get_boiling_point])
    text = logged(agent.create_turn(messages=user(f"{CALL} | SAY it is cold"), session_id=session_id))
    expect_in("it is cold", text)
    expect_in("get_boiling_point: -100", text)


@check
def non_streaming() -> None:
    agent, session_id = new_agent()
    answer: Any = agent.create_turn(messages=user("SAY all at once"), session_id=session_id, stream=False)
    expect(answer.output_text, "all at once ")


@check
def two_turn_history() -> None:
    agent, session_id = new_agent()
    agent.create_turn(messages=user("SAY first"), session_id=session_id, stream=False)
    history = messages_of(agent.create_turn(messages=user("HISTORY"), session_id=session_id, stream=False))
    expect([message["role"] for message in history], ["system", "user", "assistant", "user"])


@check
def client_tool() -> None:
    agent, session_id = new_agent(tools=[get_boiling_point])
    marker = unique("marker")
    answer: Any = agent.create_turn(messages=user(f"{marker}\n{CALL}"), session_id=session_id, stream=False)
    expect(answer.output_text, "The tool said: -100 ")
    offered = model_requests(marker)[0]["tools"][0]["function"]
    expect(offered["parameters"]["properties"]["liquid_name"]["description"], "the name of the liquid")


@check
async def client_tool_async() -> None:
    async with AsyncClient(base_url=CARAVAN_URL) as asynchronous:
        agent = AsyncAgent(asynchronous, model=MODEL, instructions="You are helpful", tools=[get_boiling_point])
        session_id = await agent.create_session(unique("session"))
        answer: Any = await agent.create_turn(messages=user(CALL), session_id=session_id, stream=False)
    expect(answer.output_text, "The tool said: -100 ")


@check
def react_client_tool() -> None:
    agent, session_id = new_agent(ReActAgent, instructions=None, tools=[get_boiling_point])
    answer: Any = agent.create_turn(messages=user(CALL), session_id=session_id, stream=False)
    expect(answer.output_text, "The tool said: -100 ")


@check
def mcp_in_agent() -> None:
    agent, session_id = new_agent(tools=[MCP_TOOL])
    chunks = list(agent.create_turn(messages=user('CALL add {"a":2,"b":3}'), session_id=session_id))
    started = [chunk.event for chunk in chunks if chunk.event.event_type == "step_started"]
    server_side = [event.metadata["tool_type"] for event in started if event.step_type == "tool_execution"]
    expect_in("mcp_call", server_side)
    expect_in("5", chunks[-1].response.output_text)


@check
def function_tool() -> None:
    asked = respond(CALL, tools=[BOILING_POINT])
    call = asked.output[-1]
    expect((call.type, call.name), ("function_call", "get_boiling_point"))
    expect(json.loads(call.arguments), {"liquid_name": "polyjuice"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "-100"}
    answer = client.responses.create(
        model=MODEL, previous_response_id=asked.id, input=[output], tools=[BOILING_POINT], stream=False
    )
    expect(answer.output_text, "The tool said: -100 ")


@check
def function_tool_streamed() -> None:
    events = stream_response(CALL, tools=[BOILING_POINT])
    done = [event.item for event in events if event.type == "response.output_item.done"]
    expect([(item.type, item.name) for item in done], [("function_call", "get_boiling_point")])
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    expect(json.loads("".join(deltas)), {"liquid_name": "polyjuice"})


@check
def mcp() -> None:
    answer = respond('CALL add {"a":2,"b":3}', tools=[MCP_TOOL])
    calls = [item for item in answer.output if item.type == "mcp_call"]
    expect([(call.name, call.output) for call in calls], [("add", "5")])
    expect_in("mcp_list_tools", [item.type for item in answer.output])
    expect_in("5", answer.output_text)


@check
def mcp_streamed() -> None:
    events = stream_response('CALL add {"a":2,"b":3}', tools=[MCP_TOOL])
    kinds = [event.type for event in events]
    expect_in("response.mcp_call.completed", kinds)
    expect([item.type for item in events[-1].response.output], ["mcp_list_tools", "mcp_call", "message"])


@check
def max_infer_iters() -> None:
    marker = unique("marker")
    script = f'{marker}\nCALL add {{"a":1,"b":1}} | CALL add {{"a":2,"b":2}} | CALL add {{"a":3,"b":3}} | SAY never'
    expect_in("mcp_call", {item.type for item in respond(script, tools=[MCP_TOOL], max_infer_iters=2).output})
    expect(len(model_requests(marker)), 2)


@check
def structured_output() -> None:
    marker = unique("marker")
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    answer = respond(f'{marker}\nSAY {{"answer":"yes"}}', text=text)
    expect(json.loads(answer.output_text), {"answer": "yes"})
    asked = model_requests(marker)[0]["response_format"]
    expect((asked["type"], asked["json_schema"]["schema"]["required"]), ("json_schema", ["answer"]))


@check
def retrieve_list_delete() -> None:
    answer = respond("SAY hello")
    expect(client.responses.retrieve(response_id=answer.id).output_text, "hello ")
    expect_in(answer.id, {row.id for row in client.responses.list(limit=100).data})
    client.responses.delete(response_id=answer.id)
    with raises(NotFoundError):
        client.responses.retrieve(response_id=answer.id)


@check
def input_items() -> None:
    answer = respond("SAY hello")
    items = client.responses.input_items.list(response_id=answer.id).data
    expect([(item.type, item.role) for item in items], [("message", "user")])
    expect_in("SAY hello", str(items[0].content))


@check
def background() -> None:
    if not {"background", "kwargs"} & set(inspect.signature(client.responses.create).parameters):
        raise Absent("the SDK has no background responses")
    queued = respond("DELAY 300 | SAY hello", background=True)
    expect_in(queued.status, ("queued", "in_progress"))
    done = wait_until(lambda: _ended(queued.id))
    expect((done.status, done.output_text), ("completed", "hello "))


def _ended(response_id: str) -> Any:
    found = client.responses.retrieve(response_id=response_id)
    return None if found.status in ("queued", "in_progress") else found


@check
def vector_store() -> None:
    store = new_vector_store()
    add_file(store)
    found = client.vector_stores.search(vector_store_id=store, query="camels drink")
    expect_in("Camels drink water.", str(found.data[0].content))
    client.vector_stores.delete(vector_store_id=store)


@check
def file_search() -> None:
    store = new_vector_store()
    add_file(store)
    tool = {"type": "file_search", "vector_store_ids": [store]}
    answer = respond('CALL knowledge_search {"query":"camels drink"}', tools=[tool])
    expect_in("file_search_call", [item.type for item in answer.output])
    expect_in("Camels drink water.", answer.output_text)


@check
def unknown_ids() -> None:
    with raises(NotFoundError):
        client.responses.retrieve(response_id="resp_00000000-0000-4000-8000-000000000000")
    with raises(NotFoundError):
        client.conversations.retrieve(conversation_id=f"conv_{'0' * 48}")
    for wrong in ({"previous_response_id": "resp_nothing"}, {"conversation": f"conv_{'0' * 48}"}):
        with raises(ApiError) as caught:
            stream_response("SAY x", **wrong)
        expect_in(_status(caught[0]), (400, 404))


def _status(error: Any) -> int:
    return int(error.status if hasattr(error, "status") else error.status_code)


@check
def model_error() -> None:
    for status in (400, 500):
        last = stream_response(f"PART one | ERR {status} no luck")[-1]
        expect((last.type, last.response.status), ("response.failed", "failed"))
        expect_in("no luck", last.response.error.message)
        agent, session_id = new_agent()
        text = logged(agent.create_turn(messages=user(f"ERR {status} no luck"), session_id=session_id))
        expect_in("no luck", text)
        answer: Any = agent.create_turn(messages=user("SAY still here"), session_id=session_id, stream=False)
        expect(answer.output_text, "still here ")


@check
def model_error_without_stream() -> None:
    """An error of HTTP, which no SDK repeats by itself, or a failed response; it says why."""
    for status in (400, 500):
        try:
            failed = respond(f"ERR {status} no luck")
        except ApiError as error:
            expect_in(_status(error), range(400, 500))
            expect_in("no luck", str(error))
        else:
            expect(failed.status, "failed")
            expect_in("no luck", failed.error.message)


@check
def chat_completion() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("SAY hello there"))
    expect(answer.choices[0].message.content, "hello there ")


@check
def chat_completion_streamed() -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=user("SAY hello there"), stream=True)
    expect("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), "hello there ")


@check
def embeddings() -> None:
    answer = client.embeddings.create(model=EMBEDDING_MODEL, input=["camels", "dates"])
    expect([len(row.embedding) for row in answer.data], [DIMENSIONS, DIMENSIONS])


if __name__ == "__main__":
    main()
