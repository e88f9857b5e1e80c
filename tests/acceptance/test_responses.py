"""Responses through the openai SDK, unmodified: each is a turn of the same engine as an agent's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from app.domain.events import unpack
from tests.acceptance.conftest import Caravan
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import DIMENSIONS, ScriptedModel

pytestmark = pytest.mark.pools("turn-pool")
both_pools = pytest.mark.pools("turn-pool", "prefork")

Sdk = Any
"""openai.OpenAI: its unions of items and events are no subject of these tests."""

MODEL = "scripted"
FUNCTION: Any = {
    "type": "function",
    "name": "temperature",
    "description": "How warm it is",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture
def sdk(caravan: Caravan) -> Iterator[Sdk]:
    with OpenAI(base_url=f"{caravan.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response_whole(sdk: Sdk, model: ScriptedModel) -> None:
    """Not streamed: the answer is the whole response, and GET gives the same."""
    response = sdk.responses.create(model=MODEL, input="SAY hello world", instructions="Be brief.")
    assert response.status == "completed"
    assert response.output_text == "hello world "
    assert response.usage is not None
    assert response.usage.output_tokens == 2
    assert sdk.responses.retrieve(response.id) == response


@both_pools
def test_a_response_streamed(sdk: Sdk, model: ScriptedModel) -> None:
    """OpenAI's events in OpenAI's order, numbered from 0 without a gap; the replay is the same."""
    seen = list(sdk.responses.create(model=MODEL, input="SAY hello world", stream=True))
    assert [event.type.removeprefix("response.") for event in seen] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].response.output_text == "hello world "
    assert list(sdk.responses.retrieve(seen[0].response.id, stream=True)) == seen


def test_the_stream_helper(sdk: Sdk, model: ScriptedModel) -> None:
    """The SDK's own accumulator of events comes to the same response."""
    with sdk.responses.stream(
        model=MODEL, input='PART I will ask. | CALL temperature {"city": "Athens"}', tools=[FUNCTION]
    ) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.output[1].arguments == '{"city": "Athens"}'


def test_a_function_of_the_clients(sdk: Sdk, model: ScriptedModel) -> None:
    """The response ends with the calls; the next one brings their outputs, and the model sees both."""
    script = 'CALL temperature {"city": "Athens"} & CALL temperature {"city": "Oslo"} | HISTORY'
    asked = sdk.responses.create(model=MODEL, input=script, tools=[FUNCTION])
    assert [item.type for item in asked.output] == ["function_call", "function_call"]
    calls: Any = asked.output
    outputs: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": str(degrees)}
        for call, degrees in zip(calls, (30, 5), strict=True)
    ]
    answer = sdk.responses.create(model=MODEL, input=outputs, previous_response_id=asked.id, tools=[FUNCTION])
    told = json.loads(answer.output_text)
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in told[1]["tool_calls"]] == ["temperature", "temperature"]
    assert [message["content"] for message in told[2:]] == ["30", "5"]
    assert answer.previous_response_id == asked.id


def test_a_chain_goes_on(sdk: Sdk, model: ScriptedModel) -> None:
    """Each response has all that its predecessors were given and said; instructions are not handed down."""
    first = sdk.responses.create(model=MODEL, input="SAY one", instructions="Be brief.")
    second = sdk.responses.create(model=MODEL, input="SAY two", previous_response_id=first.id)
    third = sdk.responses.create(model=MODEL, input="HISTORY", previous_response_id=second.id)
    told = [(message["role"], _text(message["content"])) for message in json.loads(third.output_text)]
    assert told == [
        ("user", "SAY one"),
        ("assistant", "one "),
        ("user", "SAY two"),
        ("assistant", "two "),
        ("user", "HISTORY"),
    ]
    items = list(sdk.responses.input_items.list(third.id, order="asc"))
    assert [item.type for item in items] == ["message"] * 5
    page = sdk.responses.input_items.list(third.id, limit=2)
    assert [item.id for item in page.data] == [items[4].id, items[3].id]
    assert page.has_more
    assert len(list(sdk.responses.input_items.list(third.id, limit=2))) == 5


def test_a_deleted_response_is_still_what_a_later_one_goes_on_from(
    sdk: Sdk, caravan: Caravan, model: ScriptedModel
) -> None:
    first = sdk.responses.create(model=MODEL, input="SAY one")
    second = sdk.responses.create(model=MODEL, input="SAY two", previous_response_id=first.id)
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="not found"):
        sdk.responses.create(model=MODEL, input="SAY more", previous_response_id=first.id)
    third = sdk.responses.create(model=MODEL, input="HISTORY", previous_response_id=second.id)
    assert len(json.loads(third.output_text)) == 5


def test_a_conversation_grows(sdk: Sdk, model: ScriptedModel) -> None:
    """Input and output are added to it once the response has ended; one that fails adds nothing."""
    conversation = sdk.conversations.create(metadata={"topic": "tests"})
    sdk.responses.create(model=MODEL, input="SAY one", conversation=conversation.id)
    with pytest.raises(openai.APIStatusError):
        sdk.responses.create(model=MODEL, input="ERR 400", conversation=conversation.id)
    answer = sdk.responses.create(model=MODEL, input="HISTORY", conversation={"id": conversation.id})
    assert [message["role"] for message in json.loads(answer.output_text)] == ["user", "assistant", "user"]
    items: Any = sdk.conversations.items.list(conversation.id, order="asc").data
    assert [(item.role, item.content[0].text) for item in items][:3] == [
        ("user", "SAY one"),
        ("assistant", "one "),
        ("user", "HISTORY"),
    ]
    assert answer.conversation is not None
    assert answer.conversation.id == conversation.id


@both_pools
def test_mcp_tools(sdk: Sdk, model: ScriptedModel) -> None:
    """The server's tools are listed and called by the worker, in OpenAI's events; the next response knows of it."""
    with McpServer() as mcp:
        tool: Any = {"type": "mcp", "server_label": "calc", "server_url": mcp.url, "allowed_tools": ["add", "fail"]}
        script = 'CALL add {"a": 1, "b": 2} | CALL fail {"message": "no"} | TOOLS'
        seen = list(sdk.responses.create(model=MODEL, input=script, tools=[tool], stream=True))
        types = [event.type.removeprefix("response.") for event in seen]
        assert types[2:5] == ["output_item.added", "mcp_list_tools.in_progress", "mcp_list_tools.completed"]
        assert "mcp_call_arguments.delta" in types
        assert [each for each in types if each.startswith("mcp_call.")] == [
            "mcp_call.in_progress",
            "mcp_call.completed",
            "mcp_call.in_progress",
            "mcp_call.failed",
        ]
        final: Any = seen[-1]
        output = final.response.output
        assert [item.type for item in output] == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
        assert output[1].output == "3"
        assert "no" in output[2].error.content[0]["text"]
        assert sdk.responses.retrieve(final.response.id).to_dict(warnings="error") == final.response.to_dict()
        llama = {"x-llamastack-client-version": "0.3.5"}  # which reads a text
        assert "no" in sdk.responses.retrieve(final.response.id, extra_headers=llama).output[2].error
        assert final.response.output_text == "add,fail"
        after = sdk.responses.create(model=MODEL, input="HISTORY", previous_response_id=final.response.id)
        told = json.loads(after.output_text)
        assert [message["role"] for message in told] == [
            "user",
            "assistant",
            "tool",
            "assistant",
            "tool",
            "assistant",
            "user",
        ]
        keys = [call["_meta"]["caravan/idempotencyKey"] for call in mcp.calls()]
        assert len(set(keys)) == 2


def test_an_mcp_call_that_needs_approval(sdk: Sdk, model: ScriptedModel) -> None:
    """It is asked for, and made by the next response if that approves it; else the model hears of the refusal."""
    with McpServer() as mcp:
        tool: Any = {
            "type": "mcp",
            "server_label": "calc",
            "server_url": mcp.url,
            "require_approval": {"always": {"tool_names": ["count"]}},
        }
        asked: Any = sdk.responses.create(model=MODEL, input='CALL count {"key": "k"}', tools=[tool])
        request = asked.output[-1]
        assert request.type == "mcp_approval_request"
        assert mcp.counts() == {}
        yes: Any = [{"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}]
        made: Any = sdk.responses.create(model=MODEL, input=yes, previous_response_id=asked.id, tools=[tool])
        assert mcp.counts() == {"k": 1}
        assert [item.type for item in made.output] == ["mcp_list_tools", "mcp_call", "message"]
        assert made.output_text == "The tool said: 1 "
        no: Any = [
            {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": False, "reason": "Why?"}
        ]
        denied = sdk.responses.create(model=MODEL, input=no, previous_response_id=asked.id, tools=[tool])
        assert mcp.counts() == {"k": 1}
        assert "not approved" in denied.output_text
        assert "Why?" in denied.output_text


def test_an_mcp_server_that_is_down(sdk: Sdk, model: ScriptedModel) -> None:
    tool: Any = {"type": "mcp", "server_label": "gone", "server_url": "http://127.0.0.1:1/mcp"}
    with pytest.raises(openai.BadRequestError, match="MCP server gone cannot be used"):
        sdk.responses.create(model=MODEL, input="SAY hi", tools=[tool])


def test_what_the_model_is_asked(sdk: Sdk, model: ScriptedModel) -> None:
    """Each parameter reaches the model server, in its spelling, and is told again with the response."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    response = sdk.responses.create(
        model=MODEL,
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "SAY hi"}]},
        ],
        tools=[FUNCTION],
        tool_choice={"type": "function", "name": "temperature"},
        parallel_tool_calls=False,
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        reasoning={"effort": "low"},
        text={
            "format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True},
            "verbosity": "low",
        },
        user="alice",
        metadata={"team": "tests"},
    )
    asked = model.requests()[-1]["body"]
    assert asked["messages"][0] == {"role": "developer", "content": "Be kind."}
    assert asked["tool_choice"] == {"type": "function", "function": {"name": "temperature"}}
    assert asked["parallel_tool_calls"] is False
    assert (asked["max_tokens"], asked["temperature"], asked["top_p"]) == (50, 0.5, 0.9)
    assert asked["reasoning_effort"] == "low"
    assert asked["response_format"]["json_schema"]["schema"] == schema
    assert asked["user"] == "alice"
    assert response.metadata == {"team": "tests"}
    assert response.max_output_tokens == 50
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search", "user_location": {"type": "approximate"}}]}, "tools[0].user_location"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": None}, "input"),
        ({"background": True, "store": False}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"guardrails": ["llama-guard"]}, "guardrails"),
        ({"no_such_thing": 1}, "no_such_thing"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"model": ""}, "model"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    sdk: Sdk, model: ScriptedModel, fields: dict[str, Any], param: str
) -> None:
    """In OpenAI's shape, and before anything is stored."""
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.post("/responses", body={"model": MODEL, "input": "SAY hi", **fields}, cast_to=object)
    error: Any = refused.value.body
    assert error["param"] == param
    assert error["message"]


def test_the_model_fails(sdk: Sdk, model: ScriptedModel) -> None:
    """Streamed, the response ends as failed. Whole, it is an error of the model's own status that no SDK repeats."""
    *_, last = sdk.responses.create(model=MODEL, input="PART half | ERR 500 broken", stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "broken" in last.response.error.message
    assert sdk.responses.retrieve(last.response.id).status == "failed"
    with pytest.raises(openai.APIStatusError) as failed:
        sdk.responses.create(model=MODEL, input="ERR 400 bad words")
    assert failed.value.status_code == 400
    assert "bad words" in str(failed.value)
    with pytest.raises(openai.APIStatusError) as failed:
        sdk.responses.create(model=MODEL, input="ERR 500 broken")
    assert failed.value.status_code == 424


def test_tokens_or_iterations_run_out(sdk: Sdk, model: ScriptedModel) -> None:
    cut = sdk.responses.create(model=MODEL, input="LENGTH one two")
    assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with McpServer() as mcp:
        tool: Any = {"type": "mcp", "server_label": "calc", "server_url": mcp.url}
        script = 'CALL add {"a": 1, "b": 2} | CALL add {"a": 2, "b": 2} | SAY done'
        often = sdk.responses.create(model=MODEL, input=script, tools=[tool], extra_body={"max_infer_iters": 1})
        assert often.status == "incomplete"
        assert len(mcp.calls()) == 1
        limited: Any = sdk.responses.create(model=MODEL, input=script, tools=[tool], max_tool_calls=1)
        assert limited.status == "completed"
        assert len(mcp.calls()) == 2
        assert "max_tool_calls" in limited.output[2].error.content[0]["text"]


@both_pools
def test_in_the_background(sdk: Sdk, caravan: Caravan, model: ScriptedModel) -> None:
    """Answered at once, followed by GET, resumed from any event on its way, and cancelled, twice."""
    queued = sdk.responses.create(model=MODEL, input="PART one two | HOLD gate | SAY three", background=True)
    assert queued.status == "queued"
    assert queued.background
    model.wait_held("gate")
    assert sdk.responses.retrieve(queued.id).status == "in_progress"
    model.release("gate")
    seen = list(sdk.responses.retrieve(queued.id, stream=True))
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert seen[-1].type == "response.completed"
    for after in (0, 3, len(seen) - 2):
        rest = list(sdk.responses.retrieve(queued.id, stream=True, starting_after=after))
        assert rest == seen[after + 1 :]
    with pytest.raises(openai.BadRequestError, match="starting_after"):
        sdk.responses.retrieve(queued.id, stream=True, starting_after=len(seen))

    stream = sdk.responses.create(model=MODEL, input="PART more | HANG", background=True, stream=True)
    first = next(stream)
    assert first.type == "response.created"
    sdk.responses.cancel(first.response.id)
    wait_until(lambda: sdk.responses.retrieve(first.response.id).status == "cancelled")  # at once, or a moment later
    assert sdk.responses.cancel(first.response.id).status == "cancelled"
    *_, last = stream
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    assert sdk.responses.cancel(queued.id).status == "completed"


def test_what_is_not_stored_is_shown_to_nobody(sdk: Sdk, model: ScriptedModel) -> None:
    response = sdk.responses.create(model=MODEL, input="SAY secret", store=False)
    assert response.output_text == "secret "
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError):
        sdk.responses.create(model=MODEL, input="SAY more", previous_response_id=response.id)


def test_asked_twice(caravan: Caravan, model: ScriptedModel) -> None:
    """An Idempotency-Key, or a retry that an SDK announces, leads to the response that is there."""
    with httpx.Client(base_url=caravan.url, timeout=30) as http:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        body = {"model": MODEL, "input": f"SAY once {uuid.uuid4().hex}"}
        given = [http.post("/v1/responses", json=body, headers=key).json()["id"] for _ in "ab"]
        assert given[0] == given[1]
        again = http.post("/v1/responses", json=body, headers={"x-stainless-retry-count": "1"}).json()["id"]
        assert again == given[0]
        assert http.post("/v1/responses", json=body).json()["id"] != given[0]
        other = {"model": MODEL, "input": "SAY other"}
        assert http.post("/v1/responses", json=other, headers=key).status_code == 422


def test_lists(sdk: Sdk, caravan: Caravan, model: ScriptedModel) -> None:
    """Newest first, with their input, in pages, of one model if asked."""
    made = [sdk.responses.create(model="second-model", input=f"SAY {word}").id for word in ("a", "b", "c")]
    with httpx.Client(base_url=f"{caravan.url}/v1", timeout=60) as http:
        page = http.get("/responses", params={"model": "second-model", "limit": 2}).json()
        assert [row["id"] for row in page["data"]] == made[:0:-1]
        assert page["data"][0]["input"][0]["content"][0]["text"] == "SAY c"
        assert page["has_more"]
        more = http.get("/responses", params={"model": "second-model", "after": page["last_id"], "limit": 1}).json()
        assert [row["id"] for row in more["data"]] == made[:1]
        assert http.get("/responses", params={"after": "resp_0"}).status_code == 404


def test_secrets_for_an_mcp_server_reach_it_and_nobody_else(sdk: Sdk, caravan: Caravan, model: ScriptedModel) -> None:
    """Sealed while the response runs, gone when it has ended, and told to nobody: neither the model nor the client."""
    secret = f"secret-{uuid.uuid4().hex}"
    with McpServer() as mcp:
        tool: Any = {"type": "mcp", "server_label": "calc", "server_url": mcp.url, "authorization": secret}
        script = 'CALL look {"key": "k", "hold": "gate"} | SAY done'
        running = sdk.responses.create(model=MODEL, input=script, tools=[tool], background=True)
        mcp.wait_held("gate")
        rows = _stored(caravan, running.id)
        assert rows["turns"][0]["sealed"]
        assert secret not in str(rows)
        mcp.release("gate")
        *_, last = sdk.responses.retrieve(running.id, stream=True)
        assert last.response.status == "completed"
        assert [call["authorization"] for call in mcp.calls()] == [f"Bearer {secret}"]
    rows = _stored(caravan, running.id)
    assert rows["turns"][0]["sealed"] is None
    assert secret not in str(rows)
    assert secret not in last.model_dump_json()
    assert secret not in str(model.requests())


def _stored(caravan: Caravan, response_id: str) -> dict[str, list[dict[str, Any]]]:
    """All that Postgres has of a response."""
    url = make_url(caravan.env["DATABASE_URL"]).set(drivername="postgresql+psycopg2")
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        found = {}
        for table in ("turns", "journal", "tool_calls", "event_segments"):
            query = text(f"SELECT * FROM {table} WHERE turn_id = :id")
            rows = connection.execute(query, {"id": response_id.removeprefix("resp_")})
            found[table] = [dict(row._mapping) for row in rows]
    for row in found["event_segments"]:
        row["events"] = unpack(bytes(row["events"]))
    for row in found["turns"]:
        row["sealed"] = bytes(row["sealed"]) if row["sealed"] else None
    return found


def test_file_search(sdk: Sdk, caravan: Caravan, model: ScriptedModel) -> None:
    """The user's files are searched by the worker; what is found goes to the model, and into the item if asked for."""
    with httpx.Client(base_url=f"{caravan.url}/v1", timeout=60) as http:
        new = {"model_id": "embed", "model_type": "embedding", "provider_id": "model-server"}
        http.post("/models", json={**new, "metadata": {"embedding_dimension": DIMENSIONS}})
        fields = {"name": "s", "embedding_model": "embed", "embedding_dimension": DIMENSIONS}
        store = http.post("/vector_stores", json=fields).raise_for_status().json()["id"]
        sent = {"file": ("camels.txt", b"camels drink water")}
        file_id = http.post("/files", files=sent, data={"purpose": "assistants"}).raise_for_status().json()["id"]
        http.post(f"/vector_stores/{store}/files", json={"file_id": file_id}).raise_for_status()
    tool: Any = {"type": "file_search", "vector_store_ids": [store]}
    script = f'CALL knowledge_search {{"query": "camels"}} | SAY They drink <|{file_id}|>. | HISTORY'
    seen = list(
        sdk.responses.create(model=MODEL, input=script, tools=[tool], stream=True, include=["file_search_call.results"])
    )
    types = [event.type.removeprefix("response.") for event in seen]
    assert [each for each in types if each.startswith("file_search")] == [
        "file_search_call.in_progress",
        "file_search_call.searching",
        "file_search_call.completed",
    ]
    search, message = seen[-1].response.output
    assert (search.status, search.queries) == ("completed", ["camels"]), message
    assert [(found.file_id, found.text) for found in search.results] == [(file_id, "camels drink water")]
    assert [note.file_id for note in message.content[0].annotations] == [file_id]
    assert file_id not in message.content[0].text
    answer = sdk.responses.create(model=MODEL, input="HISTORY", previous_response_id=seen[-1].response.id)
    tool_messages = [each for each in json.loads(answer.output_text) if each["role"] == "tool"]
    assert "camels drink water" in tool_messages[0]["content"]


def test_a_tool_that_fails_is_told_to_the_model(sdk: Sdk, model: ScriptedModel) -> None:
    """A store that is not there, a web search without a key: the model hears of it, and answers."""
    tools: Any = [{"type": "file_search", "vector_store_ids": ["vs_none"]}, {"type": "web_search"}]
    script = 'CALL knowledge_search {"query": "a"} & CALL web_search {"query": "b"} | HISTORY'
    response = sdk.responses.create(model=MODEL, input=script, tools=tools)
    assert [(item.type, item.status) for item in response.output] == [
        ("file_search_call", "failed"),
        ("web_search_call", "failed"),
        ("message", "completed"),
    ]
    told = [each["content"] for each in json.loads(response.output_text) if each["role"] == "tool"]
    assert "vs_none" in told[0]
    assert "set TAVILY_SEARCH_API_KEY" in told[1]


def test_approvals_are_answered_once(sdk: Sdk, model: ScriptedModel) -> None:
    """Beside a call that is made at once and one of the client's; in a conversation too. An approval that was given
    before, of another response or of a server that is not there, is refused, and the call is not made again."""
    with McpServer() as mcp:
        tool: Any = {
            "type": "mcp",
            "server_label": "calc",
            "server_url": mcp.url,
            "require_approval": {"always": {"tool_names": ["count"]}},
        }
        tools: Any = [tool, FUNCTION]
        script = (
            'PART Wait. | CALL count {"key": "k"} & CALL add {"a": 1, "b": 2} & CALL temperature {} & '
            'CALL count {"key": "l"}'
        )
        with sdk.responses.stream(model=MODEL, input=script, tools=tools) as stream:
            asked = stream.get_final_response()
        kinds = ["mcp_list_tools", "message", "mcp_call", "function_call", *["mcp_approval_request"] * 2]
        assert [item.type for item in asked.output] == kinds
        function, first, second = asked.output[-3:]
        given = [_answer(second, True), _output(function), _answer(first, False)]
        answered = sdk.responses.create(model=MODEL, input=given, previous_response_id=asked.id, tools=tools)
        assert mcp.counts() == {"l": 1}
        told = json.loads(
            sdk.responses.create(model=MODEL, input="HISTORY", previous_response_id=answered.id).output_text
        )
        roles = ["user", "assistant", *["tool"] * 3, "assistant", "tool", "assistant", "user"]
        assert [message["role"] for message in told] == roles
        assert [len(message["tool_calls"]) for message in told if "tool_calls" in message] == [3, 1]

        for previous, approved, offered in (
            (answered.id, second, tools),
            (sdk.responses.create(model=MODEL, input="SAY x").id, second, tools),
            (asked.id, second, [{**tool, "server_label": "other"}]),
        ):
            with pytest.raises(openai.BadRequestError, match=r"Approval request|whose call the input approves"):
                sdk.responses.create(
                    model=MODEL, input=[_answer(approved, True)], previous_response_id=previous, tools=offered
                )
        assert mcp.counts() == {"l": 1}

        talk = sdk.conversations.create().id
        asked = sdk.responses.create(model=MODEL, input='CALL count {"key": "t"}', conversation=talk, tools=[tool])
        yes = [_answer(asked.output[-1], True)]
        answered = sdk.responses.create(model=MODEL, input=yes, conversation=talk, tools=[tool])
        assert answered.output_text == "The tool said: 1 "
        with pytest.raises(openai.BadRequestError, match="was answered before"):
            sdk.responses.create(model=MODEL, input=yes, conversation=talk, tools=[tool])
        assert mcp.counts() == {"l": 1, "t": 1}


def _answer(request: Any, approve: bool) -> dict[str, Any]:
    return {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": approve}


def _output(call: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call.call_id, "output": "5"}


def test_a_client_that_keeps_its_own_history(sdk: Sdk, model: ScriptedModel) -> None:
    """Output items can be given as input as they came; ids that the model uses twice are each answered."""
    history: list[Any] = []
    for question in ("CALLID same temperature {}", "CALLID same temperature {}"):
        history.append({"role": "user", "content": question})
        response = sdk.responses.create(model=MODEL, input=history, tools=[FUNCTION], store=False)
        history += [*(item.to_dict() for item in response.output), _output(response.output[-1])]
    history.append({"role": "user", "content": "HISTORY"})
    told = json.loads(sdk.responses.create(model=MODEL, input=history, store=False).output_text)
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "user", "assistant", "tool", "user"]
    assert [message["content"] for message in told if message["role"] == "tool"] == ["5", "5"]


def test_a_tool_that_must_be_called_is_called_once(sdk: Sdk, model: ScriptedModel) -> None:
    """Or there would be no answer."""
    with McpServer() as mcp:
        tool: Any = {"type": "mcp", "server_label": "calc", "server_url": mcp.url}
        choice: Any = {"type": "mcp", "server_label": "calc", "name": "add"}
        sdk.responses.create(model=MODEL, input='CALL add {"a": 1, "b": 2} | SAY 3', tools=[tool], tool_choice=choice)
    forced = {"type": "function", "function": {"name": "add"}}
    assert [asked["body"]["tool_choice"] for asked in model.requests()] == [forced, "auto"]


def test_responses_of_a_conversation_run_in_order_and_end_with_it(sdk: Sdk, model: ScriptedModel) -> None:
    """One that is cancelled while it waits adds nothing, and the next one goes on; deleting ends what runs there."""
    talk = sdk.conversations.create().id
    scripts = ("PART one | HOLD first | SAY two", "SAY never", "HISTORY", "PART more | HANG")
    first, second, third, last = (
        sdk.responses.create(model=MODEL, input=script, conversation=talk, background=True) for script in scripts
    )
    model.wait_held("first")
    assert sdk.responses.retrieve(third.id).status == "queued"
    assert sdk.responses.cancel(second.id).status == "cancelled"
    model.release("first")
    told = list(sdk.responses.retrieve(third.id, stream=True))[-1].response.output_text
    assert [message["role"] for message in json.loads(told)] == ["user", "assistant", "user"]
    assert sdk.responses.retrieve(first.id).output_text == "one two "
    stream = sdk.responses.retrieve(last.id, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    sdk.conversations.delete(talk)
    *_, end = stream
    assert (end.type, end.response.status) == ("response.failed", "cancelled")
    for gone in (first, last):
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(gone.id)


def test_texts_that_are_hard_to_keep(caravan: Caravan, model: ScriptedModel) -> None:
    """U+0000 anywhere is kept; what is no text, no JSON or too deep is refused by its name. Never an error of ours."""
    nul = "a\0b"
    function = {**FUNCTION, "description": nul, "parameters": {"type": "object", "properties": {nul: {}}}}
    image = {"type": "input_image", "image_url": f"data:{nul}"}
    deep: Any = {}
    for _ in range(400):
        deep = {"a": deep}
    good: list[dict[str, Any]] = [
        {"input": f"SAY {nul} \U0001f42b"},
        {"instructions": nul, "metadata": {nul: nul}, "user": nul, "tools": [function], "tool_choice": "auto"},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "SAY x"}, image]}]},
        {"input": [{"type": "function_call", "call_id": nul, "name": "f", "arguments": nul}]},
        {"input": "SAY x\n" + " word" * 200_000},
    ]
    bad: list[dict[str, Any]] = [
        {"model": nul},
        {"input": "\ud800"},
        {"instructions": "\udfff"},
        {"input": [{"role": "user", "content": "x", "more": deep}]},
        {"tools": [{**FUNCTION, "parameters": deep}]},
        {"previous_response_id": f"resp_{nul}"},
        {"input": [{"role": "system", "content": [image]}]},
        {"input": [{"type": "function_call_output", "call_id": nul, "output": nul}]},
    ]
    with httpx.Client(base_url=f"{caravan.url}/v1", timeout=60) as http:

        def post(fields: dict[str, Any]) -> httpx.Response:
            body = json.dumps({"model": MODEL, "input": "SAY hi", **fields})
            return http.post("/responses", content=body, headers={"content-type": "application/json"})

        for fields in good:
            answer = post(fields)
            assert answer.status_code == 200, answer.text[:500]
            made = answer.json()
            assert http.get(f"/responses/{made['id']}").json() == made
            assert http.get(f"/responses/{made['id']}/input_items").status_code == 200
        for fields in bad:
            answer = post(fields)
            assert answer.status_code == 400, (fields, answer.text[:500])
            assert answer.json()["error"]["message"]
        assert post({"conversation": f"conv_{nul}"}).status_code == 404
        assert post({"input": "x" * 11_000_000}).status_code == 413


def test_what_a_get_may_ask(sdk: Sdk, caravan: Caravan, model: ScriptedModel) -> None:
    """A place in the stream, which is one of a stream; nothing else is dropped. OpenAI's other routes are not there."""
    made = sdk.responses.create(model=MODEL, input="SAY hi").id
    with httpx.Client(base_url=f"{caravan.url}/v1", timeout=60) as http:
        for query in (
            "starting_after=0",
            "stream=true&starting_after=-1",
            "stream=true&starting_after=x",
            "stream=true&starting_after=99",
            "stream=true&include_obfuscation=true",
            "include[]=web_search_call.action.sources",
            "include=message.output_text.logprobs",
        ):
            answer = http.get(f"/responses/{made}?{query}")
            assert answer.status_code == 400, query
            assert answer.json()["error"]["param"], query
        ids = (made.removeprefix("resp_"), "resp_", "resp_x", f"resp_{uuid.uuid4()}", "resp_%00")
        assert {http.get(f"/responses/{each}").status_code for each in ids} == {404}
        for route in ("compact", "input_tokens"):
            answer = http.post(f"/responses/{route}", json={"model": MODEL, "input": "hi"})
            assert answer.status_code in (404, 405)
            assert answer.json()["error"]["message"]
    assert sdk.responses.retrieve(made, include=["file_search_call.results"]).id == made


def test_an_operator_sees_and_follows_responses(sdk: Sdk, caravan: Caravan, model: ScriptedModel) -> None:
    """`caravan turns` knows a response by its own id."""
    response = sdk.responses.create(model=MODEL, input="SAY hello world")

    def turns(*arguments: str) -> str:
        command = [sys.executable, "-c", "from app.cli import main; main()", "turns", *arguments]
        return subprocess.run(command, env=os.environ | caravan.env, capture_output=True, text=True, check=True).stdout

    assert response.id.removeprefix("resp_") in turns("list")
    shown = json.loads(turns("show", response.id))
    assert (shown["response_id"], shown["status"]) == (response.id, "completed")
    assert turns("follow", response.id, "--url", caravan.url) == "hello world \n"


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
