"""Documents of every type as text, each by a process of its own where it could be made to work for ever."""

from __future__ import annotations

import asyncio
import contextlib
import io
import subprocess
import threading
import zlib
from typing import Any

import psutil
import pytest
from pypdf import PdfWriter

from app.stack import extraction, reading
from app.stack.extraction import UnreadableError, text_of
from app.stack.fetching import Fetched
from tests.support import wait_until

LIMIT = 10_000

PAGE = """<!doctype html><html><head><title>Camels &amp; wells</title><style>p { color: red }</style>
<script>document.write("<p>not this</p>")</script></head><body><nav><a href="/">Home</a></nav>
<h1>Wells</h1><p>Camels   drink
at <b>wells</b>.<br>Often.</p><!-- nor this --><noscript>nor that</noscript>
<table><tr><th>Well<th>Depth</tr><tr><td>Old<td>12&nbsp;m</tr></table><pre>a
  b</pre><ul><li>one<li>two</ul></body></html>"""
READ = (
    "Camels & wells\n\nHome\n\nWells\n\nCamels drink at wells.\nOften.\n\nWell Depth\n\nOld 12 m\n\na\n  b\n\none\ntwo"
)


def pdf(*pages: str, password: str | None = None) -> bytes:
    """One line of text a page; PdfWriter makes none."""
    whole = pdf_of([f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() for text in pages])
    if password is None:
        return whole
    writer, encrypted = PdfWriter(clone_from=io.BytesIO(whole)), io.BytesIO()
    writer.encrypt(password, algorithm="AES-256")
    writer.write(encrypted)
    return encrypted.getvalue()


def pdf_of(streams: list[bytes], more: bytes = b"") -> bytes:
    """`more`: in the dictionary of each page's stream."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(streams)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(streams)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, stream in enumerate(streams):
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
        objects.append(page.encode() + b"/Resources << /Font << /F1 3 0 R >> >> >>")
        objects.append(b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(stream), more, stream))
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(body))
    return body + head + table + trailer


async def text(data: bytes, mime_type: str = "text/plain", charset: str | None = None, limit: int = LIMIT) -> str:
    return await text_of(Fetched(data, mime_type, "it", charset), limit)


@pytest.mark.parametrize(
    ("data", "mime_type", "expected"),
    [
        (b"plain", "text/plain", "plain"),
        (b"# md <b>", "text/markdown", "# md <b>"),
        (b"a,b\n1,2\n", "text/csv", "a,b\n1,2\n"),
        (b'{"a": 1}', "application/json", '{"a": 1}'),
        (b'{"a": 1}', "application/ld+json", '{"a": 1}'),
        (b"a: 1\n", "application/yaml", "a: 1\n"),
        (b"a: 1\n", "text/yaml", "a: 1\n"),
        (b"some text", "application/octet-stream", "some text"),
        (PAGE.encode(), "text/html", READ),
        (pdf("Camels drink", "at wells"), "application/pdf", "Camels drink\nat wells\n"),
        (pdf("Camels"), "text/plain", "Camels\n"),
        (pdf("Camels", password=""), "application/pdf", "Camels\n"),
        (b"a\0b", "text/plain", "ab"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
async def test_the_text_of_every_type(data: bytes, mime_type: str, expected: str) -> None:
    assert await text(data, mime_type) == expected


RUSSIAN = "Верблюды пьют у колодцев, а погонщики ждут их в тени высоких пальм. "


@pytest.mark.parametrize(
    ("data", "mime_type", "charset", "expected"),
    [
        ("wüste".encode(), "text/plain", None, "wüste"),
        ("wüste".encode("latin-1"), "text/plain", "latin-1", "wüste"),
        ("wüste".encode("utf-16"), "text/plain", None, "wüste"),
        ("wüste".encode("utf-8-sig"), "text/plain", None, "wüste"),
        ("wüste".encode(), "text/plain", "no-such-charset", "wüste"),
        ("wüste".encode(), "text/plain", "no\0charset", "wüste"),
        ("wüste".encode(), "text/plain", "undefined", "wüste"),
        (b"camel-" + b"z" * 9000, "text/plain", "punycode", "camel-" + "z" * 9000),
        (RUSSIAN.encode("cp1251") * 5, "text/plain", None, RUSSIAN * 5),
        ("<meta charset=cp1251><p>да".encode("cp1251"), "text/html", None, "да"),
    ],
)
async def test_charsets(data: bytes, mime_type: str, charset: str | None, expected: str) -> None:
    """Declared, marked, UTF-8, or guessed."""
    assert await text(data, mime_type, charset) == expected


@pytest.mark.parametrize(
    ("data", "mime_type", "why"),
    [
        (b"\x89PNG\r\n\x1a\n\0", "image/png", "it is of the type image/png; what can be read is text.*PDF"),
        (b"\0\1\2", "application/octet-stream", "application/octet-stream"),
        (b"%PDF-1.4 broken", "application/pdf", "it is no PDF that can be read"),
        (pdf("x", password="secret"), "application/pdf", "encrypted"),
        (pdf(""), "application/pdf", "its pages are pictures"),
        (b"x" * (LIMIT + 1), "text/plain", "DOCUMENT_TEXT_MAX_BYTES"),
        (b"<p>" + b"x" * (LIMIT + 1), "text/html", "DOCUMENT_TEXT_MAX_BYTES"),
        (pdf(*["x" * 1000] * 11), "application/pdf", "DOCUMENT_TEXT_MAX_BYTES"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_why_a_document_cannot_be_read(data: bytes, mime_type: str, why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        await text(data, mime_type)


async def test_a_document_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed."""
    monkeypatch.setattr(extraction, "SECONDS", 0.01)
    with pytest.raises(UnreadableError, match=r"within 0\.01 s"):
        await text(PAGE.encode(), "text/html")


def readers() -> list[psutil.Process]:
    """The processes that read a document for this one."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if reading.__file__ in child.cmdline():
                found.append(child)
    return found


ENDLESS = Fetched(b"<a x='" * 200_000, "text/html", "a.html")


async def test_a_document_of_a_turn_that_is_cancelled_is_not_read_on() -> None:
    """It has 25 s of CPU; meanwhile it would hold others up, and the end of its worker."""
    reading_it = asyncio.create_task(text_of(ENDLESS, 2_000_000))
    await asyncio.to_thread(wait_until, readers)
    reading_it.cancel()
    await asyncio.wait([reading_it])
    await asyncio.to_thread(wait_until, lambda: not readers())


async def test_a_document_that_is_cancelled_as_its_reading_begins_is_not_read_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process is there, and whoever began it does not know it yet."""
    begun, known = threading.Event(), threading.Event()

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            begun.set()
            known.wait(60)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    reading_it = asyncio.create_task(text_of(ENDLESS, 2_000_000))
    await asyncio.to_thread(begun.wait, 60)
    reading_it.cancel()
    await asyncio.wait([reading_it])
    known.set()
    await asyncio.to_thread(wait_until, lambda: not readers())


async def test_a_pdf_that_fills_the_memory_is_an_error() -> None:
    """A page of 200 MB in 200 KB."""
    compressor = zlib.compressobj(9)
    bomb = b"".join(compressor.compress(bytes(10_000_000)) for _ in range(20)) + compressor.flush()
    with pytest.raises(UnreadableError):
        await text(pdf_of([bomb], b"/Filter /FlateDecode"), "application/pdf")
