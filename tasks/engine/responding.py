"""One answer of the model in a response: collects it, and publishes OpenAI's events as its pieces come.

Each output item is begun under the next `output_index`, which counts all items that were ever begun in the response.
What is whole only once it is recorded, `response.output_item.done`, is not published here.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from app.domain.events import EventKind
from app.domain.responses.events import Delta, event, item_event
from app.domain.responses.steps import Call, IndexedItem, Item

Publish = Callable[[str, EventKind], None]
CallKind = Literal["function", "mcp", "file_search", "web_search", "approval"]

_ID_PREFIX = {
    "message": "msg",
    "reasoning": "rs",
    "function": "fc",
    "mcp": "mcp",
    "file_search": "fs",
    "web_search": "ws",
    "approval": "mcpr",
}
_ARGUMENTS = {"function": "function_call_arguments", "mcp": "mcp_call_arguments"}


def new_id(kind: str) -> str:
    return f"{_ID_PREFIX[kind]}_{uuid.uuid4().hex}"


@dataclass
class Part:
    """A content part of an item, while its text comes."""

    type_: str
    content_index: int
    delta: Delta
    text: str = ""


@dataclass
class TextItem:
    """A message or a reasoning, while its parts come."""

    kind: Literal["message", "reasoning"]
    item_id: str
    output_index: int
    done_parts: list[Item] = field(default_factory=list)
    part: Part | None = None


@dataclass
class CallItem:
    """A tool call, while its arguments come. Begun once its name is known; -1: it is not begun yet."""

    call_id: str
    name: str = ""
    arguments: str = ""
    kind: CallKind = "function"
    item_id: str = ""
    output_index: int = -1
    delta: Delta | None = None
    given_id: str = ""
    """The model's, which need not be unique."""

    def whole(self) -> Call:
        return Call(
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
            kind=self.kind,
            item_id=self.item_id,
            output_index=self.output_index,
        )


_PARTS = {
    "output_text": ("output_text", "text"),
    "refusal": ("refusal", "refusal"),
    "reasoning_text": ("reasoning_text", "text"),
}
"""By the type of a content part: the events of its text, and the member that holds it."""


def content_part(type_: str, text: str) -> Item:
    part: Item = {"type": type_, _PARTS[type_][1]: text}
    return part | ({"annotations": [], "logprobs": []} if type_ == "output_text" else {})


class Answer:
    """`kind_of`: of a tool, by its name. `shown`: the item of a call as it is begun. `next_index`: of the next item."""

    def __init__(
        self,
        response_id: str,
        publish: Publish,
        kind_of: Callable[[str], CallKind],
        shown: Callable[[CallItem], Item | None],
        taken_call_ids: set[str],
        next_index: int,
    ) -> None:
        self._response_id = response_id
        self._publish = publish
        self._kind_of = kind_of
        self._shown = shown
        self._taken_call_ids = taken_call_ids
        self.next_index = next_index
        self.text = ""
        self.items: list[IndexedItem] = []
        """Messages and reasonings that are whole."""
        self.calls: list[Call] = []
        self.finish_reason = "stop"
        self.usage: dict[str, Any] | None = None
        self._open: TextItem | None = None
        self._call_items: list[CallItem] = []
        self._by_index: dict[int, CallItem] = {}

    async def take(self, stream: AsyncIterator[Any]) -> None:
        async for chunk in stream:
            if chunk.usage is not None:
                self.usage = chunk.usage.model_dump(mode="json", exclude_none=True)
            for choice in chunk.choices or ():
                self._choice(choice)
        self._close_item()
        for call in self._call_items:
            self._finish_call(call)

    def _choice(self, choice: Any) -> None:
        self.finish_reason = choice.finish_reason or self.finish_reason
        delta = choice.delta
        reasoning = delta.reasoning_content or getattr(delta, "reasoning", None)  # vLLM's name of it
        if reasoning and isinstance(reasoning, str):
            self._say("reasoning", "reasoning_text", reasoning)
        if delta.content:
            self.text += delta.content
            self._say("message", "output_text", delta.content)
        if delta.refusal:
            self.text += delta.refusal
            self._say("message", "refusal", delta.refusal)
        for piece in delta.tool_calls or ():
            self._call_piece(piece)

    def _say(self, kind: Literal["message", "reasoning"], type_: str, text: str) -> None:
        item = self._open if self._open is not None and self._open.kind == kind else self._begin_item(kind)
        part = item.part if item.part is not None and item.part.type_ == type_ else self._begin_part(item, type_)
        part.text += text
        self._publish(part.delta.data(text), EventKind.RESPONSE)

    def _begin_item(self, kind: Literal["message", "reasoning"]) -> TextItem:
        self._close_item()
        item = self._open = TextItem(kind, new_id(kind), self._take_index())
        self._added(_text_item(item, "in_progress"), item.output_index)
        return item

    def _begin_part(self, item: TextItem, type_: str) -> Part:
        self._close_part(item)
        where = {"item_id": item.item_id, "output_index": item.output_index, "content_index": len(item.done_parts)}
        data = event("content_part.added", response_id=self._response_id, **where, part=content_part(type_, ""))
        self._publish(data, EventKind.RESPONSE)
        logprobs: dict[str, Any] = {"logprobs": []} if type_ == "output_text" else {}
        part = item.part = Part(type_, len(item.done_parts), Delta(f"{_PARTS[type_][0]}.delta", **where, **logprobs))
        return part

    def _close_part(self, item: TextItem) -> None:
        part, item.part = item.part, None
        if part is None:
            return
        where = {"item_id": item.item_id, "output_index": item.output_index, "content_index": part.content_index}
        events_of, member = _PARTS[part.type_]
        logprobs: dict[str, Any] = {"logprobs": []} if part.type_ == "output_text" else {}
        self._publish(event(f"{events_of}.done", **where, **{member: part.text}, **logprobs), EventKind.RESPONSE)
        whole = content_part(part.type_, part.text)
        self._publish(
            event("content_part.done", response_id=self._response_id, **where, part=whole), EventKind.RESPONSE
        )
        item.done_parts.append(whole)

    def _close_item(self) -> None:
        item, self._open = self._open, None
        if item is not None:
            self._close_part(item)
            self.items.append(IndexedItem(output_index=item.output_index, item=_text_item(item, "completed")))

    def _call_piece(self, piece: Any) -> None:
        call = self._piece_of(piece)
        function = piece.function
        if function is None:
            return
        call.arguments += function.arguments or ""
        new = function.arguments
        if function.name and not call.name:
            self._begin_call(call, function.name)
            new = call.arguments
        if new and call.delta is not None:
            self._publish(call.delta.data(new), EventKind.RESPONSE)

    def _piece_of(self, piece: Any) -> CallItem:
        """The call of its index, or the next one: some servers give all calls the same index, or none."""
        call = self._by_index.get(piece.index or 0)
        named = piece.function is not None and piece.function.name
        if call is None or (named and piece.id and piece.id != call.given_id):
            call = self._by_index[piece.index or 0] = CallItem(piece.id or "", given_id=piece.id or "")
            self._call_items.append(call)
        return call

    def _begin_call(self, call: CallItem, name: str) -> None:
        self._close_item()
        call.name, call.kind = name, self._kind_of(name)
        call.call_id = self._unique(call.call_id)
        call.item_id = new_id(call.kind)
        shown = self._shown(call)
        if shown is not None:
            call.output_index = self._take_index()
            self._added(shown, call.output_index)
        if call.kind in _ARGUMENTS:
            where = {"item_id": call.item_id, "output_index": call.output_index}
            call.delta = Delta(f"{_ARGUMENTS[call.kind]}.delta", **where)

    def _finish_call(self, call: CallItem) -> None:
        if not call.name:
            return
        call.arguments = call.arguments or "{}"
        if call.delta is not None:
            where = {"item_id": call.item_id, "output_index": call.output_index}
            done = event(f"{_ARGUMENTS[call.kind]}.done", **where, arguments=call.arguments, name=call.name)
            self._publish(done, EventKind.RESPONSE)
        self.calls.append(call.whole())

    def _added(self, item: Item, output_index: int) -> None:
        data = item_event("added", self._response_id, output_index, item)
        self._publish(data, EventKind.ITEM_ADDED)

    def _take_index(self) -> int:
        self.next_index += 1
        return self.next_index - 1

    def _unique(self, call_id: str) -> str:
        """Models leave ids empty or use one twice; clients match their outputs by them."""
        if not call_id or call_id in self._taken_call_ids:
            call_id = f"call_{uuid.uuid4().hex}"
        self._taken_call_ids.add(call_id)
        return call_id


def _text_item(item: TextItem, status: str) -> Item:
    shape: Item = {"type": item.kind, "id": item.item_id, "status": status, "content": item.done_parts}
    more: Item = {"role": "assistant"} if item.kind == "message" else {"summary": []}
    return shape | more
