"""One streamed answer of the model as OpenAI's events and items. OpenAI's own accumulator is fed with each stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from app.domain.events import EventKind
from app.stack.chunks import Chunk
from tasks.engine.responding import Answer, CallItem, CallKind

Json = dict[str, Any]
_events: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def chunk(finish: str | None = None, usage: Json | None = None, **delta: Any) -> Chunk:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}] if delta or finish else []
    return Chunk.model_validate({"choices": choices, "usage": usage})


def piece(arguments: str | None = None, *, name: str | None = None, call_id: str | None = None, index: Any = 0) -> Json:
    return {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}


def calls(*pieces: Json) -> Chunk:
    return chunk(tool_calls=list(pieces))


KINDS: dict[str, CallKind] = {
    "ask": "approval",
    "add": "mcp",
    "knowledge_search": "file_search",
    "web_search": "web_search",
}


def kind_of(name: str) -> CallKind:
    return KINDS.get(name, "function")


def shown(call: CallItem) -> Json | None:
    """As `ResponseTools.begun` shows it."""
    if call.kind == "approval":
        return None
    if call.kind in ("file_search", "web_search"):
        return {"type": f"{call.kind}_call", "id": call.item_id, "status": "in_progress", "queries": []}
    more = {"call_id": call.call_id} if call.kind == "function" else {"server_label": "calc"}
    type_ = "function_call" if call.kind == "function" else "mcp_call"
    return {"type": type_, "id": call.item_id, "name": call.name, "arguments": "", "status": "in_progress", **more}


class Heard:
    """An answer that was fed with chunks, and the events that it published."""

    def __init__(self, taken: set[str] | None = None, next_index: int = 0) -> None:
        self.events: list[Json] = []
        self.kinds: list[EventKind] = []
        self.answer = Answer("resp_1", self._publish, kind_of, shown, taken if taken is not None else set(), next_index)

    def _publish(self, data: str, kind: EventKind) -> None:
        self.events.append(json.loads(data))
        self.kinds.append(kind)

    async def take(self, *chunks: Chunk) -> Heard:
        async def stream() -> AsyncIterator[Chunk]:
            for each in chunks:
                yield each

        await self.answer.take(stream())
        return self

    @property
    def types(self) -> list[str]:
        return [event["type"].removeprefix("response.") for event in self.events]

    def of(self, type_: str) -> list[Json]:
        return [event for event in self.events if event["type"] == f"response.{type_}"]

    def accumulated(self) -> list[Any]:
        """The output as OpenAI's SDK puts it together from the deltas."""
        created = {"id": "resp_1", "object": "response", "created_at": 0, "model": "m", "output": [], "tools": []}
        created |= {"parallel_tool_calls": True, "tool_choice": "auto", "status": "in_progress"}
        state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
        snapshot = None
        for number, event in enumerate([{"type": "response.created", "response": created}, *self.events]):
            parsed = _events.validate_python({"sequence_number": number, **event})
            state.handle_event(parsed)
            snapshot = snapshot or state.accumulate_event(parsed)
        assert snapshot is not None
        return list(snapshot.output)


async def test_text() -> None:
    """An item, a part, its deltas, and their ends. The item is not said to be done: that comes when it is recorded."""
    heard = await Heard(next_index=3).take(
        chunk(role="assistant", content=""), chunk(content="Hello "), chunk(content="wörld"), chunk("stop")
    )
    assert heard.types == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
    ]
    assert heard.kinds == [EventKind.ITEM_ADDED] + [EventKind.RESPONSE] * 5
    assert {event["output_index"] for event in heard.events} == {3}
    assert heard.events[4]["text"] == "Hello wörld"
    [item] = heard.answer.items
    assert (item.output_index, heard.answer.next_index) == (3, 4)
    assert (item.item["status"], item.item["role"]) == ("completed", "assistant")
    assert item.item["content"] == [{"type": "output_text", "text": "Hello wörld", "annotations": [], "logprobs": []}]
    assert heard.answer.text == "Hello wörld"
    [message] = (await Heard().take(chunk(content="a"), chunk(content="b"))).accumulated()
    assert message.content[0].text == "ab"


async def test_nothing() -> None:
    """No item without a text or a call. A model that gives no reason for its end has ended."""
    heard = await Heard().take(chunk(role="assistant", content=""), chunk(content=None, tool_calls=[]))
    assert (heard.events, heard.answer.items, heard.answer.calls) == ([], [], [])
    assert (heard.answer.finish_reason, heard.answer.usage) == ("stop", None)


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "tool_calls"])
async def test_how_it_ends(reason: str) -> None:
    """The usage comes behind it, or with each chunk: the last one counts."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    heard = await Heard().take(
        chunk(content="a", usage={**usage, "completion_tokens": 1}), chunk(reason), chunk(usage=usage)
    )
    assert heard.answer.finish_reason == reason
    assert heard.answer.usage == usage


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning(field: str) -> None:
    """An item of its own, before the message; it is not told to the model again. vLLM has the second name for it."""
    pieces: list[dict[str, Any]] = [{field: "hm "}, {field: "so"}, {"content": "yes"}]
    heard = await Heard().take(*(chunk(**piece) for piece in pieces), chunk("stop"))
    assert heard.types == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
    ]
    reasoning, message = heard.answer.items
    assert reasoning.item["content"] == [{"type": "reasoning_text", "text": "hm so"}]
    assert reasoning.item["summary"] == []
    assert (reasoning.output_index, message.output_index) == (0, 1)
    assert heard.answer.text == "yes"
    assert [item.type for item in heard.accumulated()] == ["reasoning", "message"]


async def test_reasoning_that_is_no_text() -> None:
    heard = await Heard().take(chunk(reasoning={"effort": "low"}, content="yes"))
    assert heard.answer.text == "yes"
    assert [item.item["type"] for item in heard.answer.items] == ["message"]


async def test_thoughts_between_texts() -> None:
    """Items come one after the other: each text behind a thought is a new message."""
    heard = await Heard().take(chunk(content="a"), chunk(reasoning_content="b"), chunk(content="c"))
    assert [item.item["type"] for item in heard.answer.items] == ["message", "reasoning", "message"]
    assert heard.answer.text == "ac"
    heard.accumulated()


async def test_a_refusal() -> None:
    """A part of the message; the model is told of it like of any text."""
    heard = await Heard().take(chunk(content="Well. "), chunk(refusal="I "), chunk(refusal="won't."), chunk("stop"))
    assert [each for each in heard.types if "refusal" in each] == ["refusal.delta", "refusal.delta", "refusal.done"]
    [message] = heard.answer.items
    assert [part["type"] for part in message.item["content"]] == ["output_text", "refusal"]
    assert message.item["content"][1] == {"type": "refusal", "refusal": "I won't."}
    assert [event["content_index"] for event in heard.of("content_part.added")] == [0, 1]
    assert heard.answer.text == "Well. I won't."
    heard.accumulated()


async def test_a_functions_call() -> None:
    heard = await Heard().take(
        chunk(content="Let me see."),
        calls(piece(name="look", call_id="c1")),
        calls(piece('{"a"')),
        calls(piece(": 1}")),
        chunk("tool_calls"),
    )
    assert heard.types[5:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
    ]
    [call] = heard.answer.calls
    assert (call.call_id, call.name, call.arguments, call.kind) == ("c1", "look", '{"a": 1}', "function")
    assert heard.events[-1]["arguments"] == '{"a": 1}'
    message, function = heard.accumulated()
    assert (message.content[0].text, function.arguments) == ("Let me see.", '{"a": 1}')


async def test_calls_side_by_side() -> None:
    """Pieces of several calls may come mixed. Indexes go by the order in which items are begun: SDKs append them."""
    heard = await Heard().take(
        calls(piece(name="look", call_id="c1"), piece(name="ask", call_id="c2", index=1)),
        calls(piece(name="add", call_id="c3", index=2), piece("{", index=1), piece('{"a":1', index=2)),
        calls(piece("}", index=1), piece("}", index=2), piece("{}")),
    )
    found = [(call.call_id, call.kind, call.arguments, call.output_index) for call in heard.answer.calls]
    assert found == [("c1", "function", "{}", 0), ("c2", "approval", "{}", -1), ("c3", "mcp", '{"a":1}', 1)]
    assert [event["output_index"] for event in heard.of("output_item.added")] == [0, 1]
    assert heard.answer.next_index == 2
    assert [item.arguments for item in heard.accumulated()][:1] == ["{}"]


async def test_searches() -> None:
    """Their arguments are not told as they come."""
    heard = await Heard().take(
        calls(piece('{"query":"a"}', name="knowledge_search", call_id="c1")),
        calls(piece('{"query":"b"}', name="web_search", call_id="c2", index=1)),
    )
    assert heard.types == ["output_item.added", "output_item.added"]
    assert [call.kind for call in heard.answer.calls] == ["file_search", "web_search"]


@pytest.mark.parametrize("given", [["", ""], ["same", "same"], ["taken", "taken"], [None, None]])
async def test_ids_that_are_empty_or_used_twice(given: list[str | None]) -> None:
    """Each call has one of its own, also among those that came before."""
    taken = {"taken"}
    heard = await Heard(taken).take(
        calls(piece("{}", name="look", call_id=given[0]), piece("{}", name="look", call_id=given[1], index=1))
    )
    found = [call.call_id for call in heard.answer.calls]
    assert len({*found, "taken"}) == 3
    assert all(found)
    assert [event["item"]["call_id"] for event in heard.of("output_item.added")] == found
    heard.accumulated()


@pytest.mark.parametrize("index", [0, None])
async def test_calls_that_all_have_the_same_index(index: int | None) -> None:
    """Some servers count none: each call comes with its name and an id of its own."""
    heard = await Heard().take(
        calls(piece('{"a":1}', name="look", call_id="c1", index=index)),
        calls(piece('{"b":', name="look", call_id="c2", index=index)),
        calls(piece("2}", index=index)),
    )
    assert [(call.call_id, call.arguments) for call in heard.answer.calls] == [("c1", '{"a":1}'), ("c2", '{"b":2}')]


async def test_a_call_whose_name_is_repeated() -> None:
    """With each piece, as some servers do: it is one call."""
    heard = await Heard().take(
        calls(piece("{", name="look", call_id="c1")), calls(piece("}", name="look", call_id="c1"))
    )
    assert [(call.name, call.arguments) for call in heard.answer.calls] == [("look", "{}")]


async def test_arguments_before_their_name() -> None:
    """Nothing of them is missing in the deltas."""
    heard = await Heard().take(calls(piece('{"a"', call_id="c1")), calls(piece(":1}", name="look")), calls(piece("")))
    assert "".join(event["delta"] for event in heard.of("function_call_arguments.delta")) == '{"a":1}'
    assert heard.accumulated()[0].arguments == '{"a":1}'


async def test_a_call_without_a_name() -> None:
    """It is none, and no item is begun for it."""
    heard = await Heard().take(calls(piece("{}", call_id="c1")), calls({"index": 1, "id": "c2"}), chunk("tool_calls"))
    assert (heard.events, heard.answer.calls, heard.answer.next_index) == ([], [], 0)


async def test_arguments_that_are_missing_or_no_json() -> None:
    """Missing ones are those of a call without arguments; others are told as they are."""
    heard = await Heard().take(
        calls(piece(name="look", call_id="c1"), piece("not json", name="look", call_id="c2", index=1))
    )
    assert [call.arguments for call in heard.answer.calls] == ["{}", "not json"]
    assert [event["arguments"] for event in heard.of("function_call_arguments.done")] == ["{}", "not json"]
