"""One streamed answer: its deltas and its message."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from llama_stack.apis.inference import StopReason

from app.domain.events import StepProgress
from tasks.engine.inference import Inference, call_ids, model_failure
from tests.unit.domain.journals import call, message


def chunk(content: str | None = None, *pieces: Any, finish: str | None = None) -> Any:
    delta = SimpleNamespace(content=content, tool_calls=list(pieces) or None)
    return SimpleNamespace(choices=[SimpleNamespace(delta=delta, finish_reason=finish)])


def piece(
    index: int | None = 0, call_id: str | None = None, name: str | None = None, arguments: str | None = None
) -> Any:
    return SimpleNamespace(index=index, id=call_id, function=SimpleNamespace(name=name, arguments=arguments))


async def stream(chunks: Iterable[Any]) -> AsyncIterator[Any]:
    for one in chunks:
        yield one


async def answer(*chunks: Any, taken: set[str] | None = None) -> tuple[Any, list[Any]]:
    """(message, deltas)."""
    published: list[str] = []
    inference = Inference(StepProgress("inference", "s"), published.append, taken or set())
    given = await inference.run(stream(chunks))
    return given, [json.loads(data)["event"]["payload"]["delta"] for data in published]


async def test_text_is_published_as_it_comes() -> None:
    """Empty pieces, and chunks without a choice such as that of the usage, are not."""
    usage = SimpleNamespace(choices=[])
    given, deltas = await answer(chunk("a"), chunk(""), chunk("b"), chunk(None, finish="stop"), usage)
    assert given == message(content="ab")
    assert [delta["text"] for delta in deltas] == ["a", "b"]


async def test_a_calls_pieces_are_published_and_then_the_whole() -> None:
    """As llama_stack shows them: the name and a parenthesis, the arguments, the other one, the call."""
    given, deltas = await answer(
        chunk("let me see"),
        chunk(None, piece(0, "c1", "add")),
        chunk(None, piece(0, None, None, '{"a"')),
        chunk(None, piece(0, None, None, ":1}")),
        chunk(finish="tool_calls"),
    )
    whole = {"call_id": "c1", "tool_name": "add", "arguments": '{"a":1}'}
    assert [delta.get("tool_call") for delta in deltas[1:]] == ["add(", '{"a"', ":1}", ")", whole]
    assert deltas[-1]["parse_status"] == "succeeded"
    assert (given.content, given.stop_reason) == ("", StopReason.end_of_message)
    assert [one.model_dump() for one in given.tool_calls] == [whole]


async def test_a_call_in_one_piece_is_shown_with_its_name() -> None:
    """As Ollama and llama.cpp send it."""
    _, deltas = await answer(chunk(None, piece(0, "c1", "add", '{"a":1}')))
    assert [delta["tool_call"] for delta in deltas[:-1]] == ['add({"a":1}', ")"]


async def test_parallel_calls_are_told_by_their_index() -> None:
    """Their pieces may be mixed; a missing index is the first."""
    given, _ = await answer(
        chunk(None, piece(None, "c1", "add"), piece(1, "c2", "echo")),
        chunk(None, piece(1, None, None, '{"t":2}'), piece(None, None, None, '{"a":1}')),
    )
    assert [(one.call_id, one.tool_name, one.arguments) for one in given.tool_calls] == [
        ("c1", "add", '{"a":1}'),
        ("c2", "echo", '{"t":2}'),
    ]


@pytest.mark.parametrize("index", [0, None])
async def test_calls_of_one_index_are_told_apart_by_their_ids(index: int | None) -> None:
    """Some servers give all calls the same index, or none; a name that is there again begins no call."""
    given, _ = await answer(
        chunk(None, piece(index, "c1", "add", '{"a"')),
        chunk(None, piece(index, "c1", "add", ":1}")),
        chunk(None, piece(index, "c2", "echo", '{"t":2}')),
    )
    assert [(one.call_id, one.tool_name, one.arguments) for one in given.tool_calls] == [
        ("c1", "add", '{"a":1}'),
        ("c2", "echo", '{"t":2}'),
    ]


@pytest.mark.parametrize("call_id", ["", None, "taken"])
async def test_an_id_that_is_empty_or_taken_is_replaced(call_id: str | None) -> None:
    """Also that of the second of two calls with the same one."""
    given, _ = await answer(
        chunk(None, piece(0, call_id, "add")), chunk(None, piece(1, call_id, "add")), taken={"taken"}
    )
    first, second = (one.call_id for one in given.tool_calls)
    assert len({first, second, "taken", ""}) == 4


@pytest.mark.parametrize("piece_without", [SimpleNamespace(index=0, id="c", function=None), piece(0, "c", None, "{}")])
async def test_a_call_without_a_name_is_none(piece_without: Any) -> None:
    """There is nothing to call."""
    given, _ = await answer(chunk(None, piece_without), chunk("text", finish="stop"))
    assert given == message(content="text")


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", StopReason.end_of_turn),
        ("length", StopReason.out_of_tokens),
        ("tool_calls", StopReason.end_of_message),
        ("content_filter", StopReason.end_of_turn),
        (None, StopReason.end_of_turn),
    ],
)
async def test_the_finish_reason_is_llama_stacks_stop_reason(finish: str | None, reason: StopReason) -> None:
    """An unknown one, or none, is the end of the turn."""
    given, _ = await answer(chunk("a", finish=finish))
    assert given.stop_reason == reason


def test_all_ids_of_a_conversation_are_taken() -> None:
    """Those of every call in it."""
    assert call_ids([message(call("add", "1"), call("add", "2")), message(content="x")]) == {"1", "2"}


def test_a_model_failure_has_the_servers_status_and_words() -> None:
    """Or says that there was no answer, and which setting names the server."""

    class Refused(Exception):
        status_code = 429

    refused, broken = model_failure(Refused("slow down")), model_failure(ConnectionError())
    assert (refused.code, refused.status, refused.message) == ("model_error", 429, "429: slow down")
    assert broken.status is None
    assert "INFERENCE_URL" in broken.message
    assert "ConnectionError" in broken.message
