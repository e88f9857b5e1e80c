"""The documents that a turn was given, as text."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
from llama_stack.apis.agents import Document
from llama_stack.apis.common.content_types import URL, TextContentItem

from app.domain.errors import TurnFailure


async def as_text(documents: Sequence[Document], max_bytes: int) -> str:
    """All of them, one after the other. Raises TurnFailure: one of them cannot be had, or is over `max_bytes`."""
    return "\n".join([await _text(document, max_bytes) for document in documents])


async def _text(document: Document, max_bytes: int) -> str:
    if not (document.mime_type.startswith("text/") or document.mime_type in ("application/yaml", "application/json")):
        raise TurnFailure("invalid_request", f"Unexpected document mime type: {document.mime_type}")
    content = document.content
    if isinstance(content, URL):
        text = await _fetch(content.uri, max_bytes)
    elif isinstance(content, TextContentItem):
        text = content.text
    elif isinstance(content, str):
        text = content
    else:
        raise TurnFailure("invalid_request", f"Unexpected document content: {type(content).__name__}")
    if len(text.encode()) > max_bytes:
        raise TurnFailure("invalid_request", f"A document is over {max_bytes} bytes (DOCUMENT_MAX_BYTES)")
    # Postgres cannot read a member out of a JSON value that has U+0000 anywhere in it.
    return text.replace("\0", "")


async def _fetch(uri: str, max_bytes: int) -> str:
    if not uri.startswith(("http://", "https://")):
        raise TurnFailure("invalid_request", f"Unexpected URL: {uri}")
    try:
        async with httpx.AsyncClient(timeout=30) as client, client.stream("GET", uri) as response:
            response.raise_for_status()
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > max_bytes:
                    break
            return content.decode(response.encoding or "utf-8", errors="replace")
    except httpx.HTTPError as error:
        raise TurnFailure("invalid_request", f"The document {uri} cannot be fetched: {error}") from error
