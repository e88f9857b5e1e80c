"""The HTTP client that MCP's transports are given, which does what they leave out.

A request that fails is the failure of whoever asked, told at once: `mcp` lets the whole session die of it, with all
other calls, or says nothing. What an answer may have of bytes is limited while it is read. Redirects are followed
within the server's origin only (by `mcp`): headers may be secret.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import httpx
from mcp.types import JSONRPCMessage
from pydantic import ValidationError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 30
_REFUSED = (401, 403)
_NOT_SEEN = (400, 404)
"""The server does not know the session: it was restarted, or has forgotten it."""
_ANYTHING = "*/*"
"""Accepts who gets the answer elsewhere (over SSE)."""
_END_OF_EVENT = re.compile(rb"\n\n|\r\n\r\n")
_ID_OF_EVENT = re.compile(rb"[\r\n]id:")


class NotDelivered(ConnectionError):
    """The server has surely not begun with what it was asked."""


class Broken(ConnectionError):
    """The session is over, and the server may have begun with what it was asked."""


class Unauthorized(ConnectionError):
    """The server wants credentials, or others."""


class TooLarge(ConnectionError):
    """The server's answer is."""


class Wire(httpx.AsyncClient):
    """Without a time limit for reading: callers have theirs, and a tool may be silent for as long as it is given.

    `max_bytes`: of one message of the server.
    """

    def __init__(self, headers: Mapping[str, str], max_bytes: int) -> None:
        # What is packed could be anything unpacked.
        headers = {**headers, "Accept-Encoding": "identity"}
        super().__init__(headers=headers, timeout=httpx.Timeout(CONNECT_SECONDS, read=None), verify=_tls())
        self._max_bytes = max_bytes
        self._expected: dict[int, asyncio.Future[Any]] = {}

    @contextmanager
    def expecting(self, request_id: int, failure: asyncio.Future[Any]) -> Iterator[None]:
        """Inside, the future gets the exception if the request of this id fails on its way there or back."""
        self._expected[request_id] = failure
        try:
            yield
        finally:
            del self._expected[request_id]

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        message = await _message(request)
        asks = "method" in message and "id" in message
        failure = self._expected.get(message["id"]) if asks else None
        if failure is None and (asks or not message):
            return self._limited(await super().send(request, **options), None)
        try:
            response = self._limited(await super().send(request, **options), failure)
            try:
                await _check(request, response, asks=asks)
            except BaseException:
                await response.aclose()
                raise
            return response
        except (httpx.RequestError, ConnectionError) as error:
            if failure is None:
                logger.debug("an MCP server did not take a notification or an answer: %s", type(error).__name__)
            else:
                _fail(failure, reason(error))
            # To the transport it is an answer that is still to come.
            return httpx.Response(httpx.codes.ACCEPTED, request=request)

    def _limited(self, response: httpx.Response, failure: asyncio.Future[Any] | None) -> httpx.Response:
        if response.headers.get("content-encoding", "identity") != "identity":
            response.headers["content-encoding"] = "identity"  # it was not asked to pack
        if not response.is_closed:
            response.stream = Limited(response, self._max_bytes, lambda error: self._broken(failure, error))
        return response

    def _broken(self, failure: asyncio.Future[Any] | None, error: Exception) -> None:
        """A stream that is nobody's own may have had anybody's answer; that it breaks is told by `mcp`."""
        if failure is not None:
            _fail(failure, error)
        elif isinstance(error, TooLarge):
            for each in self._expected.values():
                _fail(each, Broken(str(error)))


class Limited(httpx.AsyncByteStream):
    """A body of which no message may have more than `limit` bytes; in a stream of events, each is one.

    `on_failure` hears why the body ended before its time.
    """

    def __init__(self, response: httpx.Response, limit: int, on_failure: Callable[[Exception], object]) -> None:
        self._stream = cast(httpx.AsyncByteStream, response.stream)
        self._is_events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
        self._limit = limit
        self._on_failure = on_failure
        self._size = 0
        self._seen = b"\n"
        self._has_ids = False
        """Then `mcp` asks for the rest of a stream that broke."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                self._count(part)
                yield part
            if self._is_events and not self._has_ids:  # `mcp` reads no further than to the answer
                self._on_failure(ConnectionError("the MCP server ended its answer before the result"))
        except (httpx.RequestError, ConnectionError) as error:
            if isinstance(error, ConnectionError) or not self._has_ids:
                self._on_failure(reason(error))
            raise

    def _count(self, part: bytes) -> None:
        """Raises ConnectionError: the message is too large."""
        self._size += len(part)
        self._seen = self._seen[-3:] + part
        if self._is_events and (ends := [end.end() for end in _END_OF_EVENT.finditer(self._seen)]):
            self._size = len(self._seen) - ends[-1]
        self._has_ids = self._has_ids or _ID_OF_EVENT.search(self._seen) is not None
        if self._size > self._limit:
            raise TooLarge(f"the MCP server's answer has more than {self._limit} bytes (see TOOL_RESULT_MAX_BYTES)")

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _message(request: httpx.Request) -> dict[str, Any]:
    """The JSON-RPC message that a request brings, if it brings one."""
    message = json.loads(await request.aread()) if request.method == "POST" else None
    return message if isinstance(message, dict) else {}


async def _check(request: httpx.Request, response: httpx.Response, *, asks: bool) -> None:
    """Raises ConnectionError: it is refused, or this is no answer that it accepts; `mcp` would wait for another."""
    if response.is_error:
        raise refusal(response.status_code)
    accepted = request.headers.get("accept", _ANYTHING)
    if not asks or accepted == _ANYTHING or response.has_redirect_location:
        return
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if response.status_code == httpx.codes.ACCEPTED or not kind or kind not in accepted:
        raise ConnectionError(f"the MCP server's answer, {kind or response.status_code}, is no message")
    if kind == "application/json":
        try:
            JSONRPCMessage.model_validate_json(await response.aread())
        except ValueError:
            raise ConnectionError("the MCP server's answer is no message") from None


def _fail(failure: asyncio.Future[Any], error: Exception) -> None:
    if not failure.done():
        failure.set_exception(error)
        failure.exception()  # whoever waits for it may have left


def refusal(status: int) -> ConnectionError:
    kind = Unauthorized if status in _REFUSED else NotDelivered if status in _NOT_SEEN else ConnectionError
    return kind(f"the MCP server answered with status {status}")


def reason(error: Exception) -> Exception:
    """The first cause in anyio's groups of errors, in words that show no URL and no answer: these may hold a secret."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, httpx.HTTPStatusError):
        return refusal(error.response.status_code)
    if isinstance(error, ValidationError):
        return ConnectionError("the MCP server's answer is not what was asked for")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return NotDelivered(f"the MCP server cannot be reached: {error or type(error).__name__}")
    if isinstance(error, httpx.RequestError):
        return ConnectionError(f"the connection to the MCP server broke: {error or type(error).__name__}")
    return error


@lru_cache
def _tls() -> ssl.SSLContext:
    """One for all: to make one takes some 30 ms, in which the loop stands still."""
    return httpx.create_ssl_context()
