"""The documents that a turn was given."""

from __future__ import annotations

from typing import Any

import pytest
from llama_stack.apis.agents import Document

from app.domain.errors import TurnFailure
from app.settings import Settings
from app.stack.fetching import Fetched
from tasks.engine import documents

SETTINGS = Settings(
    _env_file=None, database_url="postgresql://unused", document_max_bytes=200, document_text_max_bytes=100
)


async def texts(*given: dict[str, Any]) -> list[str]:
    fetched = await documents.fetched([Document(**each) for each in given], SETTINGS)
    return await documents.as_texts(fetched, SETTINGS)


async def test_documents_are_read_in_order() -> None:
    """Given as text, as items, or as a URL."""
    item = {"type": "text", "text": "two"}
    assert await texts(
        {"content": "one", "mime_type": "text/plain"},
        {"content": item, "mime_type": "application/json"},
        {"content": [item, item], "mime_type": "text/markdown"},
        {"content": {"uri": "data:text/html,<p>three<script>x</script>"}, "mime_type": ""},
        {"content": "a\0b", "mime_type": "text/plain"},
    ) == ["one", "two", "two\ntwo", "three", "ab"]


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"content": "x", "mime_type": "application/pdf"}, "no PDF"),
        ({"content": "x", "mime_type": "image/png"}, "type image/png; what can be read is text"),
        ({"content": {"uri": "file:///etc/passwd"}, "mime_type": "text/plain"}, "not 'file'"),
        ({"content": "é" * 51, "mime_type": "text/plain"}, "DOCUMENT_TEXT_MAX_BYTES"),
        ({"content": "x" * 201, "mime_type": "text/plain"}, "DOCUMENT_MAX_BYTES"),
        ({"content": {"uri": "http://127.0.0.1:1/none"}, "mime_type": "text/plain"}, "FETCH_ALLOWED"),
    ],
)
async def test_a_document_that_cannot_be_had_fails_the_turn(document: dict[str, Any], why: str) -> None:
    """Its type, its place, its size."""
    with pytest.raises(TurnFailure, match=why) as failure:
        await texts(document)
    assert failure.value.code == "invalid_request"


async def test_a_turn_has_a_hundred_documents_at_most() -> None:
    with pytest.raises(TurnFailure, match="100 documents"):
        await texts(*[{"content": "x", "mime_type": "text/plain"}] * 101)


async def test_what_cannot_be_read_may_be_a_file_alone() -> None:
    """Where code can use it: it has no text to be searched."""
    given = [Fetched(b"\x89PNG", "image/png", "plot.png"), Fetched(b"text", "text/plain", "a.txt")]
    assert await documents.as_texts(given, SETTINGS, or_files=True) == ["", "text"]


def test_a_file_has_the_name_of_no_other() -> None:
    """Nor of a folder that code has made; that of a file of the session takes its place."""
    given = [Fetched(b"1", "text/csv", name) for name in ("data", "a.csv", "a.csv", "old.csv")]
    assert [*documents.as_files(given, ["data/deep/x.csv", "old.csv"])] == ["data-2", "a.csv", "a-2.csv", "old.csv"]


def test_a_folder_has_room_for_its_documents() -> None:
    """In bytes, and in files and folders: with more, no code would run in it."""
    full = dict.fromkeys([f"folder/{number}" for number in range(997)], 1)
    documents.check_folder(full, SETTINGS)
    with pytest.raises(TurnFailure, match="1000 files"):
        documents.check_folder(full | {"one more": 1}, SETTINGS)
    with pytest.raises(TurnFailure, match="SANDBOX_FILES_MAX_BYTES"):
        documents.check_folder({"a": SETTINGS.sandbox_files_max_bytes + 1}, SETTINGS)
