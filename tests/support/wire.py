"""HTTP/1.1 over a bare socket: what came on the wire, byte for byte, and how it ended."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from tests.support import PATIENCE_SECONDS, wait_until

FINAL_CHUNK = b"0\r\n\r\n"


class Wire:
    """One request and its answer, read by a thread as it comes; or not read at all until `start_reading`.

    `receive_buffer` is SO_RCVBUF in bytes: a small one makes the sender wait for the reader.
    """

    def __init__(
        self,
        url: str,
        method: str,
        path: str,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        receive_buffer: int | None = None,
        read: bool = True,
    ) -> None:
        self.raw = b""
        self.over = threading.Event()
        place = urlsplit(url)
        self._host = place.netloc
        self._socket = socket.socket()
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.connect((place.hostname, place.port))
        self.request(method, path, body=body, headers=headers)
        self._thread = threading.Thread(target=self._read, daemon=True)
        if read:
            self.start_reading()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, method: str, path: str, *, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        """Sends a request, the first one or another one on the same connection."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", f"Content-Length: {len(content)}"]
        lines += ["Content-Type: application/json", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + content)

    def take(self, size: int) -> bytes:
        """Reads at most so much, for whoever sets the pace himself; `raw` stays as it is."""
        return self._socket.recv(size)

    def start_reading(self) -> None:
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := self._socket.recv(1 << 20):
                self.raw += data
        except OSError:
            pass
        self.over.set()

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1])

    def header(self, name: str) -> str | None:
        """Of the first answer."""
        for line in self.raw.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return None

    @property
    def body(self) -> bytes:
        """What has come of a chunked body."""
        return body_of(self.raw)

    @property
    def ended_cleanly(self) -> bool:
        """Whether the final chunk came."""
        return self.raw.endswith(FINAL_CHUNK)

    def wait_for(self, text: bytes, timeout: float = PATIENCE_SECONDS) -> None:
        wait_until(lambda: text in self.raw, timeout)

    def wait_over(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Until the server has closed the connection."""
        assert self.over.wait(timeout), f"the connection is still open: {self.raw[-200:]!r}"


def body_of(raw: bytes) -> bytes:
    """What has come of the chunked body of an answer."""
    pieces, at = [], raw.find(b"\r\n\r\n") + 4
    while (line_end := raw.find(b"\r\n", at)) > 0:
        size = int(raw[at:line_end], 16)
        if size == 0:
            break
        pieces.append(raw[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2
    return b"".join(pieces)


def events(body: bytes) -> list[bytes]:
    """The whole events of a stream, without comments: `id: …\\ndata: …`."""
    lines = b"\n".join(line for line in body.split(b"\n") if not line.startswith(b":"))
    return [block for block in lines.split(b"\n\n")[:-1] if block]


def last_id(body: bytes) -> str:
    """The id of the last whole event."""
    return events(body)[-1].partition(b"\n")[0].removeprefix(b"id: ").decode()
