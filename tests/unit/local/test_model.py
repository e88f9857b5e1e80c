"""The small local model: the real one, behind its front."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from openai import APIStatusError, OpenAI

from app.local.model import MODEL_ID, Model
from tests.support import wait_until
from tests.unit.local.test_constrained import CALLED, QUESTION, RESULT, SCHEMAS, TOOLS, tool

JSON = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tmp_path_factory.mktemp("model")) as running:
        yield running


@pytest.fixture
def client(server: Model) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as sdk:
        yield sdk


def complete(client: OpenAI, *messages: JSON, **fields: Any) -> Any:
    """The first choice."""
    given: Any = {"model": MODEL_ID, "messages": [*messages], "tools": TOOLS, "temperature": 0, **fields}
    answer = client.chat.completions.create(**given)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    return answer.choices[0]


def test_a_demanded_call_is_always_valid(client: OpenAI) -> None:
    """Of each tool that can be offered, also one whose schema no grammar has; several requests at once."""

    def call(number: int) -> None:
        schema = SCHEMAS[number][0]
        choice = complete(
            client,
            QUESTION,
            tools=[tool(f"tool_{number}", schema)],
            tool_choice="required",
            temperature=1,
            max_tokens=100,
        )
        (made,) = choice.message.tool_calls
        assert (choice.finish_reason, made.function.name) == ("tool_calls", f"tool_{number}")
        assert choice.message.content is None
        assert isinstance(json.loads(made.function.arguments), dict)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(len(SCHEMAS))))


def test_a_named_tool_is_the_one_that_is_called(client: OpenAI) -> None:
    choice = complete(
        client, QUESTION, tool_choice={"type": "function", "function": {"name": "search"}}, max_tokens=200
    )
    (made,) = choice.message.tool_calls
    jsonschema.validate(json.loads(made.function.arguments), TOOLS[0]["function"]["parameters"])
    assert made.function.name == "search"
    assert made.id


def test_a_call_streams_as_openais_do(client: OpenAI) -> None:
    given: Any = {
        "model": MODEL_ID,
        "messages": [QUESTION],
        "tools": TOOLS,
        "tool_choice": "required",
        "temperature": 0,
    }
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert not any(delta.content for delta in deltas)
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert call.function is not None
    assert json.loads(call.function.arguments or "") is not None
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage is not None


def test_after_a_result_it_answers(client: OpenAI) -> None:
    choice = complete(client, QUESTION, CALLED, RESULT, tool_choice="required", max_tokens=20)
    assert choice.message.content
    assert not choice.message.tool_calls


def test_tools_that_are_not_to_be_called_are_not(client: OpenAI) -> None:
    given: Any = {
        "model": MODEL_ID,
        "messages": [QUESTION],
        "tools": TOOLS,
        "tool_choice": "none",
        "max_tokens": 20,
        "temperature": 0,
    }
    deltas = [
        choice.delta for chunk in client.chat.completions.create(**given, stream=True) for choice in chunk.choices
    ]
    assert sum(bool(delta.content) for delta in deltas) > 5, "token by token"
    assert not any(delta.tool_calls for delta in deltas)


def test_an_answer_streams_as_it_comes(client: OpenAI) -> None:
    """Its text, not its JSON. (The model likes to call; a bias for the word makes it answer.)"""
    bias = [[token, 100] for token in _tokens(client, "answer")]
    given: Any = {"model": MODEL_ID, "messages": [QUESTION], "tools": TOOLS, "max_tokens": 20, "temperature": 0}
    stream = client.chat.completions.create(**given, extra_body={"logit_bias": bias}, stream=True)
    deltas = [choice.delta for chunk in stream for choice in chunk.choices]
    said = [delta.content for delta in deltas if delta.content]
    assert len(said) > 2
    assert "{" not in said[0]
    assert not any(delta.tool_calls for delta in deltas)


def _tokens(client: OpenAI, word: str) -> list[int]:
    url = str(client.base_url).removesuffix("/v1/")
    tokens: list[int] = httpx.post(f"{url}/tokenize", json={"content": word}, timeout=60).json()["tokens"]
    return tokens


def test_a_response_format_passes(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    choice = complete(client, QUESTION, response_format=wanted, max_tokens=60)
    jsonschema.validate(json.loads(choice.message.content), schema)


def test_a_wrong_request_has_the_model_servers_error(client: OpenAI) -> None:
    for wrong in ({"messages": "none"}, {"messages": [1]}, {"messages": [{"role": "assistant", "tool_calls": [1]}]}):
        with pytest.raises(APIStatusError):
            complete(client, **wrong)


def test_all_else_passes(server: Model, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    text = client.completions.create(model=MODEL_ID, prompt="Once upon", max_tokens=4)
    assert text.choices[0].text
    assert httpx.get(f"{server.url}/nowhere", timeout=60).status_code == 404


def test_who_leaves_ends_the_generation(server: Model) -> None:
    """Else the next one would wait for a place. (Without a stream, llama.cpp itself does not always notice.)"""
    root = server.url.removesuffix("/v1")
    body = {"messages": [QUESTION], "max_tokens": 4000}
    _leave(f"{server.url}/chat/completions", {**body, "ignore_eos": True, "stream": True})
    wait_until(lambda: not _is_busy(root))
    slow = [tool("tell", {"type": "object", "properties": {name: {"type": "string"} for name in "abcdefgh"}})]
    _leave(f"{server.url}/chat/completions", {**body, "tools": slow, "tool_choice": "required", "repeat_penalty": 0.5})
    wait_until(lambda: not _is_busy(root))


def _leave(url: str, body: JSON) -> None:
    """When the model has begun."""
    with (
        httpx.Client() as client,
        pytest.raises(httpx.ReadTimeout),
        client.stream("POST", url, json=body, timeout=httpx.Timeout(60, read=0.5)),
    ):
        raise httpx.ReadTimeout("the head of a stream is there")


def _is_busy(root: str) -> bool:
    return any(slot["is_processing"] for slot in httpx.get(f"{root}/slots", timeout=60).json())
