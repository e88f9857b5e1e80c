"""The documents that a turn was given."""

from __future__ import annotations

from typing import Any

import pytest
from llama_stack.apis.agents import Document

from app.domain.errors import TurnFailure
from app.settings import Settings
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
