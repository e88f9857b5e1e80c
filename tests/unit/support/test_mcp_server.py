"""The MCP server answers a real MCP client, and remembers the calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent

from tests.support import wait_until
from tests.support.mcp_server import SECRET_NUMBER, McpServer, append_line, read_calls


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    with McpServer() as mcp:
        yield mcp


@pytest.fixture
def mcp(server: McpServer) -> McpServer:
    server.reset()
    return server


@asynccontextmanager
async def session(mcp: McpServer) -> AsyncIterator[ClientSession]:
    async with (
        streamable_http_client(mcp.url) as (read, write, _),
        ClientSession(read, write) as client,
    ):
        await client.initialize()
        yield client


def text(result: CallToolResult) -> str:
    [content] = result.content
    assert isinstance(content, TextContent)
    return content.text


async def test_the_tools_do_what_they_say(mcp: McpServer) -> None:
    async with session(mcp) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        plain = {"add", "get_secret_number", "slow", "fail", "count", "big", "picture", "attachment", "order"}
        assert names == plain | {"look", "put", "media", "only_structured", "echo_header"}
        assert text(await client.call_tool("add", {"a": 1, "b": 2})) == "3"
        assert text(await client.call_tool("get_secret_number")) == str(SECRET_NUMBER)
        assert text(await client.call_tool("slow", {"seconds": 0, "text": "hi"})) == "hi"
        assert text(await client.call_tool("big", {"n": 5000})) == "x" * 5000
        failed = await client.call_tool("fail", {"message": "on purpose"})
        assert failed.isError
        assert "on purpose" in text(failed)


async def test_calls_are_recorded_with_their_meta(mcp: McpServer) -> None:
    async with session(mcp) as client:
        await client.call_tool("count", {"key": "a"}, meta={"caravan/call": "t1-0"})
        await client.call_tool("count", {"key": "a"})
        await client.call_tool("fail", {"message": "no"})
    assert mcp.counts() == {"a": 2}
    first, second, third = mcp.calls()
    assert (first["tool"], first["arguments"], first["ended"]) == ("count", {"key": "a"}, "finished")
    assert first["_meta"]["caravan/call"] == "t1-0"
    assert "caravan/call" not in second["_meta"]
    assert third["ended"] == "failed"
    mcp.reset()
    assert (mcp.calls(), mcp.counts()) == ([], {})


async def test_a_call_is_seen_while_it_runs(mcp: McpServer) -> None:
    async with session(mcp) as client:
        running = asyncio.create_task(client.call_tool("slow", {"seconds": 60, "text": "late"}))
        await asyncio.to_thread(wait_until, mcp.calls)
        assert mcp.calls()[0]["ended"] is None
        running.cancel()


async def test_tools_say_whether_they_may_be_repeated(mcp: McpServer) -> None:
    async with session(mcp) as client:
        hints = {tool.name: tool.annotations for tool in (await client.list_tools()).tools if tool.annotations}
    assert {name: hint.model_dump(exclude_none=True) for name, hint in hints.items()} == {
        "look": {"readOnlyHint": True},
        "put": {"idempotentHint": True},
    }


async def test_a_held_call_waits_behind_its_side_effect(mcp: McpServer) -> None:
    async with session(mcp) as client:
        running = asyncio.create_task(client.call_tool("order", {"key": "a", "hold": "gate"}))
        await asyncio.to_thread(mcp.wait_held, "gate")
        assert mcp.counts() == {"a": 1}
        assert mcp.release("gate") == 1
        assert text(await running) == "a"
        assert text(await client.call_tool("look", {"key": "a", "hold": "gate"})) == "1"


async def test_it_comes_back_on_its_port_and_keeps_its_calls(mcp: McpServer) -> None:
    url = mcp.url
    async with session(mcp) as client:
        await client.call_tool("count", {"key": "a"})
    mcp.kill()
    assert [call["tool"] for call in mcp.calls()] == ["count"]
    mcp.restart()
    assert (mcp.url, mcp.counts()) == (url, {})
    async with session(mcp) as client:
        assert text(await client.call_tool("add", {"a": 2, "b": 2})) == "4"
    assert [(call["tool"], call["ended"]) for call in mcp.calls()] == [("count", "finished"), ("add", "finished")]


def test_calls_are_read_from_lines(tmp_path: Path) -> None:
    file = tmp_path / "calls.jsonl"
    file.write_bytes(b"")
    assert read_calls(file) == []
    append_line(file, {"id": "forgotten", "ended": "finished"})
    append_line(file, {"id": "1", "tool": "slow", "ended": None})
    append_line(file, {"id": "2", "tool": "add", "ended": None})
    append_line(file, {"id": "1", "ended": "killed"})
    with file.open("ab") as half:
        half.write(b'{"id": "2", "ended": "fini')
    assert read_calls(file) == [
        {"id": "1", "tool": "slow", "ended": "killed"},
        {"id": "2", "tool": "add", "ended": None},
    ]
