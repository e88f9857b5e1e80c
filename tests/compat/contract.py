"""Compares answers with captured ones, field by field.

Ids and times differ from run to run. An id of theirs is bound to the id that stands in its place in ours when both are
seen for the first time, for the whole of a set: so equal ids must stay equal, and different ones different.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import httpx

Json = Any
Side = Literal["theirs", "ours"]
Found = tuple[str, Json, Json]
"""A path, and what is there in theirs and in ours."""

MISSING = "<missing>"
"""Stands for what one side does not have."""

SERVED = "<served>"
SDK_ROUTES = "sdk-routes"
"""In place of a capture: the routes that SDKs call, whose paths are the routes."""

HEADERS = ("content-type", "transfer-encoding")
SHAPE_ONLY = {"models", "version_426", "toolgroups", "tools", "version", "routes"}
"""Captures that show what was configured: only the types of their rows' fields are compared."""

FREE_FORM = {"metadata", "args", "mcp_endpoint", "input_schema", "output_schema"}
COUNTS = {"input_tokens", "output_tokens", "total_tokens"}

_HEX = r"[0-9a-f]"
_ID = re.compile(
    rf"((?P<kind>[a-z][a-z_]*)_)?({_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}|{_HEX}{{32,64}}|{_HEX}{{8}}_\d+)"
)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z")


@dataclass(frozen=True)
class Answer:
    """The body of a stream is a list of its events: `{"id", "data"}`, those of them that it has."""

    status: int
    headers: dict[str, str]
    body: Json


@dataclass(frozen=True)
class Difference:
    """`capture`: `<set>/<name>`; `path`: keys and indexes, joined by dots; symbols stand for ids and times."""

    capture: str
    path: str
    theirs: Json
    ours: Json

    def __str__(self) -> str:
        return f"{self.capture} {self.path}: theirs {json.dumps(self.theirs)}, ours {json.dumps(self.ours)}"


@dataclass(frozen=True)
class Matching:
    """Equals every text that the pattern matches as a whole."""

    pattern: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and re.fullmatch(self.pattern, other) is not None

    def __hash__(self) -> int:
        return hash(self.pattern)


@dataclass(frozen=True)
class Deviation:
    """Differences that are meant, and why.

    `captures`: globs of `<set>/<name>`. `changes`: by the pattern of a path, in which `*` stands for one part and `**`
    for any, what is there in theirs and in ours; `ANY` and `Matching` stand for many values.
    """

    reason: str
    captures: tuple[str, ...]
    changes: Mapping[str, tuple[Json, Json]]

    def explains(self, difference: Difference) -> set[tuple[str, str]]:
        """By which of its captures and paths."""
        return {
            (capture, path)
            for capture in self.captures
            for path, (theirs, ours) in self.changes.items()
            if fnmatchcase(difference.capture, capture)
            and _path_matches(difference.path, path)
            and (theirs, ours) == (difference.theirs, difference.ours)
        }

    def unused(self, differences: Collection[Difference]) -> set[tuple[str, str]]:
        """Captures and paths of its that explain none of the differences."""
        used = {pair for difference in differences for pair in self.explains(difference)}
        return {(capture, path) for capture in self.captures for path in self.changes} - used


def _path_matches(path: str, pattern: str) -> bool:
    parts = re.split(r"(\*\*|\*)", pattern)
    return bool(re.fullmatch("".join({"**": ".*", "*": r"[^.]+"}.get(part, re.escape(part)) for part in parts), path))


# --- answers ---


def captured(file: Path) -> Answer:
    """What a file of `captures/` says."""
    text = file.read_text()
    if file.suffix == ".json":
        return Answer(200, {"content-type": "application/json"}, json.loads(text))
    head, _, body = text.partition("\n\n")
    status, *lines = head.split("\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(status.split(" ")[1]), headers, _body(headers, body))


def received(response: httpx.Response) -> Answer:
    headers = {name: response.headers[name] for name in HEADERS if name in response.headers}
    return Answer(response.status_code, headers, _body(headers, response.text))


def _body(headers: Mapping[str, str], text: str) -> Json:
    if "event-stream" in headers.get("content-type", ""):
        return list(_events(text))
    return json.loads(text) if text.strip() else None


def _events(text: str) -> Iterator[dict[str, Json]]:
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            event: dict[str, Json] = dict(line.split(": ", 1) for line in lines)
            yield {**event, "data": json.loads(event["data"])}


# --- shapes ---


def shape(value: Json) -> Json:
    """The types of a value; rows of a list are merged into one, whose fields have all the types that they had."""
    if isinstance(value, dict):
        return {key: _type(inner) if key in FREE_FORM else shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_merged([shape(row) for row in value])] if value else []
    return _type(value)


def _type(value: Json) -> str:
    return "null" if value is None else type(value).__name__


def _merged(rows: list[Json]) -> Json:
    if not all(isinstance(row, dict) for row in rows):
        return "|".join(sorted({str(row) for row in rows}))
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: _merged([row.get(key, MISSING) for row in rows]) for key in keys}


# --- comparing ---


class Comparison:
    """Compares the answers of one set, in their order."""

    def __init__(self) -> None:
        self._ours_for: dict[str, str] = {}
        self._theirs_for: dict[str, str] = {}
        self._symbols: dict[str, str] = {}

    def differences(self, capture: str, theirs: Answer, ours: Answer) -> list[Difference]:
        """`capture`: `<set>/<name>`."""
        name = capture.rpartition("/")[2]
        shaped = name in SHAPE_ONLY
        compared = [
            *self._compare("status", theirs.status, ours.status),
            *self._compare("headers", theirs.headers, ours.headers),
        ]
        if theirs.status != ours.status:
            compared.append(("body", theirs.body, ours.body))
        elif shaped:
            compared += self._compare("body", shape(theirs.body), shape(ours.body), shaped=True)
            if name == "routes":
                compared += _unlisted(theirs.body, ours.body)
        else:
            compared += self._compare("body", theirs.body, ours.body)
        return [
            Difference(capture, path, self._shown(one, "theirs", path), self._shown(other, "ours", path))
            for path, one, other in compared
        ]

    def _compare(self, path: str, theirs: Json, ours: Json, *, shaped: bool = False) -> Iterator[Found]:
        if isinstance(theirs, dict) and isinstance(ours, dict):
            yield from self._compare_objects(path, theirs, ours, shaped=shaped)
        elif isinstance(theirs, list) and isinstance(ours, list):
            if not (shaped and not theirs):  # nothing was configured there: no row tells its shape
                yield from self._compare_lists(path, theirs, ours, shaped=shaped)
        elif not self._same(path, theirs, ours):
            yield path, theirs, ours

    def _compare_objects(
        self, path: str, theirs: dict[str, Json], ours: dict[str, Json], *, shaped: bool
    ) -> Iterator[Found]:
        for key in dict.fromkeys([*theirs, *ours]):
            one, other = theirs.get(key, MISSING), ours.get(key, MISSING)
            of_mcp_server = key == "tools" and theirs.get("type") == "mcp_list_tools"
            if of_mcp_server:
                one, other = shape(one), shape(other)
            yield from self._compare(f"{path}.{key}", one, other, shaped=shaped or of_mcp_server)

    def _compare_lists(self, path: str, theirs: list[Json], ours: list[Json], *, shaped: bool) -> Iterator[Found]:
        """Items that have no counterpart are missing; indexes are those of theirs, in front of which ours stand."""
        matcher = SequenceMatcher(None, [*map(_kind, theirs)], [*map(_kind, ours)], autojunk=False)
        for tag, begin, end, our_begin, our_end in matcher.get_opcodes():
            if tag == "equal" or end - begin == our_end - our_begin:
                for index in range(end - begin):
                    place = f"{path}.{begin + index}"
                    yield from self._compare(place, theirs[begin + index], ours[our_begin + index], shaped=shaped)
            else:
                yield from ((f"{path}.{index}", theirs[index], MISSING) for index in range(begin, end))
                yield from ((f"{path}.{begin}", MISSING, ours[index]) for index in range(our_begin, our_end))

    def _same(self, path: str, theirs: Json, ours: Json) -> bool:
        if isinstance(theirs, str) and isinstance(ours, str):
            one, other = _ID.fullmatch(theirs), _ID.fullmatch(ours)
            if one and other and one["kind"] == other["kind"]:
                return self._bound(theirs, ours)
        one, other = _steady(path, theirs), _steady(path, ours)
        return type(one) is type(other) and bool(one == other)

    def _bound(self, theirs: str, ours: str) -> bool:
        """Binds the two if neither was bound before."""
        if theirs not in self._ours_for and ours not in self._theirs_for:
            self._ours_for[theirs], self._theirs_for[ours] = ours, theirs
        return self._ours_for.get(theirs) == ours

    def _symbol(self, identifier: str, side: Side) -> str:
        bound = side == "theirs" or identifier in self._theirs_for
        known = self._theirs_for.get(identifier, identifier) if side == "ours" else identifier
        match = _ID.fullmatch(identifier)
        kind = (match and match["kind"]) or "id"
        return self._symbols.setdefault(known, f"<{kind if bound else f'our {kind}'} {len(self._symbols) + 1}>")

    def _shown(self, value: Json, side: Side, path: str) -> Json:
        if isinstance(value, dict):
            return {key: self._shown(inner, side, f"{path}.{key}") for key, inner in value.items()}
        if isinstance(value, list):
            return [self._shown(inner, side, path) for inner in value]
        if isinstance(value, str) and _ID.fullmatch(value):
            return self._symbol(value, side)
        return _steady(path, value)


def _unlisted(theirs: Json, ours: Json) -> list[Found]:
    """Routes that we do not list; that we list more is no difference."""
    their_routes, our_routes = ([f"{row['method']} {row['route']}" for row in body["data"]] for body in (theirs, ours))
    return [(f"body.routes.{route}", SERVED, MISSING) for route in their_routes if route not in our_routes]


def _steady(path: str, value: Json) -> Json:
    """A value without what differs from run to run, or with the model."""
    key = path.rpartition(".")[2]
    if isinstance(value, str) and _TIME.fullmatch(value):
        return "<time>"
    if isinstance(value, int) and not isinstance(value, bool):
        return "<time>" if key.endswith("_at") else "<count>" if key in COUNTS else value
    return value


def _kind(item: Json) -> Json:
    """What tells an event, a step or an output item from its neighbours: items of the same kind are compared."""
    if not isinstance(item, dict):
        return "scalar"
    data = item.get("data", item)
    payload = data.get("event", {}).get("payload", data) if isinstance(data, dict) else {}
    delta = payload.get("delta")
    if isinstance(delta, dict):
        delta = (delta.get("type"), delta.get("parse_status"), delta.get("text"))
    names = ("event_type", "step_type", "type", "role")
    return (*(str(payload.get(name)) for name in names), delta, "error" in payload)
