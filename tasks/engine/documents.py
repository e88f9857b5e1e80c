"""The documents that a turn was given: fetched, as text, and as files for its code."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from pathlib import PurePosixPath

from llama_stack.apis.agents import Document

from app.domain.errors import TurnFailure
from app.settings import Settings
from app.stack.extraction import UnreadableError, text_of
from app.stack.fetching import Fetched, FetchError, Rules, fetch
from tasks.tools.sandbox import MAX_FILES

MAX_DOCUMENTS = 100


async def fetched(documents: Sequence[Document], settings: Settings) -> list[Fetched]:
    """All of them, one after the other. Raises TurnFailure: one of them cannot be had, or there are over 100."""
    if len(documents) > MAX_DOCUMENTS:
        raise TurnFailure("invalid_request", f"A turn has {MAX_DOCUMENTS} documents at most, not {len(documents)}")
    rules = Rules.of(settings)
    return [await _fetched(number, document, rules) for number, document in enumerate(documents, 1)]


async def _fetched(number: int, document: Document, rules: Rules) -> Fetched:
    try:
        return await fetch(document.content, document.mime_type, rules)
    except FetchError as error:
        raise TurnFailure("invalid_request", f"Document {number} cannot be had: {error}") from error


async def as_texts(documents: Sequence[Fetched], settings: Settings, *, or_files: bool = False) -> list[str]:
    """The text of each. Raises TurnFailure: one of them has none that can be read.

    `or_files`: its text is empty then, because it is of use without.
    """
    return [await _text(document, settings, or_files) for document in documents]


async def _text(document: Fetched, settings: Settings, or_file: bool) -> str:
    try:
        return await text_of(document, settings.document_text_max_bytes)
    except UnreadableError as error:
        if or_file:
            return ""
        raise TurnFailure("invalid_request", f"A document cannot be read: {error}") from error


def as_files(documents: Sequence[Fetched], folder: Iterable[str]) -> dict[str, bytes]:
    """Their contents by the names of files, no two the same, and none that of a subfolder of the session's `folder`."""
    subfolders = _subfolders(folder)
    files: dict[str, bytes] = {}
    for document in documents:
        files[_free_name(document.name, subfolders | files.keys())] = document.data
    return files


def check_folder(sizes: Mapping[str, int], settings: Settings) -> None:
    """`sizes`: in bytes, by name. Raises TurnFailure: a folder with these files is more than a call may have."""
    limit = settings.sandbox_files_max_bytes
    if sum(sizes.values()) > limit:
        message = f"With these documents the session's files are over {limit} bytes (SANDBOX_FILES_MAX_BYTES)"
        raise TurnFailure("invalid_request", message)
    if len(sizes) + len(_subfolders(sizes)) >= MAX_FILES:
        raise TurnFailure(
            "invalid_request", f"With these documents the session has {MAX_FILES} files, which is too many"
        )


def _subfolders(folder: Iterable[str]) -> set[str]:
    return {str(parent) for name in folder for parent in PurePosixPath(name).parents}


def _free_name(name: str, taken: Collection[str]) -> str:
    stem, dot, extension = name.rpartition(".")
    others = (f"{stem or extension}-{number}{dot}{extension if stem else ''}" for number in count(2))
    return name if name not in taken else next(other for other in others if other not in taken)


def told(files: Mapping[str, bytes]) -> str:
    """What the model is told of the files of a turn, behind the user's message."""
    listed = "".join(f'\n- "{name}" ({len(content)} bytes)' for name, content in files.items())
    return f"\n\nThe code interpreter has these files in its current folder:{listed}"
