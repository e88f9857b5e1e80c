"""The comparison with captured answers sees what it is to see, and only that."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from tests.compat.contract import MISSING, Answer, Comparison, Deviation, Difference, Json, Matching

A, B, C = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "abc")
X, Y, Z = (str(uuid.uuid4()) for _ in range(3))


def differences(theirs: Json, ours: Json, name: str = "turn") -> dict[str, tuple[Json, Json]]:
    """By path."""
    found = Comparison().differences(f"set/{name}", Answer(200, {}, theirs), Answer(200, {}, ours))
    return {one.path: (one.theirs, one.ours) for one in found}


def event(event_type: str, **fields: Any) -> Json:
    return {"data": {"event": {"payload": {"event_type": event_type, **fields}}}}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"a": 1, "b": [None, "x"]}, {"b": [None, "x"], "a": 1}),
        ({"at": "2026-11-23T06:30:12.071474Z"}, {"at": "2027-01-01T00:00:00Z"}),
        ({"created_at": 1795416057}, {"created_at": 1}),
        ({"usage": {"input_tokens": 1}}, {"usage": {"input_tokens": 70}}),
        ([A, B, A], [X, Y, X]),
        (["call_117bcbed_0", f"msg_{A}"], ["call_00000001_0", f"msg_{X}"]),
    ],
)
def test_what_differs_from_run_to_run_is_no_difference(theirs: Json, ours: Json) -> None:
    assert differences(theirs, ours) == {}


@pytest.mark.parametrize(
    ("theirs", "ours", "paths"),
    [
        ({"a": 1}, {"a": 1.0}, {"body.a"}),
        ({"a": 1}, {"a": True}, {"body.a"}),
        ({"a": None}, {}, {"body.a"}),
        ({}, {"a": None}, {"body.a"}),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [2, 1]}}, {"body.a.b.0", "body.a.b.1"}),
        ({"at": "2026-11-23T06:30:12.071474Z"}, {"at": "2026-11-23 06:30:12"}, {"body.at"}),
        ({"completed_at": "2026-11-23T06:30:12Z"}, {"completed_at": None}, {"body.completed_at"}),
        ({"input_tokens": 1}, {"input_tokens": None}, {"body.input_tokens"}),
        ([A, A], [X, Y], {"body.1"}),
        ([A, B], [X, X], {"body.1"}),
        ([f"msg_{A}"], [f"fc_{X}"], {"body.0"}),
        ([A], ["nope"], {"body.0"}),
    ],
)
def test_what_is_different_is_found_where_it_is(theirs: Json, ours: Json, paths: set[str]) -> None:
    assert set(differences(theirs, ours)) == paths


def test_ids_are_the_same_throughout_a_set() -> None:
    comparison = Comparison()
    assert not comparison.differences("set/a", Answer(200, {}, [A, B]), Answer(200, {}, [X, Y]))
    [found] = comparison.differences("set/b", Answer(200, {}, [A, B]), Answer(200, {}, [X, Z]))
    assert (found.path, found.theirs != found.ours) == ("body.1", True)


def test_an_event_too_many_or_too_few_leaves_the_others_in_place() -> None:
    begin, end = event("step_start", step_id=A), event("turn_complete")
    words = [event("step_progress", delta={"type": "text", "text": word}) for word in ("a ", "b ", "c ")]
    assert differences([begin, *words, end], [begin, *words[1:], end]) == {"body.1": (words[0], MISSING)}
    assert differences([begin, *words[:2], end], [begin, *words, end]) == {"body.3": (MISSING, words[2])}
    assert differences([begin, end], [end, begin])


def test_of_rows_the_fields_and_their_types_are_compared() -> None:
    theirs = {"data": [{"identifier": "a", "args": None}, {"identifier": "b", "args": {"x": 1}}]}
    assert not differences(
        theirs, {"data": [{"identifier": "c", "args": {}}, {"identifier": "d", "args": None}]}, "tools"
    )
    lacking = {"data": [{"identifier": 1, "args": None, "id": "c"}]}
    assert set(differences(theirs, lacking, "tools")) == {
        "body.data.0.identifier",
        "body.data.0.args",
        "body.data.0.id",
    }
    assert not differences({"data": []}, theirs, "tools"), "no row tells their shape"


def test_a_route_that_is_not_listed_is_missing() -> None:
    rows = [{"method": "GET", "route": "/v1/a"}, {"method": "POST", "route": "/v1/a"}]
    assert set(differences({"data": rows}, {"data": rows[:1]}, "routes")) == {"body.routes.POST /v1/a"}
    assert not differences({"data": rows[:1]}, {"data": rows}, "routes")


def test_a_deviation_explains_what_it_names_and_tells_what_it_names_in_vain() -> None:
    deviation = Deviation("", ("s*/a", "s*/b"), {"body.*.id": (MISSING, Matching(r"\d-\d"))})
    meant = Difference("s1/a", "body.0.id", MISSING, "1-1")
    assert deviation.explains(meant)
    for other in (
        Difference("s1/c", "body.0.id", MISSING, "1-1"),
        Difference("s1/a", "body.0.item.id", MISSING, "1-1"),
        Difference("s1/a", "body.0.id", "1-1", "1-1"),
        Difference("s1/a", "body.0.id", MISSING, "one"),
    ):
        assert not deviation.explains(other)
    assert deviation.unused([meant]) == {("s*/b", "body.*.id")}
