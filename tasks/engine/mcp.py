"""MCP servers: their tools listed and called, over streamable HTTP or, where a server does not speak it, SSE.

Ours and not llama_stack's, which drops a tool's annotations and a call's `_meta`
(`docs/decisions/0009-mcp-calls-are-ours.md`). An attempt has one session with each server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
from llama_stack.apis.tools import ToolInvocationResult
from mcp import ClientSession, McpError, types
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from pydantic import ValidationError

from app.settings import Settings
from tasks.engine import mcp_content
from tasks.engine.mcp_wire import Broken, NotDelivered, TooLarge, Unauthorized, Wire, reason

logger = logging.getLogger(__name__)

IDEMPOTENCY_KEY = "caravan/idempotencyKey"
"""The member of a call's `_meta` that is the same for every attempt of the call, and different for every other call."""

LIST_SECONDS = 30
MAX_PAGES = 50
OPEN_SECONDS = 30
WATCH_SECONDS = 10
"""Between two looks at a server that has not answered a call."""
GOODBYE_SECONDS = 5
"""For telling a server that a call is cancelled and its session over; nobody waits for that longer than the next."""
STOP_SECONDS = 0.3
"""That a cancelled caller waits, so that a server that is well knows before the turn ends."""

Transport = Callable[["Server", Wire], AbstractAsyncContextManager[tuple[Any, Any]]]

_sse_only: set[str] = set()


def max_message_bytes(settings: Settings) -> int:
    """What a server's message may have: a result that is not too large, as JSON in JSON, and twice, as servers do."""
    return 8 * settings.tool_result_max_bytes + 1_048_576


@dataclass(frozen=True)
class Server:
    """Where an MCP server is, and what it is sent with every request: that may hold secrets."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Connections:
    """Of one attempt: a session with each server, opened when it is first needed, and shared by calls at once.

    `max_bytes`: of one message of a server.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sessions: dict[tuple[str, frozenset[tuple[str, str]]], Session] = {}
        self._left: list[Session] = []
        """Not asked any more, though calls may be under way there."""

    async def list_tools(self, server: Server) -> list[types.Tool]:
        """All tools of a server. Raises TimeoutError, ConnectionError, McpError, ValueError."""
        try:
            async with asyncio.timeout(LIST_SECONDS):
                return await self._asked(server, _all_tools)
        except TimeoutError:
            raise TimeoutError(f"the MCP server did not list its tools within {LIST_SECONDS} s") from None

    async def call_tool(self, server: Server, name: str, arguments: dict[str, Any], key: str) -> ToolInvocationResult:
        """Makes one call. A cancellation reaches the server.

        `key`: the call's `IDEMPOTENCY_KEY`. Raises ConnectionError, McpError, ValueError.
        """
        return await mcp_content.result(await self._asked(server, partial(_called, name, arguments, key)))

    async def _asked(self, server: Server, ask: Callable[[Session], Any]) -> Any:
        """In another session, once, if this one turns out to be over before the server has begun."""
        session = self._session(server)
        try:
            return await ask(session)
        except (NotDelivered, Broken) as error:
            self._forget(session)
            if isinstance(error, Broken) or not session.was_open:
                raise
        return await ask(self._session(server))

    def _session(self, server: Server) -> Session:
        key = (server.url, frozenset(server.headers.items()))
        if (session := self._sessions.get(key)) is None or session.is_over:
            session = self._sessions[key] = Session(server, self._max_bytes)
        return session

    def _forget(self, session: Session) -> None:
        for key in [key for key, known in self._sessions.items() if known is session]:
            self._left.append(self._sessions.pop(key))

    def close(self) -> None:
        """Ends all sessions; the servers are told behind our back."""
        for session in [*self._sessions.values(), *self._left]:
            session.close()
        self._sessions.clear()
        self._left.clear()


async def _all_tools(session: Session) -> list[types.Tool]:
    found: list[types.Tool] = []
    params = None
    for _ in range(MAX_PAGES):
        request = types.ListToolsRequest(params=params)
        page = await session.ask(types.ClientRequest(request), types.ListToolsResult)
        found += page.tools
        if not page.nextCursor:
            return found
        params = types.PaginatedRequestParams(cursor=page.nextCursor)
    raise ValueError(f"the MCP server lists its tools on over {MAX_PAGES} pages")


async def _called(name: str, arguments: dict[str, Any], key: str, session: Session) -> types.CallToolResult:
    """Not by `ClientSession.call_tool`, which throws away a result that does not fit the tool's own schema, and lists
    the tools for that."""
    meta = types.RequestParams.Meta.model_validate({IDEMPOTENCY_KEY: key})
    params = types.CallToolRequestParams(name=name, arguments=arguments, _meta=meta)
    request = types.ClientRequest(types.CallToolRequest(params=params))
    try:
        result: types.CallToolResult = await session.ask(request, types.CallToolResult, is_call=True)
    except (NotDelivered, Unauthorized, TooLarge):
        raise
    except ConnectionError as error:
        raise type(error)(f"{error}; whether the call had an effect is not known") from error
    return result


class Session:
    """With one server; `was_open`: it has answered once.

    It is in a task of its own: anyio's scopes would mix up a cancellation with their own, and a server that hangs when
    it is told goodbye would hold the turn up.
    """

    def __init__(self, server: Server, max_bytes: int) -> None:
        self._server = server
        self._max_bytes = max_bytes
        self._opened: asyncio.Future[tuple[ClientSession, Wire]] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._telling: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._hold())

    @property
    def was_open(self) -> bool:
        return self._opened.done() and not self._opened.cancelled() and self._opened.exception() is None

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def close(self) -> None:
        """Returns at once; the server has `GOODBYE_SECONDS` to take notice."""
        self._closing.set()
        if not self._opened.done():
            self._task.cancel()
        asyncio.get_running_loop().call_later(GOODBYE_SECONDS, self._task.cancel)

    async def _hold(self) -> None:
        error: Exception = ConnectionError("the session with the MCP server is closed")
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(OPEN_SECONDS):
                    opened = await _open(stack, self._server, self._max_bytes)
                self._opened.set_result(opened)
                await self._closing.wait()
                if self._telling:
                    await asyncio.wait(self._telling)
        except TimeoutError:
            error = TimeoutError(f"the MCP server did not answer within {OPEN_SECONDS} s")
        except Exception as raised:
            error = reason(raised)
        finally:
            if self._opened.done():
                logger.debug("an MCP session ended: %s", error)
            else:
                self._opened.set_exception(error)
                self._opened.exception()  # whoever waits for it may have left

    async def ask(self, request: types.ClientRequest, answer: type[Any], *, is_call: bool = False) -> Any:
        """Raises NotDelivered, ConnectionError, McpError. A cancelled call is told to the server."""
        session, wire = await asyncio.shield(self._opened)
        failure = asyncio.get_running_loop().create_future()
        request_id = -1

        async def send() -> Any:
            nonlocal request_id
            request_id = session._request_id  # that of the next request; no public name gives it
            with wire.expecting(request_id, failure):
                return await session.send_request(request, answer)

        asking = asyncio.create_task(send())
        watching = asyncio.create_task(self._watch()) if is_call else failure
        try:
            await asyncio.wait({asking, failure, watching, self._task}, return_when=asyncio.FIRST_COMPLETED)
            return _outcome(asking, failure, watching)
        except asyncio.CancelledError:
            if is_call:
                await self._tell_cancelled(session, request_id)
            raise
        finally:
            for each in (asking, watching, failure):
                each.cancel()

    async def _watch(self) -> None:
        """Raises if the server is gone: `mcp` does not say when the stream that a result is to come on has ended.

        A server that is busy may be late with its answer, and one that knows no ping says so.
        """
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._ping()

    async def _ping(self) -> None:
        try:
            await self.ask(types.ClientRequest(types.PingRequest()), types.EmptyResult)
        except McpError as error:
            if error.error.code != types.METHOD_NOT_FOUND:
                raise

    async def _tell_cancelled(self, session: ClientSession, request_id: int) -> None:
        """To break the connection is no cancellation in MCP: the server has to be told. Waits for a moment."""
        telling = asyncio.create_task(self._cancel_there(session, request_id))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        await asyncio.wait([telling], timeout=STOP_SECONDS)

    async def _cancel_there(self, session: ClientSession, request_id: int) -> None:
        params = types.CancelledNotificationParams(
            requestId=request_id, reason="the result is not waited for any longer"
        )
        with suppress(Exception):
            await session.send_notification(types.ClientNotification(types.CancelledNotification(params=params)))
            # A notification is sent behind our back; the request that follows is sent when it has arrived.
            await self._ping()


def _outcome(asking: asyncio.Task[Any], failure: asyncio.Future[Any], watching: asyncio.Future[Any]) -> Any:
    """Of a request that has an answer, or will have none."""
    if asking.done():
        try:
            return asking.result()
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            raise NotDelivered("the session with the MCP server is over") from None
        except McpError as error:
            if error.error.code != types.CONNECTION_CLOSED or error.error.message != "Connection closed":
                raise
        except ValidationError as error:
            raise reason(error) from None
    if failure.done():
        failure.result()
    if watching.done() and (cause := watching.exception()) is not None:
        raise Broken(f"the MCP server is gone: {cause}") from cause
    raise Broken("the connection to the MCP server broke")


async def _open(stack: AsyncExitStack, server: Server, max_bytes: int) -> tuple[ClientSession, Wire]:
    """A session over the transport that worked last, or the other one. Raises what the first one raised."""
    if not server.url.startswith(("http://", "https://")):
        raise ValueError("the MCP endpoint is not a valid HTTP(S) URL")
    first, second = (_sse, _streamable_http) if server.url in _sse_only else (_streamable_http, _sse)
    try:
        return await _initialized(stack, first, server, max_bytes)
    except Exception as error:
        failure = error
    try:
        opened = await _initialized(stack, second, server, max_bytes)
    except Exception:
        raise failure from None
    (_sse_only.add if second is _sse else _sse_only.discard)(server.url)
    return opened


async def _initialized(
    stack: AsyncExitStack, transport: Transport, server: Server, max_bytes: int
) -> tuple[ClientSession, Wire]:
    async with AsyncExitStack() as opening:
        wire = Wire(server.headers, max_bytes)
        read, write = await opening.enter_async_context(transport(server, wire))
        session = await opening.enter_async_context(ClientSession(read, write))
        await _initialize(session, wire)
        stack.push_async_exit(opening.pop_all())
        return session, wire


async def _initialize(session: ClientSession, wire: Wire) -> None:
    """Raises what the wire tells, too: `mcp` would wait on."""
    failure = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(session.initialize())
    try:
        with wire.expecting(session._request_id, failure):
            await asyncio.wait({asking, failure}, return_when=asyncio.FIRST_COMPLETED)
        await (failure if failure.done() else asking)
    finally:
        asking.cancel()
        failure.cancel()


@asynccontextmanager
async def _streamable_http(server: Server, wire: Wire) -> AsyncIterator[tuple[Any, Any]]:
    async with wire, streamable_http_client(server.url, http_client=wire) as (read, write, _):
        yield read, write


def _sse(server: Server, wire: Wire) -> AbstractAsyncContextManager[tuple[Any, Any]]:
    def client(*_: Any, **__: Any) -> Wire:
        return wire

    return sse_client(server.url, httpx_client_factory=client)
