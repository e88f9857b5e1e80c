"""The scripted model does what its docstring says, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support import wait_until
from tests.support.scripted_model import (
    DIMENSIONS,
    UNICODE_PIECES,
    Command,
    ScriptedModel,
    ToolCall,
    embedding,
    parse,
    parse_calls,
    split_conversation,
    words,
)

Messages = list[Any]  # of dicts, as they go over the wire


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedModel]:
    with ScriptedModel() as model:
        yield model


@pytest.fixture
def model(server: ScriptedModel) -> ScriptedModel:
    server.reset()
    return server


@pytest.fixture
async def client(model: ScriptedModel) -> AsyncIterator[openai.AsyncOpenAI]:
    plain = openai.DefaultAsyncHttpxClient(verify=False)  # no TLS context, which takes longer than most tests
    async with openai.AsyncOpenAI(base_url=model.url, api_key="test-key", max_retries=0, http_client=plain) as client:
        yield client


def user(script: str) -> Messages:
    return [{"role": "user", "content": script}]


def answered(script: str, *steps: str) -> Messages:
    """A conversation in which the model has called a tool once for each of the results."""
    messages = user(script)
    for result in steps:
        messages.append({"role": "assistant", "content": None, "tool_calls": []})
        messages.append({"role": "tool", "tool_call_id": "c", "content": result})
    return messages


@dataclass
class Streamed:
    """What came out of a stream."""

    pieces: list[str] = field(default_factory=list)
    tool_deltas: list[Any] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    usages: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def stream(client: openai.AsyncOpenAI, messages: Messages, **options: Any) -> Streamed:
    seen = Streamed()
    chunks: openai.AsyncStream[ChatCompletionChunk] = await client.chat.completions.create(
        model="any/model", messages=messages, stream=True, **options
    )
    async for chunk in chunks:
        if chunk.usage:
            seen.usages.append(chunk.usage)
        for choice in chunk.choices:
            seen.pieces += [choice.delta.content] if choice.delta.content is not None else []
            seen.tool_deltas += choice.delta.tool_calls or []
            seen.reasons += [choice.finish_reason] if choice.finish_reason else []
    return seen


async def whole(client: openai.AsyncOpenAI, messages: Messages, **options: Any) -> ChatCompletion:
    completion: ChatCompletion = await client.chat.completions.create(model="any/model", messages=messages, **options)
    return completion


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


# --- the language ---


def names(messages: list[list[Command]]) -> list[list[str]]:
    return [[command.name for command in commands] for commands in messages]


def test_a_message_ends_with_its_first_ending_command() -> None:
    script = "Hello!\nDELAY 5 | PART a | CALL t {}\n  prose, not a script\nHOLD x\nSAY b | SAY c"
    assert names(parse(script)) == [["DELAY", "PART", "CALL"], ["HOLD", "SAY"], ["SAY"], []]


@pytest.mark.parametrize("text", ["", "say hello", "SAYS hello", "please SAY hello", "SAY-hello"])
def test_only_a_command_word_in_front_makes_a_command(text: str) -> None:
    assert parse(text) == [[]]


def test_a_separator_inside_words_or_arguments_separates_nothing() -> None:
    [[say], [call], []] = parse('SAY a | b\nCALL t {"x":"a | b & c"} & CALL u')
    assert say.rest == "a | b"
    assert parse_calls(call) == [ToolCall("t", '{"x":"a | b & c"}'), ToolCall("u", "{}")]


def test_calls_may_bring_their_ids_and_bad_arguments() -> None:
    [[command], []] = parse("CALLID same t & CALLID '' t {\"a\":1} & CALLBAD t {oops & CALLBAD u")
    assert parse_calls(command) == [
        ToolCall("t", "{}", "same"),
        ToolCall("t", '{"a":1}', ""),
        ToolCall("t", "{oops"),
        ToolCall("u", ""),
    ]


def test_words_join_to_the_text_and_a_space() -> None:
    assert words("a  b\nc") == ["a ", " ", "b\nc "]
    assert words("") == []


def test_the_script_is_the_last_user_message_whatever_its_shape() -> None:
    parts = [{"type": "text", "text": "SAY a"}, {"type": "image_url"}, {"type": "text", "text": "SAY b"}]
    assert split_conversation([*user("SAY old"), {"role": "user", "content": parts}]) == ("SAY a\nSAY b", 0)
    assert split_conversation(answered("SAY x", "1", "2")) == ("SAY x", 2)
    assert split_conversation([]) == ("", 0)


# --- what it says ---


async def test_say_streams_a_chunk_per_word(client: openai.AsyncOpenAI) -> None:
    seen = await stream(client, user("SAY hello there world"))
    assert seen == Streamed(["hello ", "there ", "world "], [], ["stop"], [])


async def test_usage_comes_when_asked_for(client: openai.AsyncOpenAI) -> None:
    seen = await stream(client, user("SAY a b"), stream_options={"include_usage": True})
    assert [usage.completion_tokens for usage in seen.usages] == [2]


async def test_every_event_is_an_http_chunk_and_the_role_comes_first(model: ScriptedModel) -> None:
    with socket.create_connection((model.host, model.port)) as raw:
        body = json.dumps({"model": "m", "messages": user("SAY a b"), "stream": True})
        raw.sendall(f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += raw.recv(65536)
    *events, end, _ = received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2]
    assert end == b"data: [DONE]\n\n"
    deltas = [json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"] for event in events]
    assert deltas == [{"role": "assistant", "content": "a "}, {"content": "b "}, {}]


@pytest.mark.parametrize("script", ["CHUNKS 1203", "CHUNKS 5 1", "PARTS 2 | PARTS 3 0.5"])
async def test_chunks_are_numbered(client: openai.AsyncOpenAI, script: str) -> None:
    seen = await stream(client, user(script))
    expected = {"CHUNKS 1203": [*range(1203)], "CHUNKS 5 1": [*range(5)]}.get(script, [0, 1, 0, 1, 2])
    assert seen.pieces == [f"w{n} " for n in expected]
    assert seen.reasons == ["stop"]


async def test_length_ends_for_lack_of_tokens(client: openai.AsyncOpenAI) -> None:
    assert (await stream(client, user("LENGTH too long"))).reasons == ["length"]


@pytest.mark.parametrize(("script", "reason"), [("SAY", "stop"), ("LENGTH", "length"), ("CHUNKS 0", "stop")])
async def test_a_message_may_be_empty(client: openai.AsyncOpenAI, script: str, reason: str) -> None:
    assert await stream(client, user(script)) == Streamed([], [], [reason], [])
    [choice] = (await whole(client, user(script))).choices
    assert (choice.message.content, choice.finish_reason) == ("", reason)


async def test_unicode_survives(client: openai.AsyncOpenAI) -> None:
    assert (await stream(client, user("UNICODE"))).pieces == list(UNICODE_PIECES)


async def test_history_system_and_tools_tell_what_was_received(client: openai.AsyncOpenAI) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("t", "u")]
    messages = [{"role": "system", "content": "Be kind."}, *answered("CALL t | HISTORY", "1")]
    told = await stream(client, messages, tools=tools)
    assert json.loads(told.text) == messages
    assert len(told.pieces) == 1
    assert (await stream(client, [messages[0], *user("SYSTEM")])).text == "Be kind."
    assert (await stream(client, user("TOOLS"), tools=tools)).text == "t,u"


async def test_text_without_a_script_is_echoed(client: openai.AsyncOpenAI) -> None:
    assert (await stream(client, user("good morning"))).text == "You said: good morning "


# --- tool calls and steps ---


async def test_a_call_streams_its_name_and_two_halves_of_its_arguments(client: openai.AsyncOpenAI) -> None:
    seen = await stream(client, user('PART let me see | CALL get_boiling_point {"liquid":"polyjuice"}'))
    first, *halves = seen.tool_deltas
    assert (first.function.name, first.function.arguments) == ("get_boiling_point", "")
    assert first.id.startswith("call_")
    assert [half.function.arguments for half in halves] == ['{"liquid":"', 'polyjuice"}']
    assert (seen.text, seen.reasons) == ("let me see ", ["tool_calls"])


async def test_parallel_calls_have_indexes_and_ids_of_their_own(client: openai.AsyncOpenAI) -> None:
    calls = "CALL t {} & CALL t {} & CALLID mine u {} & CALLID '' u {}"
    deltas = (await stream(client, user(calls))).tool_deltas
    begun = [(delta.index, delta.id) for delta in deltas if delta.id is not None]
    assert [index for index, _ in begun] == [0, 1, 2, 3]
    made = [call_id for _, call_id in begun]
    assert made[0].endswith("_0")
    assert made[1].endswith("_1")
    assert made[2:] == ["mine", ""]
    assert made[0] not in {delta.id for delta in (await stream(client, user(calls))).tool_deltas}


async def test_the_script_goes_on_after_the_results(client: openai.AsyncOpenAI) -> None:
    script = 'CALL add {"a":1,"b":2} | DELAY 1 | PART two | CALL add {"a":3,"b":4} | SAY seven'
    assert (await stream(client, user(script))).reasons == ["tool_calls"]
    assert (await stream(client, answered(script, "3"))).text == "two "
    assert (await stream(client, answered(script, "3", "7"))).text == "seven "


async def test_a_script_that_is_over_tells_the_result(client: openai.AsyncOpenAI) -> None:
    assert (await stream(client, answered("CALL t", "-100"))).pieces == ["The ", "tool ", "said: ", "-100 "]
    assert (await stream(client, answered("CALL t | HOLD-ing is prose", "1"))).text == "The tool said: 1 "
    assert (
        await stream(client, [*user("SAY a"), {"role": "assistant", "content": "a"}])
    ).text == "The script is over. "


async def test_without_streaming_the_message_comes_whole(client: openai.AsyncOpenAI) -> None:
    completion = await whole(client, user('PART a b | CALL t {"x":1} & CALLBAD u {'))
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("a b ", "tool_calls")
    calls = [call for call in choice.message.tool_calls or [] if call.type == "function"]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("t", '{"x":1}'), ("u", "{")]
    assert completion.usage
    assert completion.usage.completion_tokens == 4


# --- failures ---


@pytest.mark.parametrize("streamed", [True, False])
async def test_err_fails_before_the_stream(client: openai.AsyncOpenAI, streamed: bool) -> None:
    ask = stream if streamed else whole
    with pytest.raises(openai.RateLimitError, match="slow down"):
        await ask(client, user("DELAY 1 | ERR 429 slow down"))
    with pytest.raises(openai.InternalServerError, match="scripted 500"):
        await ask(client, user("ERR 500"))


async def test_err_in_mid_stream_is_an_error_event(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    with pytest.raises(openai.APIError, match="overheated") as caught:
        await stream(client, user("PART a b | ERR 503 overheated"))
    assert str(caught.value.code) == "503"
    assert [(record["ended"], record["status"]) for record in model.requests()] == [("failed", 503)]


async def test_errtimes_fails_so_many_times_for_each_script(client: openai.AsyncOpenAI) -> None:
    script = "ERRTIMES 2 503 not yet | SAY now"
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="not yet"):
            await stream(client, user(script))
    assert (await stream(client, user(script))).text == "now "
    with pytest.raises(openai.InternalServerError):
        await stream(client, user(f"{script} too"))


async def test_a_drop_cuts_the_stream(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    with pytest.raises(openai.APIConnectionError):
        await stream(client, user("PART a | DROP"))
    with pytest.raises(openai.APIConnectionError):
        await whole(client, user("DROP"))
    assert [record["ended"] for record in model.requests()] == ["dropped", "dropped"]
    assert model.open_streams() == 0


@pytest.mark.parametrize("script", ["CALL t {", "CALL", "CHUNKS many", "DELAY", "HOLD", "ERR", "ERRTIMES 1"])
async def test_a_bad_script_is_refused(client: openai.AsyncOpenAI, script: str) -> None:
    with pytest.raises(openai.BadRequestError, match="bad script"):
        await stream(client, user(script))


# --- holding ---


async def test_hold_waits_for_its_release(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    held = [asyncio.create_task(stream(client, user(f"PART {n} | HOLD gate | SAY on"))) for n in range(3)]
    await asyncio.to_thread(model.wait_held, "gate", 3)
    assert model.open_streams() == 3
    assert model.held("other") == 0
    assert model.release("gate") == 3
    assert [seen.text for seen in await asyncio.gather(*held)] == ["0 on ", "1 on ", "2 on "]
    assert (await stream(client, user("HOLD gate | SAY open"))).text == "open "


async def test_a_hold_may_have_any_name(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    held = asyncio.create_task(stream(client, user("HOLD turn 1/é | SAY on")))
    await asyncio.to_thread(model.wait_held, "turn 1/é")
    assert model.release("turn 1/é") == 1
    assert (await held).text == "on "


async def test_a_reset_lets_go_and_closes_the_gate_again(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    model.release("gate")
    model.reset()
    held = asyncio.create_task(stream(client, user("HOLD gate | SAY on")))
    await asyncio.to_thread(model.wait_held, "gate")
    model.reset()
    assert (await held).text == "on "
    assert model.requests() == []


async def test_text_that_is_no_script_is_given_one(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    """Wherever the text stands in the last user message, for each message after it, and until a reset."""
    model.rehearse({"your name": "CALL look | SAY Ali"})
    asked = user("Hello, what is your name?")
    assert (await stream(client, asked)).reasons == ["tool_calls"]
    assert (await stream(client, answered(asked[0]["content"], "seen"))).text == "Ali "
    model.reset()
    assert (await stream(client, asked)).text.startswith("You said: Hello")


@pytest.mark.parametrize("script", ["HANG", "PART | HANG", "PART a | HOLD never", "DELAY 60000"])
async def test_a_client_that_leaves_is_seen(client: openai.AsyncOpenAI, model: ScriptedModel, script: str) -> None:
    hung = asyncio.create_task(stream(client, user(script)))
    await until(lambda: model.open_streams() == 1)
    hung.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hung
    await until(lambda: model.requests()[0]["ended"] == "client_closed")
    assert model.open_streams() == 0
    assert model.held("never") == 0


async def test_part_without_words_only_opens_the_stream(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    opened = await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "PART | HOLD x | SAY a"}], stream=True
    )
    model.release("x")
    assert [chunk.choices[0].delta.content async for chunk in opened] == ["", "a ", None]


# --- the rest of the API, and control ---


async def test_requests_are_recorded_in_order(client: openai.AsyncOpenAI, model: ScriptedModel) -> None:
    await stream(client, user("SAY a"), temperature=0.5, extra_headers={"X-Run": "7"})
    await whole(client, user("SAY b"))
    first, second = model.requests()
    assert first["body"]["messages"] == user("SAY a")
    assert first["body"]["temperature"] == 0.5
    assert (first["headers"]["x-run"], first["headers"]["authorization"]) == ("7", "Bearer test-key")
    assert first["at"] <= first["ended_at"] <= second["at"]
    assert (second["ended"], second["status"]) == ("finished", 200)


async def test_models_and_embeddings(client: openai.AsyncOpenAI) -> None:
    assert [one.id async for one in client.models.list()] == ["scripted"]
    assert (await client.models.retrieve("meta-llama/any")).id == "meta-llama/any"
    answer = await client.embeddings.create(model="e", input=["a cat", "a dog"])
    assert [row.embedding for row in answer.data] == [pytest.approx(embedding(text)) for text in ("a cat", "a dog")]
    floats = await client.embeddings.create(model="e", input="a cat", encoding_format="float")
    assert floats.data[0].embedding == embedding("a cat")
    assert len(embedding("")) == DIMENSIONS


def test_texts_that_share_words_are_near() -> None:
    def nearness(one: str, other: str) -> float:
        return sum(a * b for a, b in zip(embedding(one), embedding(other), strict=True))

    assert nearness("where camels drink", "camels drink here") > nearness("where camels drink", "tax law")


def test_what_is_no_route_or_no_json_is_refused(model: ScriptedModel) -> None:
    assert httpx.get(f"{model.url}/nothing", timeout=60).status_code == 404
    for body in ("{", "[]", "{}", '{"messages":[{"content":"no role"}]}', '{"messages":["SAY a"]}'):
        assert httpx.post(f"{model.url}/chat/completions", content=body, timeout=60).status_code == 400
    assert model.requests() == []


def test_connections_are_kept_and_closed_as_asked(model: ScriptedModel) -> None:
    ask = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n%b\r\n"
    with socket.create_connection((model.host, model.port)) as raw:
        raw.sendall(ask % b"" + ask % b"connection: close\r\n")
        received = b""
        while data := raw.recv(65536):
            received += data
    assert received.count(b"HTTP/1.1 200") == 2


async def test_a_slow_reader_gets_everything(model: ScriptedModel) -> None:
    """More than the socket buffers hold, so that the server has to wait for the client."""
    reader, writer = await asyncio.open_connection(model.host, model.port)
    body = json.dumps({"messages": user("CHUNKS 60000 | SAY never"), "stream": True})
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    await reader.readuntil(b'"w0 "')
    assert (await asyncio.to_thread(model.open_streams)) == 1
    assert b'"w59999 "' in (await _read_until(reader, b"0\r\n\r\n"))[-1000:]
    writer.close()
    assert model.requests()[0]["ended"] == "finished"


async def _read_until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    received = bytearray()
    while not received.endswith(end):
        received += await reader.read(1 << 20)
    return bytes(received)


async def test_an_outage_and_its_end() -> None:
    with ScriptedModel(models=["a/b", "c"]) as model:
        url = model.url
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            held = asyncio.create_task(stream(client, user("PART a | HOLD gate")))
            await asyncio.to_thread(model.wait_held, "gate")
            model.kill()
            with pytest.raises(openai.APIConnectionError):
                await held
            with pytest.raises(openai.APIConnectionError):
                await stream(client, user("SAY a"))
            assert model.pid is None
            model.restart()
            assert model.url == url
            assert (await stream(client, user("SAY back"))).text == "back "
            assert [one.id async for one in client.models.list()] == ["a/b", "c"]
        assert [record["ended"] for record in model.requests()] == ["killed", "finished"]


def test_a_server_that_cannot_start_says_so(model: ScriptedModel) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        ScriptedModel(port=model.port).start()


@pytest.mark.parametrize(("role", "said"), [("User", "safe "), ("Assistant", "unsafe\nS1,S2"), ("Tool", "perhaps ")])
async def test_a_guard_is_told_by_the_last_user_message(client: openai.AsyncOpenAI, role: str, said: str) -> None:
    """By the lines for the role that it is to judge; without any, everything is safe."""
    prompt = (
        "User: hi\nGUARD User UNSAFE S9\n\nAssistant: ho\n\nUser: SAY x\nGUARD Assistant UNSAFE S1,S2\n"
        f"GUARD Tool SAY perhaps\n\nProvide your safety assessment for ONLY THE LAST {role} message"
    )
    answer = await client.chat.completions.create(model="guard", messages=user(prompt))
    assert answer.choices[0].message.content == said


@pytest.mark.parametrize("arguments", ["{oops", "[1]", "null"])
async def test_a_history_with_arguments_that_are_no_object_is_400(client: openai.AsyncOpenAI, arguments: str) -> None:
    """As real servers have it whose templates read them."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
    asked = [*user("SAY hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="no JSON object"):
        await client.chat.completions.create(model="m", messages=asked)
