"""Our MCP client against a real server, over both transports, and beside llama_stack's."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from llama_stack.apis.tools import ToolInvocationResult
from llama_stack.providers.utils.tools.mcp import invoke_mcp_tool
from mcp import types

from tasks.engine import mcp
from tasks.engine.mcp import IDEMPOTENCY_KEY, STOP_SECONDS, Connections, Server
from tasks.engine.mcp_wire import Unauthorized
from tests.support import wait_until
from tests.support.mcp_server import PICTURE, McpServer

MAX_BYTES = 1_000_000
one_transport = pytest.mark.parametrize("running", ["streamable HTTP"], indirect=True)


async def list_tools(server: Server) -> list[types.Tool]:
    connections = Connections(MAX_BYTES)
    try:
        return await connections.list_tools(server)
    finally:
        connections.close()


async def call_tool(server: Server, name: str, arguments: dict[str, Any], key: str) -> ToolInvocationResult:
    connections = Connections(MAX_BYTES)
    try:
        return await connections.call_tool(server, name, arguments, key)
    finally:
        connections.close()


@pytest.fixture(scope="module", params=["streamable HTTP", "SSE"])
def running(request: pytest.FixtureRequest) -> Iterator[McpServer]:
    with McpServer(sse=request.param == "SSE") as started:
        yield started


@pytest.fixture
def server(running: McpServer) -> McpServer:
    running.reset()
    return running


@pytest.fixture(params=[False, True], ids=["", "keeps sessions"])
def any_server(server: McpServer, request: pytest.FixtureRequest) -> McpServer:
    """Also one whose sessions clients cannot end."""
    if request.param:
        server.keep_sessions()
    return server


async def test_tools_are_listed_with_their_annotations(server: McpServer) -> None:
    """llama_stack's listing drops them."""
    tools = {tool.name: tool for tool in await list_tools(Server(server.url))}
    assert tools["add"].description == "Adds two numbers."
    assert tools["look"].annotations
    assert tools["look"].annotations.readOnlyHint
    assert tools["order"].annotations is None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add", {"a": 1, "b": 2}),
        ("big", {"n": 200_000}),
        ("fail", {"message": "on purpose"}),
        ("add", {"a": "no number"}),
        ("nowhere", {}),
    ],
)
async def test_results_are_those_of_llama_stack(server: McpServer, name: str, arguments: dict[str, Any]) -> None:
    """Content, and whether it is an error."""
    theirs = await invoke_mcp_tool(server.url, {}, name, arguments)
    ours = await call_tool(Server(server.url), name, arguments, "key")
    assert ours == theirs


async def test_a_picture_is_an_image(server: McpServer) -> None:
    """llama_stack fails with a validation error of its own."""
    result = await call_tool(Server(server.url), "picture", {}, "key")
    assert [item.model_dump(exclude_none=True) for item in result.content] == [
        {"type": "text", "text": "a picture"},
        {"type": "image", "image": {"data": PICTURE}},
    ]


@one_transport
@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("attachment", {}, ["see below", "attached"]),
        (
            "media",
            {},
            [
                "[report (application/pdf): https://host/r.pdf]",
                "[audio/wav, 3 bytes: left out]",
                "[file:///data.bin (application/x-data), 3 bytes: left out]",
                "[image/png, 8 bytes: an image that cannot be read]",
            ],
        ),
        ("only_structured", {}, ['{"degrees": 31}']),
    ],
)
async def test_whatever_a_tool_gives_is_shown(
    server: McpServer, name: str, arguments: dict[str, Any], shown: list[str]
) -> None:
    """What is neither text nor an image is named. llama_stack leaves it out, or fails."""
    result = await call_tool(Server(server.url), name, arguments, "key")
    assert [item.text for item in result.content] == shown
    assert result.error_code == 0


@pytest.fixture
async def connections() -> AsyncIterator[Connections]:
    made = Connections(MAX_BYTES)
    yield made
    made.close()


async def test_a_server_has_one_session_for_all_that_is_asked(server: McpServer, connections: Connections) -> None:
    """Also for calls at once. Other headers are another session: it may be another user's there."""
    there = Server(server.url)
    async with asyncio.TaskGroup() as group:
        group.create_task(connections.list_tools(there))
        calls = [group.create_task(connections.call_tool(there, "add", {"a": n, "b": 0}, "key")) for n in range(5)]
    assert [call.result().content[0].text for call in calls] == ["0", "1", "2", "3", "4"]
    assert server.sessions() == 1
    await connections.call_tool(Server(server.url, {"X-User": "b"}), "add", {"a": 1, "b": 0}, "key")
    assert server.sessions() == 2


@one_transport
async def test_a_session_that_a_restart_has_ended_is_opened_again(server: McpServer, connections: Connections) -> None:
    """For the call that finds out, and which is made once."""
    there = Server(server.url)
    await connections.call_tool(there, "count", {"key": "a"}, "key")
    await asyncio.to_thread(server.restart)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(connections.call_tool(there, "count", {"key": f"b{n}"}, "key")) for n in range(2)]
    assert [call.result().content[0].text for call in calls] == ["1", "1"]
    assert (server.counts(), server.sessions()) == ({"b0": 1, "b1": 1}, 1)


@pytest.mark.parametrize("status", [500, 429])
async def test_a_request_that_fails_is_one_calls_failure(
    server: McpServer, connections: Connections, status: int
) -> None:
    """Others at that moment go on, in the same session; it is not made again."""
    there = Server(server.url)
    held = asyncio.create_task(connections.call_tool(there, "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(server.wait_held, "gate")
    server.answer_next(status)
    with pytest.raises(ConnectionError, match=f"status {status}; whether the call had an effect is not known"):
        await connections.call_tool(there, "count", {"key": "b"}, "key")
    server.release("gate")
    assert [item.text for item in (await held).content] == ["a"]
    assert (server.counts(), server.sessions()) == ({"a": 1}, 1)


@one_transport
async def test_a_call_of_a_session_that_the_server_has_forgotten_is_made_in_another(
    server: McpServer, connections: Connections
) -> None:
    """404 says so (MCP's transports), and that the call was not begun with. One that is under way goes on."""
    there = Server(server.url)
    held = asyncio.create_task(connections.call_tool(there, "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(server.wait_held, "gate")
    server.answer_next(404)
    await connections.call_tool(there, "count", {"key": "b"}, "key")
    assert (server.counts(), server.sessions()) == ({"a": 1, "b": 1}, 2)
    server.release("gate")
    assert [item.text for item in (await held).content] == ["a"]


async def test_a_result_that_is_huge_is_not_read(server: McpServer, connections: Connections) -> None:
    """It is that call's failure; many that are large are not added up."""
    there = Server(server.url)
    with pytest.raises(ConnectionError, match=f"more than {MAX_BYTES} bytes"):
        await connections.call_tool(there, "big", {"n": 3_000_000}, "key")
    for _ in range(4):
        result = await connections.call_tool(there, "big", {"n": 300_000}, "key")
        assert len(result.content[0].text) == 300_000


async def test_a_server_that_wants_credentials(connections: Connections) -> None:
    """Gets those that it is given, and says that it wants some."""
    with McpServer(token="good") as server:
        for headers in ({}, {"Authorization": "Bearer bad"}):
            with pytest.raises(Unauthorized, match="status 401"):
                await connections.list_tools(Server(server.url, headers))
        assert await connections.list_tools(Server(server.url, {"Authorization": "Bearer good"}))


@one_transport
async def test_headers_are_not_sent_on_to_another_server(server: McpServer, connections: Connections) -> None:
    """Whatever they are called: httpx would keep `Authorization` only."""
    moved = server.url.replace("/mcp", f"/moved?to={server.url.replace('127.0.0.1', 'localhost')}")
    with pytest.raises(ConnectionError, match="status 307"):
        await connections.list_tools(Server(moved, {"X-Api-Key": "secret"}))
    assert server.sessions() == 0


@one_transport
async def test_a_server_may_send_on_to_another_path(server: McpServer, connections: Connections) -> None:
    """As many do that are asked with a slash at the end."""
    result = await connections.call_tool(Server(server.url + "/"), "add", {"a": 1, "b": 2}, "key")
    assert [item.text for item in result.content] == ["3"]


@one_transport
@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "text/html", "<html>"),
        (200, "application/json", "{nonsense"),
        (200, "application/json", '{"jsonrpc": "2.0", "id": 2, "result": {"content": "half \\ud83d"}}'),
        (200, "application/json", '{"jsonrpc": "2.0", "id": 2, "result": {"content": "of another kind"}}'),
        (200, "text/event-stream", ": nothing\n\n"),
        (
            200,
            "text/event-stream",
            'data: {"jsonrpc": "2.0", "method": "notifications/message", "params": '
            '{"level": "info", "data": "paid: 5"}}\n\n',
        ),
        (202, "application/json", ""),
        (204, "text/plain", ""),
    ],
)
async def test_an_answer_that_is_none_is_one_calls_failure(
    server: McpServer, connections: Connections, status: int, kind: str, body: str
) -> None:
    """At once: `mcp` would wait for another one. Other calls go on."""
    there = Server(server.url)
    held = asyncio.create_task(connections.call_tool(there, "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(server.wait_held, "gate")
    server.answer_next(status, kind, body)
    async with asyncio.timeout(60):
        with pytest.raises(ConnectionError, match=r"answer.*; whether the call had an effect is not known"):
            await connections.call_tool(there, "count", {"key": "b"}, "key")
    server.release("gate")
    assert [item.text for item in (await held).content] == ["a"]
    assert (server.counts(), server.sessions()) == ({"a": 1}, 1)


@one_transport
async def test_a_tool_that_is_added_is_listed_next(server: McpServer, connections: Connections) -> None:
    name = f"new_{time.monotonic_ns()}"
    before = await connections.list_tools(Server(server.url))
    server.add_tool(name)
    added = {tool.name for tool in await connections.list_tools(Server(server.url))} - {tool.name for tool in before}
    assert added == {name}


async def test_a_call_carries_its_key(any_server: McpServer) -> None:
    """In `_meta`, where the tool's arguments do not meet it."""
    await call_tool(Server(any_server.url), "count", {"key": "a"}, "turn:0:1")
    [call] = any_server.calls()
    assert (call["arguments"], call["_meta"][IDEMPOTENCY_KEY]) == ({"key": "a"}, "turn:0:1")


async def test_a_cancelled_call_is_cancelled_in_the_server(any_server: McpServer) -> None:
    """It is told; that a connection breaks would not stop it."""
    call = asyncio.create_task(call_tool(Server(any_server.url), "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(any_server.wait_held, "gate")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(wait_until, lambda: any_server.calls()[0]["ended"] == "cancelled")


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_server_that_dies_in_a_call_is_an_error(
    server: McpServer, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """Long before the tool's time is over, also if a new server is there that knows nothing of the call."""
    monkeypatch.setattr(mcp, "WATCH_SECONDS", 0.2)
    call = asyncio.create_task(call_tool(Server(server.url), "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(server.wait_held, "gate")
    server.kill()
    try:
        if comes_back:
            server.start()
        async with asyncio.timeout(60):
            with pytest.raises(ConnectionError, match="whether the call had an effect is not known"):
                await call
    finally:
        if not comes_back:
            server.start()


async def test_a_slow_call_is_not_given_up(server: McpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the server is asked whether it is there."""
    monkeypatch.setattr(mcp, "WATCH_SECONDS", 0.05)
    result = await call_tool(Server(server.url), "slow", {"seconds": 0.5, "text": "late"}, "key")
    assert [item.text for item in result.content] == ["late"]


async def test_a_server_that_hangs_does_not_hold_up_a_cancellation(server: McpServer) -> None:
    """Whoever cancels waits for a moment; what the server does not hear is given up later."""
    call = asyncio.create_task(call_tool(Server(server.url), "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(server.wait_held, "gate")
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    try:
        call.cancel()
        cancelled_at = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert STOP_SECONDS <= time.monotonic() - cancelled_at < 30
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/mcp?key=secret", "ftp://127.0.0.1/secret"])
async def test_a_server_that_cannot_be_reached_is_an_error(url: str) -> None:
    """Its words do not show the URL, which may hold a secret."""
    with pytest.raises((ConnectionError, ValueError), match="MCP") as raised:
        await list_tools(Server(url))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("path", "said"), [("/nowhere", "status 40"), ("/page", "text/html|status 405")])
async def test_a_server_that_is_none_is_an_error(server: McpServer, path: str, said: str) -> None:
    """Its first answer is named, at once."""
    url = server.url.rpartition("/")[0] + path
    async with asyncio.timeout(60):
        with pytest.raises(ConnectionError, match=said):
            await list_tools(Server(url))
