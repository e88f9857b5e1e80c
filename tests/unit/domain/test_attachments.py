"""A turn's attachments, as its steps tell of them."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.attachments import attachment, made_in, media_type


def step(*names: str) -> dict[str, Any]:
    metadata = {"attachments": [attachment("/turn", name) for name in names]} if names else None
    return {"step_type": "tool_execution", "tool_responses": [{"content": "", "metadata": metadata}]}


def test_a_file_that_was_made_again_is_listed_once_where_it_was_made_last() -> None:
    steps = [{"step_type": "inference"}, step("a.png", "b.png"), step(), step("c.csv", "a.png")]
    assert [each["content"]["uri"] for each in made_in(steps)] == [
        "/turn/attachments/b.png",
        "/turn/attachments/c.csv",
        "/turn/attachments/a.png",
    ]


def test_a_name_is_part_of_a_path() -> None:
    """With what has a meaning in a URL written otherwise, and folders left."""
    made = attachment("/turn", "a b/ü?#%.png")
    assert made == {"content": {"uri": "/turn/attachments/a%20b/%C3%BC%3F%23%25.png"}, "mime_type": "image/png"}


@pytest.mark.parametrize("name", ["a.svg", "a.html", "a.js", "a", ".png", "a.png.exe", "a.xml"])
def test_what_could_be_run_is_of_no_type(name: str) -> None:
    assert media_type(name) == "application/octet-stream"


@pytest.mark.parametrize("metadata", [{"attachments": "x"}, {"attachments": [1]}, {"attachments": [{}]}, {"other": 1}])
def test_metadata_of_a_clients_own_tool_may_be_anything(metadata: dict[str, Any]) -> None:
    assert made_in([{"tool_responses": [{"metadata": metadata}]}]) == []
