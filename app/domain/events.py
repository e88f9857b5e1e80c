"""Events of a turn, their ids, and their one serialized form.

An event is serialized once, by whoever appends it, as ASCII JSON in llama-stack 0.3.5's shapes: what stands after
`data: ` on the wire, in the Redis log and in Postgres. ASCII, because a UTF-8 character split across reads breaks
several SDKs.
"""

from __future__ import annotations

import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel

from app.domain.errors import TurnFailure

LOST_TAIL_LEAP = 1_000_000
"""Added to `n` when a dead attempt's unrecorded events are gone, so that no number ever means two things."""


class EventId(NamedTuple):
    """`<fence>-<n>`: the attempt that wrote the event, and its number in the turn, counted from 1 across attempts."""

    fence: int
    n: int

    def __str__(self) -> str:
        return f"{self.fence}-{self.n}"

    @classmethod
    def parse(cls, text: str) -> EventId:
        """Raises ValueError: not `<fence>-<n>`."""
        if not re.fullmatch(r"\d{1,9}-\d{1,15}", text):
            raise ValueError(f"{text!r} is not an event id such as 1-42")
        fence, n = text.split("-")
        return cls(int(fence), int(n))


START = EventId(0, 0)
"""The id that the first event of a turn follows."""


class EventKind(StrEnum):
    STEP_START = "step_start"
    STEP_PROGRESS = "step_progress"
    STEP_COMPLETE = "step_complete"
    TURN_AWAITING_INPUT = "turn_awaiting_input"
    TURN_COMPLETE = "turn_complete"
    ERROR = "error"
    ITEM_ADDED = "item_added"
    """An output item of a response was begun."""
    RESPONSE = "response"
    """Any other event of a response but its end."""


_KINDS = {kind.value: kind for kind in EventKind}
TERMINAL = frozenset({EventKind.TURN_COMPLETE, EventKind.ERROR})
LEG_END = TERMINAL | {EventKind.TURN_AWAITING_INPUT}


@dataclass(frozen=True, slots=True)
class Event:
    """One event: `after` is the id that it follows, `data` its ASCII JSON without a newline."""

    id: EventId
    after: EventId
    kind: EventKind
    data: str

    def sse(self) -> bytes:
        """The event as a Server-Sent Event (WHATWG HTML, section 9.2): LF line ends, a space after each colon."""
        return f"id: {self.id.fence}-{self.id.n}\ndata: {self.data}\n\n".encode("ascii")


def to_line(event: Event) -> str:
    """One event as a line: `after id kind data`, the form of pub/sub messages and of segments."""
    return f"{event.after} {event.id} {event.kind} {event.data}"


def from_line(line: str) -> Event:
    after, identifier, kind, data = line.split(" ", 3)
    return Event(trusted_id(identifier), trusted_id(after), _KINDS[kind], data)


def size(events: Iterable[Event]) -> int:
    """Bytes of what they say."""
    return sum(len(event.data) for event in events)


def trusted_id(identifier: str) -> EventId:
    """An id that this program wrote."""
    fence, _, n = identifier.partition("-")
    return EventId(int(fence), int(n))


def pack(events: Sequence[Event]) -> bytes:
    """A segment's content: lines, compressed."""
    return zlib.compress("\n".join(map(to_line, events)).encode("ascii"), level=1)


def unpack(content: bytes, after: EventId = START, limit: int | None = None) -> list[Event]:
    """A segment's events behind `after`, at most `limit` of them: lines cost little, events much more."""
    lines = zlib.decompress(content).decode("ascii").split("\n")
    first = bisect_right(lines, after, key=lambda line: trusted_id(line.split(" ", 2)[1]))
    return [from_line(line) for line in lines[first : None if limit is None else first + limit]]


def ascii_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def dump(model: BaseModel) -> Any:
    """A llama_stack model as plain JSON values, in the field order and time format of the 0.3.5 server."""
    return model.model_dump(mode="json")


def payload(event_type: EventKind, **fields: Any) -> str:
    """`AgentTurnResponseStreamChunk` as ASCII JSON."""
    return ascii_json({"event": {"payload": {"event_type": event_type.value, **fields}}})


def step_start(step_type: str, step_id: str, **metadata: str) -> str:
    return payload(EventKind.STEP_START, step_type=step_type, step_id=step_id, metadata=metadata)


def step_complete(step: BaseModel) -> str:
    details = dump(step)
    return payload(
        EventKind.STEP_COMPLETE, step_type=details["step_type"], step_id=details["step_id"], step_details=details
    )


def turn_awaiting_input(turn: dict[str, Any]) -> str:
    return payload(EventKind.TURN_AWAITING_INPUT, turn=turn)


def turn_complete(turn: dict[str, Any]) -> str:
    return payload(EventKind.TURN_COMPLETE, turn=turn)


def error(failure: TurnFailure) -> str:
    """How a failed or cancelled turn ends: SDKs up to 0.3.5 give a chunk with `.error`, and `Agent` raises it."""
    return ascii_json({"error": failure.as_dict()})


class StepProgress:
    """Serializes the deltas of one step: the hottest path of a turn, so all but the delta is made once."""

    def __init__(self, step_type: str, step_id: str) -> None:
        whole = payload(EventKind.STEP_PROGRESS, step_type=step_type, step_id=step_id, delta=None)
        self._head = whole.removesuffix("null}}}")

    def text(self, text: str) -> str:
        return f'{self._head}{{"type":"text","text":{json.dumps(text)}}}}}}}}}'

    def tool_call(self, tool_call: str | dict[str, Any], parse_status: str) -> str:
        delta = {"type": "tool_call", "tool_call": tool_call, "parse_status": parse_status}
        return f"{self._head}{ascii_json(delta)}}}}}}}"


def number(after: EventId, fence: int, contents: Iterable[tuple[EventKind, str]], first_n: int) -> list[Event]:
    """Gives events their ids: the first follows `after` and has the number `first_n`."""
    numbered = []
    for n, (kind, data) in enumerate(contents, first_n):
        numbered.append(Event(EventId(fence, n), after, kind, data))
        after = numbered[-1].id
    return numbered
