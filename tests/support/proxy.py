"""A TCP proxy in front of a real server, which breaks connections in the ways that networks do.

It understands no protocol: bytes pass as they come. It runs in a thread with an event loop of its own, so that a test
controls it from plain code; each control has taken effect when it returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from app.local.server import HOST, free_port
from tests.support import PATIENCE_SECONDS

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CHUNK_BYTES = 65_536
_CONTROL_SECONDS = 60


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    seen: bytes = b""
    may_lose: bool = False
    lose_next_answer: bool = False


class TcpProxy:
    """`with TcpProxy("127.0.0.1", 5432) as proxy: …` listens on `proxy.port` of the loopback.

    - `cut()` resets all connections at once; new ones are served.
    - `refuse()` stops listening, `accept()` starts again, on the same port; what is connected stays so.
    - `stall()` forwards nothing any more, in either direction, and says nothing: an unreachable server. Connections
      are accepted, and wait. `flow()` forwards what has piled up, late as it is.
    - `stall_at(pattern)` stalls by itself when a client sends `pattern`, before it is forwarded.
    - `lose_reply_after(pattern)` forwards the client's bytes that contain `pattern`, waits until the server answers,
      and then resets the client's connection instead of passing the answer on. With `since`, only on a connection
      whose client has sent that before: `lose_reply_after(b"COMMIT", since=b"INSERT INTO turns")`.

    For TLS it is of no use to look for a pattern: connect with `sslmode=disable`.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self.port = free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._stall_at = b""
        self._stalled = threading.Event()
        self._lose_after = self._lose_since = b""
        self._losses_left = 0
        self._lost = threading.Semaphore(0)

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.cut()
        asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result(_CONTROL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONTROL_SECONDS)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def cut(self) -> None:
        def reset() -> None:
            for connection in list(self._connections):
                _reset(connection.client)
                if connection.server is not None:
                    _reset(connection.server)

        self._control(reset)

    def refuse(self) -> None:
        def stop() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._control(stop)

    def accept(self) -> None:
        async def start() -> None:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, HOST, self.port)

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(_CONTROL_SECONDS)

    def stall(self) -> None:
        self._control(self._flowing.clear)

    def flow(self) -> None:
        def forward() -> None:
            self._stall_at = b""
            self._flowing.set()

        self._control(forward)

    def stall_at(self, pattern: bytes) -> None:
        """Wait for it with `wait_stalled`; `flow` ends it."""

        def arm() -> None:
            self._stalled.clear()
            self._stall_at = pattern

        self._control(arm)

    def wait_stalled(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Returns when a pattern of `stall_at` was seen. Raises TimeoutError (seconds)."""
        if not self._stalled.wait(timeout):
            raise TimeoutError(f"nobody sent {self._stall_at!r} within {timeout} s")

    def lose_reply_after(self, pattern: bytes, times: int = 1, *, since: bytes = b"") -> None:
        """For the next `times` answers; wait for each with `wait_lost`. `times=0` ends it."""

        def arm() -> None:
            self._lose_after, self._losses_left, self._lose_since = pattern, times, since
            for connection in self._connections:
                connection.may_lose = False

        self._control(arm)

    def wait_lost(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Returns when one more reply was lost since the last call. Raises TimeoutError (seconds)."""
        if not self._lost.acquire(timeout=timeout):
            raise TimeoutError(f"no reply to {self._lose_after!r} was lost within {timeout} s")

    def _control(self, action: Callable[[], object]) -> None:
        async def act() -> None:
            action()

        asyncio.run_coroutine_threadsafe(act(), self._loop).result(_CONTROL_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            await self._flowing.wait()
            from_server, connection.server = await asyncio.open_connection(*self._target)
            await asyncio.gather(self._upstream(connection, reader), self._downstream(connection, from_server))
        except OSError:
            _reset(writer)
        finally:
            self._connections.discard(connection)

    async def _upstream(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        assert connection.server is not None
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                self._notice(connection, data)
                await self._flowing.wait()
                connection.server.write(data)
                await connection.server.drain()
        connection.server.close()

    def _notice(self, connection: _Connection, data: bytes) -> None:
        """Looks for the patterns in what a client sends; the end of the last chunk may be the start of one."""
        recent = connection.seen + data
        if self._stall_at and self._stall_at in recent:
            self._stall_at = b""
            self._flowing.clear()
            self._stalled.set()
        connection.may_lose |= self._lose_since in recent
        if self._losses_left and connection.may_lose and self._lose_after in recent:
            self._losses_left -= 1
            connection.lose_next_answer = True
            recent = b""
        longest = max(len(self._stall_at), len(self._lose_after), len(self._lose_since))
        connection.seen = recent[-(longest - 1) :] if longest > 1 else b""

    async def _downstream(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if connection.lose_next_answer:
                    _reset(connection.client)
                    self._lost.release()
                    return
                await self._flowing.wait()
                connection.client.write(data)
                await connection.client.drain()
        connection.client.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """The other side gets an RST, not a FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
