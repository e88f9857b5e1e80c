"""Files that a turn made, as its client is told of them: `output_attachments`, each with the path to fetch it at.

They are recorded with the response of the tool that made them, in its `metadata`, so that a turn's attachments are a
function of its steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

METADATA = "attachments"
"""The member of a tool response's `metadata` that lists `Attachment`s."""

SAFE_TYPES = {
    ".csv": "text/csv",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".md": "text/markdown",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".txt": "text/plain",
    ".webp": "image/webp",
}
"""By extension: types that no browser runs anything of."""


class _Uri(BaseModel):
    uri: str


class _Attachment(BaseModel):
    content: _Uri
    mime_type: str


OTHER_TYPE = "application/octet-stream"


def media_type(name: str) -> str:
    """The type that a file is served as, by its name: code chose both, so it is one that cannot do harm."""
    return SAFE_TYPES.get(PurePosixPath(name).suffix.lower(), OTHER_TYPE)


def attachment(turn_path: str, name: str) -> dict[str, Any]:
    """`Attachment`. `turn_path`: of the turn; a path and no URL, since a server may have many names."""
    return {"content": {"uri": f"{turn_path}/attachments/{quote(name)}"}, "mime_type": media_type(name)}


def made_in(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The attachments of a turn with these steps, in the order in which they were last made."""
    found: dict[str, dict[str, Any]] = {}
    for each in _listed(steps):
        uri = each["content"]["uri"]
        found.pop(uri, None)
        found[uri] = each
    return list(found.values())


def _listed(steps: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those that the code interpreter made: what a client's own tool has under that name may be anything."""
    for step in steps:
        for response in step.get("tool_responses") or ():
            listed = (response.get("metadata") or {}).get(METADATA)
            for each in listed if isinstance(listed, list) else ():
                with suppress(ValidationError):
                    yield _Attachment.model_validate(each).model_dump()
