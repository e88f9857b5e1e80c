"""A real MCP server (streamable HTTP) with a few tools, which remembers how it was called.

    add(a, b)               the sum
    get_secret_number()     `SECRET_NUMBER`
    slow(seconds, text)     the text, after so many seconds
    fail(message)           an error with this message
    count(key)              counts a side effect; how often this key has been counted
    big(n)                  n characters

Control: GET /control/calls and /control/counts, POST /control/reset.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import uvicorn
from mcp.server.fastmcp import FastMCP
from mcp.types import ContentBlock
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.support import ServerProcess, exit_with_parent

SECRET_NUMBER = 8_675_309


class RecordingMCP(FastMCP):
    """FastMCP that records each call of a tool, with its `_meta`, before the tool runs."""

    calls: list[dict[str, Any]]
    counts: Counter[str]

    def forget(self) -> None:
        self.calls = []
        self.counts = Counter()

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Sequence[ContentBlock] | dict[str, Any]:
        meta = self.get_context().request_context.meta
        call = {
            "tool": name,
            "arguments": arguments,
            "meta": meta.model_dump(exclude_none=True) if meta else {},
            "at": time.time(),
            "ended": None,
        }
        self.calls.append(call)
        try:
            result = await super().call_tool(name, arguments)
        except asyncio.CancelledError:
            call["ended"] = "cancelled"
            raise
        except Exception:
            call["ended"] = "failed"
            raise
        call["ended"] = "finished"
        return result


def build(host: str) -> RecordingMCP:
    """The server with its tools and control routes."""
    server = RecordingMCP("tests", host=host, log_level="WARNING")
    server.forget()
    _add_tools(server)
    _add_control(server)
    return server


def _add_tools(server: RecordingMCP) -> None:
    @server.tool()
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    @server.tool()
    def get_secret_number() -> int:
        """Tells the secret number."""
        return SECRET_NUMBER

    @server.tool()
    async def slow(seconds: float, text: str) -> str:
        """Gives the text back after so many seconds."""
        await asyncio.sleep(seconds)
        return text

    @server.tool()
    def fail(message: str) -> str:
        """Fails with the message."""
        raise RuntimeError(message)

    @server.tool()
    def count(key: str) -> int:
        """Counts a side effect under the key, and tells how often it has happened."""
        server.counts[key] += 1
        return server.counts[key]

    @server.tool()
    def big(n: int) -> str:
        """Gives n characters."""
        return "x" * n


def _add_control(server: RecordingMCP) -> None:
    @server.custom_route("/control/calls", methods=["GET"])
    async def calls(_: Request) -> Response:
        return JSONResponse(server.calls)

    @server.custom_route("/control/counts", methods=["GET"])
    async def counts(_: Request) -> Response:
        return JSONResponse(server.counts)

    @server.custom_route("/control/reset", methods=["POST"])
    async def reset(_: Request) -> Response:
        server.forget()
        return JSONResponse(None)


class McpServer(ServerProcess):
    """Runs the MCP server in a subprocess: `with McpServer() as mcp: … mcp.url` (it ends in /mcp).

    A kill loses its sessions, and the calls and counts so far.
    """

    module = "tests.support.mcp_server"

    def calls(self) -> list[dict[str, Any]]:
        """Each call of a tool, in order: `tool`, `arguments`, `meta` (the request's `_meta`), `at` (seconds since the
        epoch) and `ended`: None (still running), finished, failed or cancelled."""
        return list(self.control("GET", "calls"))

    def counts(self) -> dict[str, int]:
        """How often `count` was called with each key."""
        return dict(self.control("GET", "counts"))

    def reset(self) -> None:
        """Forgets calls and counts."""
        self.control("POST", "reset")


def main() -> None:
    parser = argparse.ArgumentParser(description="An MCP server with a few tools.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args()
    if arguments.exit_with_parent:
        exit_with_parent()
    app = build(arguments.host).streamable_http_app()
    listener = socket.create_server((arguments.host, arguments.port), backlog=1024)
    print(f"MCP server ready on http://{arguments.host}:{listener.getsockname()[1]}/mcp", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
