"""python openai: Responses, Conversations, chat completions and embeddings."""

from __future__ import annotations

import json
from typing import Any

from checks import (
    CARAVAN_URL,
    DIMENSIONS,
    EMBEDDING_MODEL,
    MCP_URL,
    MODEL,
    check,
    expect,
    expect_in,
    main,
    model_requests,
    raises,
    unique,
    user,
    wait_until,
)
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{CARAVAN_URL}/v1", api_key="none", max_retries=0)

BOILING_POINT: Any = {
    "type": "function",
    "name": "get_boiling_point",
    "description": "Gives the boiling point",
    "parameters": {
        "type": "object",
        "properties": {"liquid_name": {"type": "string"}},
        "required": ["liquid_name"],
        "additionalProperties": False,
    },
    "strict": True,
}
MCP_TOOL: Any = {"type": "mcp", "server_label": "tests", "server_url": MCP_URL, "require_approval": "never"}
CALL = 'CALL get_boiling_point {"liquid_name":"polyjuice"}'


class Answer(BaseModel):
    answer: str


def respond(script: str, **more: Any) -> Any:
    return client.responses.create(model=MODEL, input=script, **more)


def stream_response(script: str, **more: Any) -> list[Any]:
    return list(client.responses.create(model=MODEL, input=script, stream=True, **more))


def messages_of(response: Any) -> list[dict[str, Any]]:
    """What the model was given, as it says itself when it is asked for its HISTORY."""
    return list(json.loads(response.output_text))


def ended(response_id: str) -> Any:
    found = client.responses.retrieve(response_id)
    return None if found.status in ("queued", "in_progress") else found


@check
def models() -> None:
    expect_in(MODEL, {model.id for model in client.models.list()})
    expect(client.models.retrieve(MODEL).id, MODEL)


@check
def response() -> None:
    answer = respond("SAY hello there", instructions="Be kind")
    expect((answer.status, answer.output_text), ("completed", "hello there "))
    expect(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens)


@check
def response_streamed() -> None:
    events = stream_response("SAY hello there world")
    kinds = [event.type for event in events]
    expect((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    expect([event.sequence_number for event in events], list(range(len(events))))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    expect("".join(deltas), "hello there world ")
    expect((events[-1].response.status, events[-1].response.output_text), ("completed", "hello there world "))


@check
def response_stream_helper() -> None:
    """`responses.stream` accumulates the events into a response by itself."""
    with client.responses.stream(model=MODEL, input="SAY hello there") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    expect((kinds[-1], final.output_text), ("response.completed", "hello there "))


@check
async def response_streamed_async() -> None:
    async with AsyncOpenAI(base_url=f"{CARAVAN_URL}/v1", api_key="none", max_retries=0) as asynchronous:
        stream = await asynchronous.responses.create(model=MODEL, input="SAY hello", stream=True)
        events: list[Any] = [event async for event in stream]
    expect(events[-1].response.output_text, "hello ")


@check
def unicode_text() -> None:
    expect_in("日本語 🐫🚐 ", stream_response("UNICODE")[-1].response.output_text)


@check
def previous_response_id() -> None:
    first = respond("SAY first")
    second = respond("HISTORY", previous_response_id=first.id)
    expect(second.previous_response_id, first.id)
    expect([message["role"] for message in messages_of(second)], ["user", "assistant", "user"])


@check
def conversation() -> None:
    made = client.conversations.create(metadata={"name": "check"}, items=[{"role": "user", "content": "before"}])
    expect(client.conversations.retrieve(made.id).metadata, {"name": "check"})
    answer = respond("SAY first", conversation=made.id)
    expect(answer.conversation.id, made.id)
    history = messages_of(respond("HISTORY", conversation={"id": made.id}))
    expect([message["role"] for message in history], ["user", "user", "assistant", "user"])
    expect(client.conversations.update(made.id, metadata={"name": "new"}).metadata, {"name": "new"})
    expect(client.conversations.delete(made.id).deleted, True)
    with raises(NotFoundError):
        client.conversations.retrieve(made.id)


@check
def conversation_items() -> None:
    made = client.conversations.create()
    note: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a note"}]}
    client.conversations.items.create(made.id, items=[note])
    respond("SAY first", conversation=made.id)
    items: list[Any] = list(client.conversations.items.list(made.id, order="asc", limit=2))  # in two pages
    expect([(item.type, item.role) for item in items], [("message", role) for role in ("user", "user", "assistant")])
    got: Any = client.conversations.items.retrieve(items[0].id, conversation_id=made.id)
    expect(got.content[0].text, "a note")


@check
def conversation_item_delete() -> None:
    made = client.conversations.create(items=[{"role": "user", "content": text} for text in ("one", "two")])
    items = list(client.conversations.items.list(made.id, order="asc"))
    expect(client.conversations.items.delete(items[0].id or "", conversation_id=made.id).id, made.id)
    expect([item.id for item in client.conversations.items.list(made.id)], [items[1].id])


@check
def function_tool() -> None:
    asked = respond(CALL, tools=[BOILING_POINT], parallel_tool_calls=False)
    call = asked.output[-1]
    expect((call.type, call.name), ("function_call", "get_boiling_point"))
    expect(json.loads(call.arguments), {"liquid_name": "polyjuice"})
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "-100"}
    answer = client.responses.create(model=MODEL, previous_response_id=asked.id, input=[output], tools=[BOILING_POINT])
    expect(answer.output_text, "The tool said: -100 ")


@check
def function_tool_without_store() -> None:
    """The whole history is sent each time, and nothing is kept."""
    asked = respond(CALL, tools=[BOILING_POINT], store=False)
    call = asked.output[-1]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "-100"}
    answer = client.responses.create(
        model=MODEL, input=[*user(CALL), *asked.output, output], tools=[BOILING_POINT], store=False
    )
    expect(answer.output_text, "The tool said: -100 ")
    with raises(NotFoundError):
        client.responses.retrieve(answer.id)


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
    expect([item.type for item in answer.output], ["mcp_list_tools", "mcp_call", "message"])
    expect((answer.output[1].name, answer.output[1].output), ("add", "5"))
    expect_in("5", answer.output_text)


@check
def mcp_streamed() -> None:
    events = stream_response('CALL add {"a":2,"b":3}', tools=[MCP_TOOL])
    expect_in("response.mcp_call.completed", [event.type for event in events])
    expect([event.sequence_number for event in events], list(range(len(events))))
    expect([item.type for item in events[-1].response.output], ["mcp_list_tools", "mcp_call", "message"])


@check
def structured_output() -> None:
    marker = unique("marker")
    parsed = client.responses.parse(model=MODEL, input=f'{marker}\nSAY {{"answer":"yes"}}', text_format=Answer)
    expect(parsed.output_parsed, Answer(answer="yes"))
    asked = model_requests(marker)[0]["response_format"]
    expect((asked["type"], asked["json_schema"]["schema"]["required"]), ("json_schema", ["answer"]))


@check
def metadata() -> None:
    answer = respond("SAY hello", metadata={"who": "check"})
    expect(answer.metadata, {"who": "check"})
    expect(client.responses.retrieve(answer.id).metadata, {"who": "check"})


@check
def sampling_parameters() -> None:
    marker = unique("marker")
    respond(f"{marker}\nSAY hello", temperature=0.5, top_p=0.25, max_output_tokens=64)
    asked = model_requests(marker)[0]
    expect((asked.get("temperature"), asked.get("top_p")), (0.5, 0.25))
    expect(asked.get("max_completion_tokens", asked.get("max_tokens")), 64)


@check
def retrieve_list_delete() -> None:
    answer = respond("SAY hello")
    expect(client.responses.retrieve(answer.id).output_text, "hello ")
    client.responses.delete(answer.id)
    with raises(NotFoundError):
        client.responses.retrieve(answer.id)


@check
def input_items() -> None:
    items: list[Any] = list(client.responses.input_items.list(respond("SAY hello").id))
    expect([(item.type, item.role) for item in items], [("message", "user")])
    expect(items[0].content[0].text, "SAY hello")


@check
def background() -> None:
    queued = respond("DELAY 300 | SAY hello", background=True)
    expect_in(queued.status, ("queued", "in_progress"))
    expect(queued.background, True)
    done = wait_until(lambda: ended(queued.id))
    expect((done.status, done.output_text), ("completed", "hello "))


@check
def background_stream_resumed() -> None:
    stream = client.responses.create(model=MODEL, input="CHUNKS 6 20", background=True, stream=True)
    seen: list[Any] = []
    for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            stream.close()
            break
    after = seen[-1].sequence_number
    rest: list[Any] = list(client.responses.retrieve(seen[0].response.id, stream=True, starting_after=after))
    numbers = [event.sequence_number for event in [*seen, *rest]]
    expect(numbers, list(range(len(numbers))))
    expect(rest[-1].response.output_text, "w0 w1 w2 w3 w4 w5 ")
    again = list(client.responses.retrieve(seen[0].response.id, stream=True, starting_after=after))
    expect([event.to_json() for event in again], [event.to_json() for event in rest])


@check
def background_cancel() -> None:
    queued = respond("PART begun | HANG", background=True)
    cancelled = client.responses.cancel(queued.id)
    expect(wait_until(lambda: ended(queued.id)).status, "cancelled")
    expect_in(cancelled.status, ("cancelled", "in_progress", "queued"))
    expect(client.responses.cancel(queued.id).status, "cancelled")


@check
def unknown_ids() -> None:
    with raises(NotFoundError):
        client.responses.retrieve("resp_00000000-0000-4000-8000-000000000000")
    with raises(NotFoundError):
        client.conversations.retrieve(f"conv_{'0' * 48}")
    for wrong in ({"previous_response_id": "resp_nothing"}, {"conversation": f"conv_{'0' * 48}"}):
        with raises(BadRequestError, NotFoundError) as caught:
            stream_response("SAY x", **wrong)
        expect(bool(caught[0].body["message"]), True)


@check
def bad_request() -> None:
    """An error of OpenAI's shape, which names the parameter."""
    with raises(BadRequestError) as caught:
        respond("SAY x", temperature="hot")
    expect((caught[0].param, caught[0].type), ("temperature", "invalid_request_error"))


@check
def model_error() -> None:
    for status in (400, 500):
        last = stream_response(f"PART one | ERR {status} no luck")[-1]
        expect((last.type, last.response.status), ("response.failed", "failed"))
        expect_in("no luck", last.response.error.message)
        expect(client.responses.retrieve(last.response.id).status, "failed")


@check
def model_error_without_stream() -> None:
    """An error of HTTP, which no SDK repeats by itself, or a failed response; it says why."""
    for status in (400, 500):
        try:
            failed = respond(f"ERR {status} no luck")
        except APIStatusError as error:
            expect_in(error.status_code, range(400, 500))
            expect_in("no luck", str(error))
        else:
            expect(failed.status, "failed")
            expect_in("no luck", failed.error.message)


@check
def chat_completion() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("SAY hello there"))
    expect(answer.choices[0].message.content, "hello there ")
    tool: Any = {
        "type": "function",
        "function": {"name": "get_boiling_point", "parameters": BOILING_POINT["parameters"]},
    }
    called: Any = client.chat.completions.create(model=MODEL, messages=user(CALL), tools=[tool])
    expect(called.choices[0].message.tool_calls[0].function.name, "get_boiling_point")


@check
def chat_completion_streamed() -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=user("SAY hello there"), stream=True, stream_options={"include_usage": True}
        )
    )
    expect("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), "hello there ")
    expect(chunks[-1].usage is not None, True)


@check
def embeddings() -> None:
    """The SDK asks for base64 by itself, and for floats when told to."""
    for more in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model=EMBEDDING_MODEL, input=["camels", "dates"], **more)
        expect([len(row.embedding) for row in answer.data], [DIMENSIONS, DIMENSIONS])


if __name__ == "__main__":
    main()
