"""Chat completions, completions and embeddings through the web process, by the SDKs that people use. No worker runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from llama_stack_client import AsyncLlamaStackClient, LlamaStackClient
from pydantic import BaseModel

from tests.support import wait_until
from tests.support.nodes import web_process
from tests.support.scripted_model import DIMENSIONS, UNICODE_PIECES, ScriptedModel
from tests.support.wire import Wire

CHAT = "/v1/chat/completions"
REQUEST_MAX_BYTES = 100_000


@pytest.fixture(scope="module")
def url(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    own = {
        "DATABASE_URL": migrated_database("caravan_inference"),
        "PING_SECONDS": "0.5",
        "REQUEST_MAX_BYTES": str(REQUEST_MAX_BYTES),
        "INFERENCE_API_KEY": "the-servers-own",
    }
    address, web = web_process({**environment, **own}, tmp_path_factory.mktemp("inference") / "web.log")
    with web:
        embedding = {"model_type": "embedding", "metadata": {"embedding_dimension": DIMENSIONS}}
        body = {"model_id": "embed", "provider_id": "model-server", **embedding}
        assert httpx.post(f"{address}/v1/models", json=body, timeout=60).status_code == 200
        yield address
    assert "Traceback" not in web.output()


@pytest.fixture
def sdk(url: str, model: ScriptedModel) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def llama(url: str, model: ScriptedModel) -> Iterator[LlamaStackClient]:
    with LlamaStackClient(base_url=url, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url: str, model: ScriptedModel) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def user(script: str) -> list[Any]:
    return [{"role": "user", "content": script}]


def asked(script: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": user(script), **fields}


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# --- what the SDKs do -------------------------------------------------------------------------------------------------


def test_openai_sdk_gets_a_whole_and_a_streamed_answer(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model="scripted", messages=user("SAY hello there"))
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("hello there ", "stop")
    assert whole.usage
    assert whole.model == "scripted"
    stream = sdk.chat.completions.create(model="scripted", messages=user("SAY hello there"), stream=True)
    chunks = list(stream)
    assert text_of(chunks) == "hello there "
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert {chunk.model for chunk in chunks} == {"scripted"}


async def test_async_openai_sdk_streams_with_the_usage_at_the_end(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(
            model="scripted", messages=user("UNICODE"), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert text_of(chunks) == "".join(UNICODE_PIECES)
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == len(UNICODE_PIECES)


def test_openai_sdk_calls_tools_and_parses_a_schema(sdk: openai.OpenAI, model: ScriptedModel) -> None:
    class Answer(BaseModel):
        number: int

    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    tools: Any = [{"type": "function", "function": function}]
    with sdk.chat.completions.stream(model="scripted", messages=user('CALL add {"a":1}'), tools=tools) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    parsed = sdk.chat.completions.parse(model="scripted", messages=user('SAY {"number":4}'), response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(number=4)
    first, second = (request["body"] for request in model.requests())
    assert first["tools"] == tools
    assert second["response_format"]["json_schema"]["schema"] == Answer.model_json_schema() | {
        "additionalProperties": False
    }


def test_llama_stack_client_takes_every_kind_of_answer(llama: LlamaStackClient) -> None:
    whole: Any = llama.chat.completions.create(model="scripted", messages=user("SAY hi"))
    assert whole.choices[0].message.content == "hi "
    assert text_of(list(llama.chat.completions.create(model="scripted", messages=user("UNICODE"), stream=True)))
    text = llama.completions.create(model="scripted", prompt="SAY once upon")
    assert text.choices[0].text == "once upon "
    pieces = llama.completions.create(model="scripted", prompt="SAY once upon", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "once upon "
    assert len(llama.embeddings.create(model="embed", input=["a b"]).data[0].embedding) == DIMENSIONS


async def test_async_llama_stack_client_streams(url: str) -> None:
    async with AsyncLlamaStackClient(base_url=url, max_retries=0) as llama:
        stream = await llama.chat.completions.create(model="scripted", messages=user("SAY a b"), stream=True)
        assert text_of([chunk async for chunk in stream]) == "a b "


def test_openai_sdk_completes_text_and_embeds(sdk: openai.OpenAI) -> None:
    assert sdk.completions.create(model="scripted", prompt="SAY on a time").choices[0].text == "on a time "
    pieces = list(sdk.completions.create(model="scripted", prompt="SAY on a time", stream=True, logprobs=3))
    assert "".join(piece.choices[0].text for piece in pieces) == "on a time "
    # By itself it asks for base64, as which the vectors are passed on.
    vectors = sdk.embeddings.create(model="embed", input=["one text", "another"]).data
    assert [len(each.embedding) for each in vectors] == [DIMENSIONS, DIMENSIONS]
    tokens = sdk.embeddings.create(model="embed", input=[[1, 2], [3]], encoding_format="float").data
    assert len(tokens) == 2


@pytest.mark.parametrize("prefix", ["/v1", "/v1/openai/v1"])
def test_both_prefixes_are_served(http: httpx.Client, prefix: str) -> None:
    answer = http.post(f"{prefix}/chat/completions", json=asked("SAY hi"))
    assert answer.json()["choices"][0]["message"]["content"] == "hi "


def test_whatever_a_client_sends_reaches_the_model_as_it_is(http: httpx.Client, model: ScriptedModel) -> None:
    """What llama_stack's types do not know, and null, too: the model server decides about it."""
    body = {
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "x", "name": "s", "cache_control": {"type": "ephemeral"}},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": []},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "SAY ok", "own": 1},
                    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                ],
            },
        ],
        "tools": [{"type": "custom", "custom": {"name": "grammar"}}],
        "tool_choice": "none",
        "temperature": 0,
        "stop": None,
        "max_tokens": 0,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False, "deep": [None]},
    }
    for stream in (True, False):
        assert http.post(CHAT, json={**body, "stream": stream}).status_code == 200
        assert model.requests()[-1]["body"] == {**body, "stream": stream}
    assert model.requests()[-1]["headers"]["authorization"] == "Bearer the-servers-own"


# --- on the wire ------------------------------------------------------------------------------------------------------


def test_stream_is_ascii_with_lf_and_ends_with_done(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=asked("UNICODE", stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.content.isascii()
    assert re.fullmatch(rb"((: ping\n)*data: \{[^\n]+\}\n\n)+(: ping\n)*data: \[DONE\]\n\n", answer.content)


@pytest.mark.parametrize(
    "headers",
    [
        {"User-Agent": "LlamaStackClient/JS 0.2.23"},
        {"User-Agent": "AsyncLlamaStackClient/Python 0.2.12"},
        {"User-Agent": "own/1", "X-LlamaStack-Client-Version": "0.3.5"},
        {"User-Agent": "t/JS 0.2.23", "X-Stainless-Lang": "js", "X-Stainless-Package-Version": "0.2.23"},
    ],
)
def test_llama_stack_clients_get_no_done(http: httpx.Client, headers: dict[str, str]) -> None:
    """Those up to 0.3 take every event for JSON."""
    answer = http.post(CHAT, json=asked("SAY hi", stream=True), headers=headers)
    assert answer.content.endswith(b"}\n\n")


def test_model_that_thinks_long_does_not_let_the_connection_idle(http: httpx.Client, model: ScriptedModel) -> None:
    with http.stream("POST", CHAT, json=asked("HOLD thought | SAY at last", stream=True)) as answer:
        lines = answer.iter_lines()
        assert [next(lines), next(lines)] == [": ping", ": ping"]
        model.release("thought")
        rest = "\n".join(lines)
    assert "at " in rest
    assert rest.rstrip().endswith("data: [DONE]")


def test_comments_disturb_no_sdk(sdk: openai.OpenAI, llama: LlamaStackClient, model: ScriptedModel) -> None:
    clients: list[Any] = [sdk, llama]
    for client in clients:
        stream = client.chat.completions.create(
            model="scripted", messages=user("DELAY 700 | PART a | DELAY 700 | SAY b"), stream=True
        )
        assert text_of(list(stream)) == "a b "


# --- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "told"), [(400, 400), (404, 404), (413, 413), (429, 429), (500, 500), (503, 503)])
def test_error_before_the_stream_has_the_models_status(
    http: httpx.Client, stream: bool, status: int, told: int
) -> None:
    answer = http.post(CHAT, json=asked(f"ERR {status} no such luck", stream=stream))
    assert (answer.status_code, answer.json()["error"]["message"]) == (told, "no such luck")


@pytest.mark.parametrize("stream", [False, True])
def test_how_long_the_model_server_asks_to_wait_is_told(http: httpx.Client, stream: bool) -> None:
    answers = [http.post(CHAT, json=asked(f"ERR {status} busy", stream=stream)) for status in ("429/7", "503/8", "503")]
    told = [(answer.status_code, answer.headers.get("retry-after")) for answer in answers]
    assert told == [(429, "7"), (503, "8"), (503, None)]


def test_a_refused_key_of_the_servers_own_is_not_the_clients_fault(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="INFERENCE_API_KEY") as raised:
        sdk.chat.completions.create(model="scripted", messages=user("ERR 401 bad key"))
    assert raised.value.status_code == 502


@pytest.mark.parametrize("end", ["ERR 500 fell over", "DROP"])
def test_error_amid_the_stream_is_raised_by_the_sdk(sdk: openai.OpenAI, end: str) -> None:
    stream = sdk.chat.completions.create(model="scripted", messages=user(f"PART a b | {end}"), stream=True)
    heard = []
    with pytest.raises(openai.APIError, match=r"fell over|connection to the model server broke") as raised:
        heard += [chunk.choices[0].delta.content for chunk in stream]
    assert raised.value.type == "server_error"
    assert "status_code" not in vars(raised.value)


def test_error_amid_the_stream_is_its_last_event(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=asked("PART a | ERR 500 fell over", stream=True))
    *_, last = answer.text.removesuffix("\n\n").split("\n\n")
    error = {"message": "fell over", "type": "server_error", "param": None, "code": None}
    assert json.loads(last.removeprefix("data: ")) == {"error": error}


def test_error_after_comments_is_an_event(http: httpx.Client, model: ScriptedModel) -> None:
    """There is no other way by then: the answer has begun."""
    with http.stream("POST", CHAT, json=asked("HOLD thought | ERR 400 too long", stream=True)) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert next(lines) == ": ping"
        model.release("thought")
        assert any('"message":"too long","type":"invalid_request_error"' in line for line in lines)


@pytest.mark.parametrize("stream", [False, True])
def test_model_server_that_is_down_is_502(http: httpx.Client, scripted_model: ScriptedModel, stream: bool) -> None:
    scripted_model.kill()
    try:
        answer = http.post(CHAT, json=asked("SAY hi", stream=stream))
    finally:
        scripted_model.start()
    assert answer.status_code == 502
    assert "cannot be reached" in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "server_error"
    assert http.post(CHAT, json=asked("SAY hi", stream=stream)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, asked("hi") | {"model": "unknown"}, 404, "model", "model_not_found"),
        (CHAT, asked("hi") | {"model": "embed"}, 400, "model", None),
        ("/v1/embeddings", {"model": "scripted", "input": "a"}, 400, "model", None),
        ("/v1/embeddings", {"model": "embed"}, 400, "input", None),
        (CHAT, {"model": "scripted"}, 400, "messages", None),
        (CHAT, {"model": "scripted", "messages": []}, 400, "messages", None),
        (CHAT, {"model": "scripted", "messages": ["hi"]}, 400, "messages[0]", None),
        (CHAT, asked("hi", stream="perhaps"), 400, "stream", None),
        ("/v1/completions", {"model": "scripted", "prompt": {}}, 400, "prompt", None),
        (CHAT, [], 400, None, None),
        (CHAT, asked("hi") | {"model": "\ud83d"}, 404, "model", "model_not_found"),
    ],
)
def test_wrong_request_names_the_field(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert answer.json()["detail"] == error["message"]


@pytest.mark.parametrize("data", ["[1]", "{", "[" * 5000])
def test_provider_data_that_is_no_object_is_refused(http: httpx.Client, data: str) -> None:
    answer = http.post(CHAT, json=asked("hi"), headers={"X-LlamaStack-Provider-Data": data})
    assert (answer.status_code, "Provider-Data" in answer.json()["detail"]) == (400, True)


def test_body_over_the_limit_is_413(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="REQUEST_MAX_BYTES") as raised:
        sdk.chat.completions.create(model="scripted", messages=user("x" * REQUEST_MAX_BYTES))
    assert (raised.value.status_code, raised.value.type) == (413, "invalid_request_error")


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["PART a | HANG", "PARTS 1000000 | HANG", "HANG"])
def test_leaving_a_stream_hangs_up_on_the_model(http: httpx.Client, model: ScriptedModel, script: str) -> None:
    with http.stream("POST", CHAT, json=asked(script, stream=True)) as answer:
        blocks = answer.iter_raw()  # once it is let go of, httpx closes the connection
        next(blocks)
        wait_until(model.open_streams)
    wait_until(lambda: [request["ended"] for request in model.requests()] == ["client_closed"])


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_answer_hangs_up_on_the_model(url: str, model: ScriptedModel, stream: bool) -> None:
    wire = Wire(url, "POST", CHAT, body=asked("HANG", stream=stream), read=False)
    wait_until(model.open_streams)
    wire.__exit__()
    wait_until(lambda: [request["ended"] for request in model.requests()] == ["client_closed"])
