"""Arguments of tool calls, as models write them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.arguments import parsed, told

NO_OBJECTS = (
    "",
    "{oops",
    "[1]",
    "null",
    '"x"',
    '{"a": NaN}',
    '{"a": -Infinity}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    "{} {}",
)


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_what_is_no_object_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^The arguments are not .*\.$"):
        parsed(text)
    assert json.loads(told(text)) == {"not_a_json_object": text}


def test_of_two_keys_the_last_counts() -> None:
    """As JSON's readers have it."""
    assert parsed('{"a": 1, "a": 2}') == {"a": 2}


@given(st.text() | st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.lists(inner)).map(json.dumps))
def test_what_is_told_is_always_an_object(text: str) -> None:
    """Whatever the model wrote; what was one stays as it was."""
    assert isinstance(parsed(told(text)), dict)
    assert told(told(text)) == told(text)
