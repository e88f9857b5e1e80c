"""Our MCP client against a real server, over both transports, and beside llama_stack's."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from llama_stack.providers.utils.tools.mcp import invoke_mcp_tool
from mcp import McpError

from tasks.engine import mcp
from tasks.engine.mcp import IDEMPOTENCY_KEY, STOP_SECONDS, Server, call_tool, list_tools
from tests.support import wait_until
from tests.support.mcp_server import PICTURE, McpServer


@pytest.fixture(scope="module", params=["streamable HTTP", "keeps sessions", "SSE"])
def running(request: pytest.FixtureRequest) -> Iterator[McpServer]:
    with McpServer(sse=request.param == "SSE", keeps_sessions=request.param == "keeps sessions") as started:
        yield started


@pytest.fixture
def server(running: McpServer) -> McpServer:
    running.reset()
    return running


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
        ("attachment", {}),
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


async def test_a_call_carries_its_key(server: McpServer) -> None:
    """In `_meta`, where the tool's arguments do not meet it."""
    await call_tool(Server(server.url), "count", {"key": "a"}, "turn:0:1")
    [call] = server.calls()
    assert (call["arguments"], call["_meta"][IDEMPOTENCY_KEY]) == ({"key": "a"}, "turn:0:1")


async def test_a_cancelled_call_is_cancelled_in_the_server(server: McpServer) -> None:
    """It is told; that a connection breaks would not stop it."""
    call = asyncio.create_task(call_tool(Server(server.url), "order", {"key": "a", "hold": "gate"}, "key"))
    await asyncio.to_thread(server.wait_held, "gate")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(wait_until, lambda: server.calls()[0]["ended"] == "cancelled")


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
        async with asyncio.timeout(10):
            with pytest.raises((ConnectionError, McpError)):
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
        assert STOP_SECONDS <= time.monotonic() - cancelled_at < 1
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/mcp?key=secret", "ftp://127.0.0.1/secret"])
async def test_a_server_that_cannot_be_reached_is_an_error(url: str) -> None:
    """Its words do not show the URL, which may hold a secret."""
    with pytest.raises((ConnectionError, ValueError), match="MCP") as raised:
        await list_tools(Server(url))
    assert "secret" not in str(raised.value)


async def test_a_server_that_is_none_is_an_error(server: McpServer) -> None:
    """The status of its first answer is named."""
    with pytest.raises(Exception, match=r"status 40|Session terminated"):
        await list_tools(Server(server.url + "/nowhere"))
