"""What this program has ever written stays readable: segments in Postgres, lines and entries in Redis.

Never change a constant here: they are what is in people's databases. A form that is written in a new way gets constants
of its own. Two adjacent versions also read each other's: what one publishes, followers of the other get.
"""

from __future__ import annotations

import base64

from app.domain.events import Event, EventId, EventKind, from_line, to_line, unpack
from app.events.log import _events

SEGMENT_0_1 = base64.b64decode(
    "eAGtUcFuwjAMve8rIp+XKU07rfS634iETGMQUpdWiUEgxL/jlEawGwfeIXZeYuf5pdI/yurKZLQqMU3rxBhZXYCOFBi6C0x4Hkb0OZ25NZ8n"
    "gg4et+HzvlkO9mFLkUJPhd9LMVQLtBXopq5r3TZNo7+fIAV/xOiRUZ67Cj4e6kq2uuuc4riLlNLLUktBUfUOtZ6GWSoszZhOLP3n0EFAdzCG"
    "tkdS7mCNbSX4tvay9najHJwcuAD/5lyV/6iMohjHmOfLMfvfjz4736OYOwzkZ79Swl1mfwv7JR1viN+QrQ=="
)
STEP = '"step_type":"inference","step_id":"11111111-2222-4333-8444-555555555555"'
DATA_0_1 = (
    f'{{"event":{{"payload":{{"event_type":"step_start",{STEP},"metadata":{{}}}}}}}}',
    f'{{"event":{{"payload":{{"event_type":"step_progress",{STEP},'
    r'"delta":{"type":"text","text":"na\u00efve \u2028 \ud83d\udc2b \"x\"\n"}}}}',
    '{"error":{"code":"cancelled","message":"Cancelled."}}',
)
LINES_0_1 = (
    f"1-7 2-1000008 step_start {DATA_0_1[0]}",
    f"2-1000008 2-1000009 step_progress {DATA_0_1[1]}",
    f"2-1000009 2-1000010 error {DATA_0_1[2]}",
)
TAIL_0_1 = [
    ("2-1000008", {"a": "1-7", "k": "step_start", "d": DATA_0_1[0]}),
    ("2-1000009", {"a": "2-1000008", "k": "step_progress", "d": DATA_0_1[1]}),
    ("2-1000010", {"a": "2-1000009", "k": "error", "d": DATA_0_1[2]}),
]
EVENTS = [
    Event(EventId(2, 1000008), EventId(1, 7), EventKind.STEP_START, DATA_0_1[0]),
    Event(EventId(2, 1000009), EventId(2, 1000008), EventKind.STEP_PROGRESS, DATA_0_1[1]),
    Event(EventId(2, 1000010), EventId(2, 1000009), EventKind.ERROR, DATA_0_1[2]),
]


def test_a_segment_of_0_1_is_read() -> None:
    assert unpack(SEGMENT_0_1) == EVENTS


def test_a_published_line_of_0_1_is_read_and_written() -> None:
    assert [from_line(line) for line in LINES_0_1] == EVENTS
    assert [to_line(event) for event in EVENTS] == list(LINES_0_1)


def test_a_tail_of_0_1_is_read() -> None:
    assert _events(TAIL_0_1) == EVENTS


def test_every_kind_of_0_1_is_known() -> None:
    kinds = ("step_start", "step_progress", "step_complete", "turn_awaiting_input", "turn_complete", "error")
    assert [from_line(f"1-1 1-2 {kind} {{}}").kind.value for kind in kinds] == list(kinds)
