"""How a web process goes down: no new turns, a grace for what is open, then cut connections, never clean ends.

uvicorn alone waits for open streams as long as they take; sse-starlette alone ends them all within half a second. So
uvicorn hears of a signal only when nothing is open any more, or the grace is over.
"""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.domain.error_bodies import error_body

logger = logging.getLogger(__name__)

ECHO_SECONDS = 2.0
"""A child of `uvicorn --workers` hears the same signal twice, if its sender (a terminal, systemd) tells all processes:
from the sender, and up to a second later from uvicorn's supervisor."""

FLUSH_SECONDS = 1.0
"""What clients get to read the end of an answer that was given in time."""

_STREAMS = re.compile(r"/agents/[^/]+/session/[^/]+/turn(/[^/]+/(resume|events))?$|/completions$")


class Cut(Exception):
    """A response that has begun cannot be ended properly; its connection is cut, so that the client sees an error."""


@dataclass(eq=False)
class _Request:
    task: asyncio.Task[Any] | None
    streams: bool = False


class GracefulStop:
    """What is open in this process, and whether it is stopping."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._requests: set[_Request] = set()
        self._server: uvicorn.Server | None = None
        self._signal = 0
        self._asked_at = 0.0
        self._aborted = False
        self._told_uvicorn = False

    @property
    def stopping(self) -> bool:
        return self._signal != 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Stands between SIGTERM and SIGINT and uvicorn, on the running loop. Does nothing without uvicorn."""
        server = _running_uvicorn()
        if server is None:
            yield
            return
        self._server = server
        loop = asyncio.get_running_loop()

        def heard(number: int, _: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._heard, number)

        handlers = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def request(self) -> Iterator[_Request]:
        """Counts a request as open."""
        request = _Request(asyncio.current_task())
        self._requests.add(request)
        try:
            yield request
        finally:
            self._requests.discard(request)
            if self.stopping and not self._requests:
                self._tell_uvicorn()

    def _heard(self, number: int) -> None:
        now = asyncio.get_running_loop().time()
        if not self.stopping:
            self._signal, self._asked_at = number, now
            self._begin()
        elif multiprocessing.parent_process() is None or now - self._asked_at > ECHO_SECONDS:
            self._abort()

    def _begin(self) -> None:
        assert self._server
        for listener in getattr(self._server, "servers", ()):  # there are none before the lifespan has started
            listener.close()
        asyncio.get_running_loop().call_later(self._grace, self._abort)
        if self._requests:
            name, count = signal.Signals(self._signal).name, len(self._requests)
            logger.info("%s: no new turns; %d open requests have %g s to end", name, count, self._grace)
        else:
            self._tell_uvicorn()

    def _abort(self) -> None:
        """Cuts every connection; what its client has not read is lost to it."""
        assert self._server
        streams = sum(request.streams for request in self._requests)
        if self._requests and not self._aborted:
            others = len(self._requests) - streams
            logger.warning("%d streams and %d other requests were aborted: clients join again", streams, others)
        self._aborted = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for request in self._requests:
            if request.task:
                request.task.cancel()
        self._tell_uvicorn()

    def _tell_uvicorn(self) -> None:
        """It closes idle connections, waits for the others, and ends the lifespan."""
        assert self._server
        if self._told_uvicorn:
            return
        self._told_uvicorn = True
        if self._server.config.timeout_graceful_shutdown is None:
            self._server.config.timeout_graceful_shutdown = math.ceil(self._grace + FLUSH_SECONDS)
        self._server.handle_exit(self._signal, None)


def _running_uvicorn() -> uvicorn.Server | None:
    """The server whose signal handlers are installed: those that `uvicorn.Server.capture_signals` sets."""
    if threading.current_thread() is not threading.main_thread():
        return None
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None


class Requests:
    """ASGI middleware: refuses new streams while the process stops, and cuts connections."""

    def __init__(self, app: ASGIApp, stop: GracefulStop) -> None:
        self._app = app
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._stop.stopping and _STREAMS.search(scope["path"]):
            await _refusal(scope["path"])(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stop.request() as request:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    request.streams = headers.get("content-type", "").startswith("text/event-stream")
                    if self._stop.stopping:
                        headers["Connection"] = "close"
                await send(message)

            try:
                await self._app(scope, receive, noted)
            except Cut as cut:
                logger.warning("%s: cut off: %s", scope["path"], cut)
                _let_go(cut)
                await _cut(receive)
            except asyncio.CancelledError:
                await _cut(receive)


def _let_go(error: BaseException | None) -> None:
    """Takes the frames from an exception and from those behind it.

    They hold what the client did not take, and circles among them keep it until a full garbage collection, which is
    rare here (`app.telemetry.settle_memory`): each cut stream left about half a megabyte behind.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _refusal(path: str) -> JSONResponse:
    headers = {"Retry-After": "1", "Connection": "close"}
    message = "This web process is stopping: try again, another one will answer"
    return JSONResponse(error_body(path, 503, message), 503, headers)


async def _cut(receive: Receive) -> None:
    """Aborts the request's connection; returns when uvicorn knows, which says nothing then of the unfinished answer.

    `receive` is a method of uvicorn's, which holds the connection. Other servers are left to close it themselves.
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if transport is None:
        return
    transport.abort()
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await receive())["type"] != "http.disconnect":
                pass
