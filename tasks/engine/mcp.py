"""MCP servers: their tools listed and called, over streamable HTTP or, where a server does not speak it, SSE.

Ours and not llama_stack's, which drops a tool's annotations and a call's `_meta`; results are as it gives them
(`docs/decisions/0009-mcp-calls-are-ours.md`). Each conversation has a session of its own.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx
from llama_stack.apis.common.content_types import ImageContentItem, TextContentItem
from llama_stack.apis.tools import ToolInvocationResult
from llama_stack.providers.utils.inference.prompt_adapter import convert_image_content_to_url
from mcp import ClientSession, McpError, types
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

logger = logging.getLogger(__name__)

IDEMPOTENCY_KEY = "caravan/idempotencyKey"
"""The member of a call's `_meta` that is the same for every attempt of the call, and different for every other call."""

LIST_SECONDS = 30
CONNECT_SECONDS = 30
WATCH_SECONDS = 10
"""Between two looks at a server that has not answered a call."""
GOODBYE_SECONDS = 5
"""For telling a server that a call is cancelled and its session over; nobody waits for that longer than the next."""
STOP_SECONDS = 0.3
"""That a cancelled caller waits, so that a server that is well knows before the turn ends."""

Transport = Callable[["Server"], AbstractAsyncContextManager[tuple[Any, Any]]]

_sse_only: set[str] = set()


@dataclass(frozen=True)
class Server:
    """Where an MCP server is, and what it is sent with every request: that may hold secrets."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


async def list_tools(server: Server) -> list[types.Tool]:
    """All tools of a server. Raises TimeoutError, ConnectionError, McpError."""
    async with asyncio.timeout(LIST_SECONDS):
        return await _converse(server, _all_tools)


async def call_tool(server: Server, name: str, arguments: dict[str, Any], key: str) -> ToolInvocationResult:
    """Makes one call. A cancellation reaches the server.

    `key`: the call's `IDEMPOTENCY_KEY`. Raises ConnectionError, McpError, ValueError: a result that cannot be shown.
    """
    result = await _converse(server, lambda session: _call(session, name, arguments, key))
    content = [item for block in result.content for item in await _items(block)]
    return ToolInvocationResult(content=content, error_code=1 if result.isError else 0)


async def _all_tools(session: ClientSession) -> list[types.Tool]:
    page = await session.list_tools()
    found = page.tools
    while page.nextCursor:
        page = await session.list_tools(params=types.PaginatedRequestParams(cursor=page.nextCursor))
        found = [*found, *page.tools]
    return found


async def _call(session: ClientSession, name: str, arguments: dict[str, Any], key: str) -> types.CallToolResult:
    request_id = session._request_id  # that of the next request; no public name gives it
    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(session))
            result = await session.call_tool(name, arguments, meta={IDEMPOTENCY_KEY: key})
            watching.cancel()
        return result
    except asyncio.CancelledError:
        with suppress(Exception):
            await _tell_cancelled(session, request_id)
        raise


async def _watch(session: ClientSession) -> None:
    """Raises if the server is gone: `mcp` does not say when the stream that a result is to come on has ended.

    A server that is busy may be late with its answer, and one that knows no ping says so.
    """
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        try:
            await session.send_ping()
        except McpError as error:
            if error.error.code != types.METHOD_NOT_FOUND:
                raise


async def _tell_cancelled(session: ClientSession, request_id: int) -> None:
    """To break the connection is no cancellation in MCP: the server has to be told."""
    params = types.CancelledNotificationParams(requestId=request_id, reason="the result is not waited for any longer")
    await session.send_notification(types.ClientNotification(types.CancelledNotification(params=params)))
    # A notification is sent behind our back; the request that follows is sent when it has arrived.
    await session.send_ping()


async def _items(block: types.ContentBlock) -> list[TextContentItem | ImageContentItem]:
    """A content block as llama_stack's content, which has only text and images."""
    if isinstance(block, types.TextContent):
        return [TextContentItem(text=block.text)]
    if isinstance(block, types.ImageContent):
        image = ImageContentItem(image={"data": block.data})
        # What a model cannot be shown must fail here, as the tool's trouble: in the history it would fail each turn.
        await convert_image_content_to_url(image)
        return [image]
    if isinstance(block, types.EmbeddedResource):
        logger.warning("an embedded resource in a tool's result is left out: there is no such content")
        return []
    raise ValueError(f"Unknown content type: {block.type}")


async def _converse[Answer](server: Server, ask: Callable[[ClientSession], Awaitable[Answer]]) -> Answer:
    """Asks in a new session, and closes it behind the answer.

    The session is in a task of its own: anyio's scopes would mix up a cancellation with their own, and a server that
    hangs when it is told goodbye would hold the turn up.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Answer] = loop.create_future()
    task = asyncio.create_task(_hold_session(server, ask, answer))
    try:
        return await answer
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task], timeout=STOP_SECONDS)
        raise
    finally:
        loop.call_later(GOODBYE_SECONDS, task.cancel)


async def _hold_session[Answer](
    server: Server, ask: Callable[[ClientSession], Awaitable[Answer]], answer: asyncio.Future[Answer]
) -> None:
    try:
        async with _session(server) as session:
            if answer.done():  # cancelled, which an error of the transport at that moment has hidden
                return
            given = await ask(session)
            if not answer.done():
                answer.set_result(given)
    except Exception as error:
        if answer.done():
            logger.debug("an MCP session did not end well: %s", _reason(error))
        else:
            answer.set_exception(_reason(error))
    finally:
        answer.cancel()


@asynccontextmanager
async def _session(server: Server) -> AsyncIterator[ClientSession]:
    if not server.url.startswith(("http://", "https://")):
        raise ValueError("the MCP endpoint is not a valid HTTP(S) URL")
    async with AsyncExitStack() as stack:
        yield await _open(stack, server)


async def _open(stack: AsyncExitStack, server: Server) -> ClientSession:
    """A session over the transport that worked last, or the other one. Raises what the first one raised."""
    first, second = (_sse, _streamable_http) if server.url in _sse_only else (_streamable_http, _sse)
    try:
        return await _initialized(stack, first, server)
    except Exception as error:
        failure = error
    try:
        session = await _initialized(stack, second, server)
    except Exception:
        raise failure from None
    (_sse_only.add if second is _sse else _sse_only.discard)(server.url)
    return session


async def _initialized(stack: AsyncExitStack, transport: Transport, server: Server) -> ClientSession:
    async with AsyncExitStack() as opening:
        read, write = await opening.enter_async_context(transport(server))
        session = await opening.enter_async_context(ClientSession(read, write))
        await session.initialize()
        stack.push_async_exit(opening.pop_all())
        return session


@asynccontextmanager
async def _streamable_http(server: Server) -> AsyncIterator[tuple[Any, Any]]:
    async with (
        _http_client(dict(server.headers)) as client,
        streamable_http_client(server.url, http_client=client) as (read, write, _),
    ):
        yield read, write


def _sse(server: Server) -> AbstractAsyncContextManager[tuple[Any, Any]]:
    return sse_client(server.url, headers=dict(server.headers), httpx_client_factory=_http_client)


def _http_client(
    headers: dict[str, str] | None = None, timeout: httpx.Timeout | None = None, auth: httpx.Auth | None = None
) -> httpx.AsyncClient:
    """Without a time limit for reading: callers have theirs, and a tool may be silent for as long as it is given."""
    limits = httpx.Timeout(CONNECT_SECONDS, read=None)
    return httpx.AsyncClient(headers=headers, auth=auth, timeout=limits, follow_redirects=True, verify=_tls())


@lru_cache
def _tls() -> ssl.SSLContext:
    """One for all: to make one takes some 30 ms, in which the loop stands still."""
    return httpx.create_ssl_context()


def _reason(error: Exception) -> Exception:
    """The first cause in anyio's groups of errors, in words that show no URL: that may hold a secret."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, httpx.HTTPStatusError):
        return ConnectionError(f"the MCP server answered with status {error.response.status_code}")
    if isinstance(error, httpx.RequestError):
        return ConnectionError(f"the MCP server cannot be reached: {error or type(error).__name__}")
    return error
