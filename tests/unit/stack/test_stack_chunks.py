"""The stream of a chat completion, from bytes to llama_stack's chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.stack.chunks import ModelError, parse_event, read_chunks, renamed, server_error


def event(**fields: Any) -> bytes:
    return (
        b"data: " + json.dumps({"id": "c", "created": 1, "model": "m", **fields}, ensure_ascii=False).encode() + b"\n\n"
    )


def content(text: str, finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}])


DONE = b"data: [DONE]\n\n"


async def chunks_of(*blocks: bytes, include_usage: bool = False) -> list[Any]:
    async def stream() -> AsyncIterator[bytes]:
        for block in blocks:
            yield block

    return [chunk async for chunk in read_chunks(stream(), include_usage=include_usage)]


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices or () if choice.delta)


async def test_chunks_are_the_same_however_the_bytes_are_cut() -> None:
    stream = content("Grüße, ") + content("a\u2028b", "stop") + DONE
    for size in (1, 2, 3, 7, 1000):
        blocks = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert text_of(await chunks_of(*blocks)) == "Grüße, a\u2028b"


async def test_comments_and_keep_alives_and_crlf_are_understood() -> None:
    stream = (
        b": ping\n\n\r\nevent: chunk\r\nid: 1\r\n" + content("x", "stop").replace(b"\n", b"\r\n") + b"data:[DONE]\r\n"
    )
    assert text_of(await chunks_of(stream)) == "x"


async def test_tool_calls_keep_index_id_name_and_arguments() -> None:
    call = {"index": 1, "id": "call_1", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 1, "type": None, "function": {"arguments": ": 1}"}}
    chunks = await chunks_of(
        event(choices=[{"index": 0, "delta": {"tool_calls": [call]}}]),
        event(choices=[{"index": 0, "delta": {"tool_calls": [rest]}, "finish_reason": "tool_calls"}]),
        DONE,
    )
    calls = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks]
    assert [(c.index, c.id, c.function.name, c.function.arguments) for c in calls] == [
        (1, "call_1", "f", '{"a"'),
        (1, None, None, ": 1}"),
    ]


@pytest.mark.parametrize("include_usage", [False, True])
async def test_chunk_without_choices_is_dropped_unless_it_tells_the_usage_that_was_asked_for(
    include_usage: bool,
) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    chunks = await chunks_of(
        event(choices=[], prompt_filter_results=[]),
        content("x", "length"),
        event(choices=None, usage=usage),
        DONE,
        include_usage=include_usage,
    )
    assert [len(chunk.choices) for chunk in chunks] == ([1, 0] if include_usage else [1])
    assert not include_usage or chunks[-1].usage.total_tokens == 3


async def test_usage_in_a_chunk_with_choices_stays() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    last = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], usage=usage)
    assert (await chunks_of(last, DONE))[0].usage.total_tokens == 3


async def test_missing_and_null_fields_do_no_harm() -> None:
    chunks = await chunks_of(
        b'data: {"choices":[{"delta":null}]}\n\n', b'data: {"choices":null}\n\n', content("x", "stop")
    )
    assert [len(chunk.choices) for chunk in chunks] == [1, 1]


async def test_chunks_are_written_out_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    chunk = (await chunks_of(event(choices=[{"index": 0, "delta": {"reasoning": "hm"}}]), content("", "stop")))[0]
    written = json.loads(chunk.model_dump_json())
    assert written["choices"][0]["finish_reason"] is None
    assert written["choices"][0]["delta"]["reasoning"] == "hm"
    assert "error" not in written
    others = (ResourceWarning, RuntimeWarning)  # what the tests before have left is collected at any time
    assert [warning for warning in recwarn if not issubclass(warning.category, others)] == []


@pytest.mark.parametrize(
    ("data", "message", "status"),
    [
        (b'data: {"error": {"message": "out of memory", "code": 503}}\n\n', "out of memory", 503),
        (b'data: {"error": {"message": "bad", "code": "x"}}\n\n', "bad", 502),
        (b'data: {"error": "flat"}\n\n', "flat", 502),
        (b'data: {"object": "error", "message": "old vLLM", "code": 400}\n\n', "old vLLM", 400),
        (b'error: {"message": "old llama.cpp", "code": 500}\n\n', "old llama.cpp", 500),
        (b'{"error":{"message":"a gateway","code":404}}\n', "a gateway", 404),
        (b"data: <html>\n\n", "no completion chunk", 502),
        (b"data: [1]\n\n", "no completion chunk", 502),
    ],
)
async def test_error_in_the_stream_is_raised_with_its_message(data: bytes, message: str, status: int) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        await chunks_of(content("x"), data, content("never", "stop"), DONE)
    assert raised.value.status_code == status


async def test_stream_that_ends_before_a_choice_is_finished_is_an_error() -> None:
    with pytest.raises(ModelError, match="closed the stream"):
        await chunks_of(content("x"))


async def test_stream_may_end_without_done_after_the_finish_reason() -> None:
    assert text_of(await chunks_of(content("x", "stop").rstrip())) == "x"


def test_error_can_be_stored_and_sent_whatever_it_says() -> None:
    """Half of a surrogate pair can be neither; HTTP has no status above 599."""
    error = server_error({"error": {"message": "so far \ud83d"}}, 700)
    assert (str(error), error.status_code) == ("so far \\ud83d", 502)


def test_what_is_nested_too_deeply_is_the_servers_error() -> None:
    """Models that repeat themselves write it."""
    with pytest.raises(ModelError, match="nested"):
        parse_event(b"[" * 100_000)


def test_vectors_stay_the_bytes_that_they_are() -> None:
    """Whatever else is in the answer, numbers in brackets in a text too."""
    vectors = [b"[%b]" % b", ".join([number] * 300) for number in (b"1.50", b"-2e-3", b"3")]
    text = "[" + "1, " * 100 + "]"
    rows = b",".join(b'{"embedding": %b, "index": 0}' % vector for vector in vectors)
    data = b'{"data": [%b], "model": "m", "text": "%b \\u00e9", "few": [1.50]}' % (rows, text.encode())
    answer = renamed(data, "mine")
    assert [vector in answer for vector in vectors] == [True] * 3
    assert json.loads(answer) == json.loads(data) | {"model": "mine"}


def test_an_answer_without_a_model_gets_none() -> None:
    assert json.loads(renamed(b'{"a": 1}', "mine")) == {"a": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no such model"}}, "no such model"),
        ({"detail": [{"loc": ["body"]}]}, "loc"),
        ("plain", "plain"),
        ({}, "reported an error"),
    ],
)
def test_error_bodies_of_every_shape_have_a_message(body: Any, message: str) -> None:
    error = server_error(body, 404)
    assert message in str(error)
    assert error.status_code == 404
    assert not error.retryable
