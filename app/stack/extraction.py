"""The text of a document, whatever it came as: text as it is, HTML as it reads, PDF page by page.

HTML and PDF are read by a process of their own (`app.stack.reading`, run as a script): both parsers can be made to
work for minutes, or to fill the memory, and a thread of this process that did would hold up every turn in it.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chardet

from app.stack import reading
from app.stack.fetching import UNKNOWN_TYPE, Fetched

SECONDS = 30.0
SUPPORTED = "text/*, HTML, Markdown, CSV, JSON, YAML, XML and PDF"

_AT_ONCE = 2
_THREADS = ThreadPoolExecutor(_AT_ONCE, "documents")
_SAMPLE_BYTES = 65_536
_PDF = b"%PDF-"
_HTML = frozenset({"text/html", "application/xhtml+xml"})
_TEXTS = frozenset({
    "application/csv", "application/javascript", "application/json", "application/markdown", "application/toml",
    "application/x-ndjson", "application/x-yaml", "application/xml", "application/yaml", "application/jsonl",
})  # fmt: skip
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
_NO_CHARSETS = frozenset({"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"})
"""Of Python's encodings: not for documents. A megabyte of Punycode takes it hours."""
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset=[\"']?([\w-]{1,40})", re.IGNORECASE)


class UnreadableError(ValueError):
    """No text can be had from it. The message is for the user."""


async def text_of(document: Fetched, max_bytes: int) -> str:
    """Its text, without U+0000, which Postgres's JSON cannot be asked for.

    Raises UnreadableError: its type is not supported, it is broken or encrypted, it takes over 30 s, or its text is
    over `max_bytes`.
    """
    child = _Child()
    reading_it = asyncio.get_running_loop().run_in_executor(_THREADS, _text, document, max_bytes, child)
    try:
        text = await reading_it
    finally:
        child.kill()  # of a turn that was cancelled; one that has ended is not touched
    if len(text.encode(errors="replace")) > max_bytes:
        raise _too_long(document, max_bytes)
    return text.encode(errors="replace").decode().replace("\0", "")


class _Child:
    """The process that reads a document, if there is one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._unwanted = False

    def begun(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        if self._unwanted:
            process.kill()

    def kill(self) -> None:
        """From another thread; also one that is only just beginning."""
        self._unwanted = True
        if self._process:
            self._process.kill()


def _text(document: Fetched, max_bytes: int, child: _Child) -> str:
    kind, data = document.mime_type, document.data
    if data.startswith(_PDF) or kind == "application/pdf":  # whatever it was said to be
        return _read("pdf", document, data, max_bytes, child)
    if kind in _HTML:
        return _read("html", document, _decoded(document).encode(errors="replace"), max_bytes, child)
    if kind.startswith("text/") or kind in _TEXTS or kind.endswith(("+json", "+xml", "+yaml")):
        return _decoded(document)
    if kind == UNKNOWN_TYPE and b"\0" not in data and (text := _as_utf8(data)) is not None:
        return text
    raise UnreadableError(f"{document.name} is of the type {kind}; what can be read is {SUPPORTED}")


def _decoded(document: Fetched) -> str:
    """By its byte order mark, its declared charset, as UTF-8, or as whatever it looks like."""
    data = document.data
    declared = document.charset
    if declared is None and document.mime_type in _HTML and (found := _META_CHARSET.search(data[:1024])):
        declared = found[1].decode()
    marked = next((charset for bom, charset in _BOMS if data.startswith(bom)), None)
    for charset in (marked, declared, "utf-8"):
        try:
            if charset and codecs.lookup(charset).name not in _NO_CHARSETS:
                return data.decode(charset)
        except (LookupError, ValueError):
            continue
    guessed = chardet.detect(data[:_SAMPLE_BYTES])["encoding"] or "cp1252"
    return data.decode(guessed, errors="replace")


def _as_utf8(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _read(kind: str, document: Fetched, data: bytes, max_bytes: int, child: _Child) -> str:
    command = [sys.executable, "-I", str(Path(reading.__file__)), kind, str(max_bytes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:  # noqa: S603
        child.begun(process)
        try:
            text, problem = process.communicate(data, SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise UnreadableError(f"{document.name} was not read within {SECONDS:g} s") from error
    if process.returncode == reading.TOO_LONG:
        raise _too_long(document, max_bytes)
    if process.returncode == reading.UNREADABLE:
        raise UnreadableError(f"{document.name} {problem.decode(errors='replace').strip()}")
    if process.returncode:
        raise UnreadableError(f"{document.name} cannot be read: its {kind.upper()} takes too much memory or time")
    return text.decode(errors="replace")


def _too_long(document: Fetched, max_bytes: int) -> UnreadableError:
    return UnreadableError(f"the text of {document.name} is over {max_bytes} bytes (DOCUMENT_TEXT_MAX_BYTES)")
