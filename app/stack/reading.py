"""Reads a PDF or HTML document on standard input and writes its text: `python reading.py pdf|html MAX_BYTES`.

Run as a script, in a process of its own (`app.stack.extraction`); it imports nothing of this program. Its CPU time and
memory are limited, where the system knows how. Ends with `TOO_LONG`, or `UNREADABLE` and why on standard error.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser

TOO_LONG = 3
UNREADABLE = 4
MAX_PAGES = 2000
CPU_SECONDS = 25
MEMORY_BYTES = 1_073_741_824

_DROPPED = frozenset({"script", "style", "noscript", "template", "svg", "iframe", "object"})
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption", "figure",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre",
    "section", "table", "title", "tr", "ul",
})  # fmt: skip
_KEPT = "\0"
"""A space in `pre`."""
_SPACES = re.compile(r"[ \t\r\f\v\xa0]+")


class Unreadable(Exception):
    pass


class TooLong(Exception):
    pass


class _Reader(HTMLParser):
    """The text that a reader sees: no scripts, no styles; blocks on lines of their own, cells behind a tab."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._dropped: str | None = None
        self._depth = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if self._dropped:
            self._depth += tag == self._dropped
        elif tag in _DROPPED:
            self._dropped, self._depth = tag, 1
        elif tag in ("td", "th"):
            self._pieces.append("\t")
        elif tag in _BLOCKS:
            self._pieces.append("\n")
        self._verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            self._depth -= tag == self._dropped
            self._dropped = self._dropped if self._depth else None
        elif tag in _BLOCKS:
            self._pieces.append("\n")
        self._verbatim = max(0, self._verbatim - (tag == "pre"))

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        if tag in _BLOCKS and not self._dropped:
            self._pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._pieces.append(data.replace(" ", _KEPT) if self._verbatim else data.replace("\n", " "))

    def text(self) -> str:
        lines = (_SPACES.sub(" ", line).strip() for line in "".join(self._pieces).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip().replace(_KEPT, " ")


def read_html(data: bytes) -> Iterator[str]:
    reader = _Reader()
    reader.feed(data.decode())
    reader.close()
    yield reader.text()


def read_pdf(data: bytes) -> Iterator[str]:
    """Page by page, so that nothing is read beyond the limit."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("is encrypted: its password is not known")
        if len(reader.pages) > MAX_PAGES:
            raise Unreadable(f"has {len(reader.pages)} pages, more than the {MAX_PAGES} that are read")
        for page in reader.pages:
            yield page.extract_text() + "\n"
    except (Unreadable, MemoryError):
        raise
    except PyPdfError as error:
        raise Unreadable(f"is no PDF that can be read: {error}") from error
    except Exception as error:  # whatever a broken file makes of the parser
        raise Unreadable(f"is no PDF that can be read: {type(error).__name__}") from error


def limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main(kind: str, max_bytes: int) -> None:
    limit()
    logging.disable()  # pypdf tells there what is wrong with a file; standard error is for one sentence
    data = sys.stdin.buffer.read()
    written, seen = 0, False
    for piece in read_pdf(data) if kind == "pdf" else read_html(data):
        encoded = piece.encode(errors="replace")
        written, seen = written + len(encoded), seen or bool(piece.strip())
        if written > max_bytes:
            raise TooLong
        sys.stdout.buffer.write(encoded)
    if kind == "pdf" and not seen:
        raise Unreadable("has no text: its pages are pictures")


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except TooLong:
        sys.exit(TOO_LONG)
    except Unreadable as error:
        sys.stderr.write(str(error))
        sys.exit(UNREADABLE)
