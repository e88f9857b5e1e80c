"""Runs several servers together: all are up, or all are down.

The caller's thread starts them, waits and stops them; a thread for each one carries its output. A server that dies
stops all others, and so does Ctrl-C or SIGTERM. Should the supervisor itself be killed, its children get their stop
signals from the kernel (`launch`).
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Protocol

from app.local.server import LocalError, Server, ending

_POLL_SECONDS = 0.05
_COLOURS = (36, 33, 32, 35, 34, 31)


class Stopped(Exception):
    """Somebody asked for the end: Ctrl-C or SIGTERM."""


class Output(Protocol):
    """Where the children's lines go."""

    def attach(self, server: Server) -> int | None:
        """The file descriptor that a server about to be launched writes to; None: its own log file."""

    def launched(self, server: Server) -> None:
        """The server has its copy of the descriptor now."""

    def close(self) -> None:
        """All servers have ended."""


class LogFiles:
    """Each server writes to its own log file, which begins anew."""

    def attach(self, server: Server) -> int | None:
        server.log.unlink(missing_ok=True)
        return None

    def launched(self, server: Server) -> None:
        pass

    def close(self) -> None:
        pass


class Terminal:
    """All servers' lines on one stream, each behind its server's name, in its own colour on a terminal."""

    def __init__(self, stream: IO[str] | None = None, width: int = 8) -> None:
        self._stream = stream or sys.stdout
        self._width = width
        self._coloured = self._stream.isatty() and "NO_COLOR" not in os.environ
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._write_ends: dict[str, int] = {}

    def attach(self, server: Server) -> int | None:
        read_end, write_end = os.pipe()
        prefix = self._prefix(server.name)
        thread = threading.Thread(target=self._carry, args=(read_end, prefix), name=f"output-{server.name}")
        thread.start()
        self._threads.append(thread)
        self._write_ends[server.name] = write_end
        return write_end

    def launched(self, server: Server) -> None:
        """From here on, the end of the server's processes is the end of its pipe."""
        os.close(self._write_ends.pop(server.name))

    def close(self) -> None:
        for thread in self._threads:
            thread.join(timeout=2)

    def _prefix(self, name: str) -> str:
        label = f"{name:<{self._width}} |"
        if not self._coloured:
            return f"{label} "
        colour = _COLOURS[len(self._threads) % len(_COLOURS)]
        return f"\x1b[{colour}m{label}\x1b[0m "

    def _carry(self, read_end: int, prefix: str) -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                # A terminal that is gone must not stop the reading, on which the server would block.
                with self._lock, suppress(OSError):
                    print(f"{prefix}{line.rstrip()}", file=self._stream, flush=True)


class Supervisor:
    """`with Supervisor(Terminal()) as supervisor: supervisor.start(…); supervisor.wait()`: leaving stops all."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._tiers: list[list[Server]] = []
        self._asked = 0

    def start(self, *servers: Server) -> None:
        """Launches all, then waits until each is ready. Raises LocalError, Stopped."""
        self.launch(*servers)
        self.wait_ready(*servers)

    def launch(self, *servers: Server) -> None:
        """Launches servers that need nothing of each other. Raises LocalError, Stopped."""
        self._tiers.append([])
        for server in servers:
            self.check()
            self._launch(server)

    def wait_ready(self, *servers: Server) -> None:
        """Waits until each of the launched servers is ready. Raises LocalError, Stopped."""
        for server in servers:
            deadline = time.monotonic() + server.ready_seconds
            self._wait_ready(server, deadline)

    def _launch(self, server: Server) -> None:
        descriptor = self._output.attach(server)
        try:
            self._tiers[-1].append(server)
            server.launch(descriptor)
        finally:
            self._output.launched(server)

    def _wait_ready(self, server: Server, deadline: float) -> None:
        while not server.is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise LocalError(server.problem())
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raises Stopped if the end was asked for, LocalError if a server ended by itself."""
        if self._asked:
            raise Stopped
        for server in itertools.chain.from_iterable(self._tiers):
            if server.status is not None:
                raise LocalError(f"{server.name} ended {ending(server.status)}")

    def wait(self) -> None:
        """Returns never: raises Stopped or LocalError."""
        while True:
            self.check()
            time.sleep(_POLL_SECONDS)

    def run[T](self, work: Callable[[], T]) -> T:
        """What `work` returns; it runs in a thread that is left alone if the end comes first.

        Raises what `work` raises, Stopped, LocalError.
        """
        results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                results.put((work(), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=call, daemon=True).start()
        while True:
            with suppress(queue.Empty):
                result, error = results.get(timeout=_POLL_SECONDS)
                if error is not None:
                    self.check()  # a server that died explains more than what came of it
                    raise error
                return result  # type: ignore[return-value]  # T may be None itself
            self.check()

    def stop(self) -> None:
        """Stops all in the reverse order of their launches, at once what was launched together.

        Asked for once more meanwhile, it kills them.
        """
        enough = max(self._asked, 1)
        while self._tiers:
            servers = self._tiers.pop()
            stopping = [threading.Thread(target=server.stop) for server in servers]
            for thread in stopping:
                thread.start()
            while any(thread.is_alive() for thread in stopping):
                time.sleep(_POLL_SECONDS)
                if self._asked > enough:
                    for server in servers:
                        server.hurry()
        self._output.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(_number: int, _frame: FrameType | None) -> None:
            self._asked += 1

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup stays in force
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> Supervisor:
        self._handlers = self._signals()
        self._handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._handlers.__exit__(None, None, None)
