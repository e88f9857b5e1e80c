"""A response's events: as they are logged, without the `sequence_number`, which each has from its number in the log.

Each begins with its type, `{"type":"response.…"`. Source: OpenAI's API reference, Streaming events of Responses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from app.domain.events import Event, EventKind, ascii_json
from app.domain.responses.steps import Item

_TYPE = '{"type":"'
_DONE, _IN_PROGRESS = f'{_TYPE}response.output_item.done"', f'{_TYPE}response.in_progress"'


def event(type_: str, **fields: Any) -> str:
    return ascii_json({"type": f"response.{type_}", **fields})


def item_event(what: Literal["added", "done"], response_id: str, output_index: int, item: Item | None) -> str:
    """`response_id` is llama_stack's: OpenAI's event has none, ogx-client demands it."""
    return event(f"output_item.{what}", response_id=response_id, output_index=output_index, item=item)


def sequence_number(n: int) -> int:
    """Of the event with the number `n` in the log, which counts from 1."""
    return n - 1


@dataclass
class Begun:
    """What a response's events say of its output items, whether their attempts recorded them or not."""

    items: dict[int, Item] = field(default_factory=dict)
    """As they were begun, by output index."""
    done: set[int] = field(default_factory=set)
    """The output indexes of those that are done."""
    in_progress: bool = False
    """Whether the response was said to be in progress."""

    def read(self, events: Iterable[Event]) -> None:
        for each in events:
            if each.kind == EventKind.ITEM_ADDED:
                said = json.loads(each.data)
                self.items[said["output_index"]] = said["item"]
            elif each.data.startswith(_DONE):
                self.done.add(json.loads(each.data)["output_index"])
            elif each.data.startswith(_IN_PROGRESS):
                self.in_progress = True

    @property
    def next_index(self) -> int:
        return max(self.items, default=-1) + 1


class Delta:
    """Serializes the deltas of one content part or call: all but the text is made once."""

    def __init__(self, type_: str, **fields: Any) -> None:
        self._head = event(type_, **fields, delta="").removesuffix('""}')

    def data(self, text: str) -> str:
        return f"{self._head}{json.dumps(text)}}}"


@dataclass(frozen=True, slots=True)
class ResponseEvent:
    """A logged event on its way to a client."""

    event: Event

    def sse(self) -> bytes:
        """As OpenAI's: the type as the event's name, `sequence_number` in the data. No id: SDKs resume by number."""
        data = self.event.data
        type_ = data[len(_TYPE) : data.index('"', len(_TYPE))]
        number = sequence_number(self.event.id.n)
        return f'event: {type_}\ndata: {{"sequence_number":{number},{data[1:]}\n\n'.encode("ascii")
