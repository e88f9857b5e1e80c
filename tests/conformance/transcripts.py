"""What an engine did with a script, in a form that two engines can be compared in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
IDS = {"turn_id": "turn", "session_id": "session", "step_id": "step", "call_id": "call", "tool_call_id": "call"}
TIMES = {"started_at", "completed_at"}


@dataclass
class Leg:
    """The events of one leg, and whether it failed: `ChatAgent` raises then, ours ends with an error event."""

    events: list[Json] = field(default_factory=list)
    failed: bool = False


@dataclass
class Transcript:
    """`requests`: the bodies that the model server got. `calls`: name and arguments of the server tools invoked."""

    legs: list[Leg] = field(default_factory=list)
    requests: list[Json] = field(default_factory=list)
    calls: list[list[Any]] = field(default_factory=list)

    def copy(self) -> Transcript:
        return copy.deepcopy(self)

    def nodes(self) -> Iterator[Json]:
        """Every JSON object in it."""
        yield from _objects([leg.events for leg in self.legs] + [self.requests, self.calls])


def _objects(value: Any) -> Iterator[Json]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)


def normal(transcript: Transcript) -> Transcript:
    """Ids become ordinals by their first appearance, times become `<time>`."""
    result, seen = transcript.copy(), dict[tuple[str, Any], str]()
    for node in result.nodes():
        for key, value in node.items():
            kind = IDS.get(key) or ("call" if key == "id" and node.get("type") == "function" else None)
            if kind and value is not None:
                count = sum(known == kind for known, _ in seen)
                node[key] = seen.setdefault((kind, value), f"{kind} {count + 1}")
            elif key in TIMES and value is not None:
                node[key] = "<time>"
    return result


def differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Each place where two JSON values differ, one line each."""
    if isinstance(wanted, dict) and isinstance(found, dict) and list(wanted) == list(found):
        return [line for key in wanted for line in differences(wanted[key], found[key], f"{where}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{where}[{index}]")]
    return [] if wanted == found else [f"{where}: wanted {wanted!r}, found {found!r}"]


def payload(event: Json) -> Json:
    found: Json = event["event"]["payload"]
    return found


def kinds(leg: Leg) -> list[str]:
    """The leg in short, for a failure's message."""
    return [payload(event)["event_type"] for event in leg.events] + ["failed"] * leg.failed
