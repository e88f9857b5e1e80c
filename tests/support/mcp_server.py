"""A real MCP server (streamable HTTP, or SSE) with a few tools, which remembers how it was called.

    add(a, b)               the sum
    get_secret_number()     `SECRET_NUMBER`
    slow(seconds, text)     the text, after so many seconds
    fail(message)           an error with this message
    count(key)              counts a side effect; how often this key has been counted
    big(n)                  n characters
    picture()               a text and an image, `PICTURE`
    attachment()            a text and an embedded resource
    media()                 a link, audio, a file, and an image that is none
    only_structured()       structured content alone
    echo_header(name, fail) what the request had as this header, or an error with it
    look(key, hold)         how often this key has been counted; annotated readOnlyHint
    put(key, hold, seconds) counts a side effect under the key, and gives the key back; annotated idempotentHint
    order(key, hold, seconds)  the same without annotations

The last three wait, after they have counted, so many seconds and until the hold of that name is released.

Calls are recorded in a file of JSON lines: one line when a call begins, one with the same `id` when it ends.

Beside it, what is no MCP server: /moved?to=… (307) and /page (HTML).

Control: GET /control/counts, /control/sessions (how many were opened) and /control/held/{name}, POST
/control/release/{name}, /control/reset, /control/tool/{name} (adds one), /control/keep (lets no client end its session)
and /control/answer/{status}?kind=…&body=… (answers the next request in a session so).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import tempfile
import time
import uuid
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from mcp.server.fastmcp import FastMCP
from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)
from pydantic import AnyUrl
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support import PATIENCE_SECONDS, ServerProcess, exit_with_parent, wait_until

SECRET_NUMBER = 8_675_309
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
"""A PNG of one pixel, in base64."""


class Hold:
    """A name that calls wait for."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.waiting = 0

    async def wait(self) -> None:
        self.waiting += 1
        try:
            await self.released.wait()
        finally:
            self.waiting -= 1


class RecordingMCP(FastMCP):
    """FastMCP that records each call of a tool, with its `_meta`, before the tool runs."""

    def __init__(self, host: str, calls_file: Path) -> None:
        super().__init__("tests", host=host, log_level="CRITICAL")  # clients cut off are no news
        self.counts: Counter[str] = Counter()
        self.holds: defaultdict[str, Hold] = defaultdict(Hold)
        self.sessions = 0
        self.keeps_sessions = False
        self.next_answer: Response | None = None
        self._calls_file = calls_file

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Sequence[ContentBlock] | dict[str, Any]:
        context = self.get_context().request_context
        meta = context.meta
        call = {
            "id": uuid.uuid4().hex,
            "tool": name,
            "arguments": arguments,
            "_meta": meta.model_dump(exclude_none=True) if meta else {},
            "authorization": context.request.headers.get("authorization") if context.request else None,
            "at": time.time(),
            "ended": None,
        }
        append_line(self._calls_file, call)
        ended = "finished"
        try:
            return await super().call_tool(name, arguments)
        except asyncio.CancelledError:
            ended = "cancelled"
            raise
        except Exception:
            ended = "failed"
            raise
        finally:
            append_line(self._calls_file, {"id": call["id"], "ended": ended})


def append_line(file: Path, value: dict[str, Any]) -> None:
    """In one write, so that a reader sees whole lines or a last one without its end."""
    with file.open("ab", buffering=0) as appended:
        appended.write(json.dumps(value).encode() + b"\n")


def read_calls(file: Path) -> list[dict[str, Any]]:
    """The calls in the order in which they began. The end of a call that a reset has forgotten is ignored."""
    calls: dict[str, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n")[:-1]:
        value = json.loads(line)
        if "tool" in value:
            calls[value["id"]] = value
        elif value["id"] in calls:
            calls[value["id"]] |= value
    return list(calls.values())


def build(host: str, calls_file: Path) -> RecordingMCP:
    """The server with its tools and control routes."""
    server = RecordingMCP(host, calls_file)
    _add_tools(server)
    _add_control(server)
    _add_others(server)
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

    @server.tool()
    def picture() -> list[TextContent | ImageContent]:
        """Gives a picture."""
        return [
            TextContent(type="text", text="a picture"),
            ImageContent(type="image", data=PICTURE, mimeType="image/png"),
        ]

    @server.tool()
    def attachment() -> list[TextContent | EmbeddedResource]:
        """Gives a text with something attached."""
        resource = TextResourceContents(uri=AnyUrl("file:///note"), text="attached")
        return [TextContent(type="text", text="see below"), EmbeddedResource(type="resource", resource=resource)]

    @server.tool()
    def media() -> list[ResourceLink | AudioContent | EmbeddedResource | ImageContent]:
        """Gives what is neither text nor a picture."""
        blob = BlobResourceContents(uri=AnyUrl("file:///data.bin"), blob="AAAA", mimeType="application/x-data")
        return [
            ResourceLink(
                type="resource_link", name="report", uri=AnyUrl("https://host/r.pdf"), mimeType="application/pdf"
            ),
            AudioContent(type="audio", data="AAAA", mimeType="audio/wav"),
            EmbeddedResource(type="resource", resource=blob),
            ImageContent(type="image", data="bm8gaW1hZ2U=", mimeType="image/png"),
        ]

    @server.tool()
    def only_structured() -> CallToolResult:
        """Gives structured content alone."""
        return CallToolResult(content=[], structuredContent={"degrees": 31})

    @server.tool()
    def echo_header(name: str, fail: bool = False) -> str:
        """Tells what the request had as this header."""
        request = server.get_context().request_context.request
        value = str(request.headers.get(name)) if request else ""
        if fail:
            raise RuntimeError(value)
        return value

    _add_annotated_tools(server)


def _add_annotated_tools(server: RecordingMCP) -> None:
    async def wait(hold: str, seconds: float = 0) -> None:
        await asyncio.sleep(seconds)
        if hold:
            await server.holds[hold].wait()

    @server.tool(annotations=ToolAnnotations(readOnlyHint=True))
    async def look(key: str, hold: str = "") -> int:
        """Tells how often the key has been counted."""
        await wait(hold)
        return server.counts[key]

    @server.tool(annotations=ToolAnnotations(idempotentHint=True))
    async def put(key: str, hold: str = "", seconds: float = 0) -> str:
        """Counts a side effect under the key."""
        server.counts[key] += 1
        await wait(hold, seconds)
        return key

    @server.tool()
    async def order(key: str, hold: str = "", seconds: float = 0) -> str:
        """Counts a side effect under the key."""
        server.counts[key] += 1
        await wait(hold, seconds)
        return key


def _add_control(server: RecordingMCP) -> None:
    @server.custom_route("/control/counts", methods=["GET"])
    async def counts(_: Request) -> Response:
        return JSONResponse(server.counts)

    @server.custom_route("/control/reset", methods=["POST"])
    async def reset(_: Request) -> Response:
        server.counts.clear()
        server.sessions, server.keeps_sessions, server.next_answer = 0, False, None
        for hold in server.holds.values():
            hold.released.set()
        server.holds.clear()
        return JSONResponse(None)

    @server.custom_route("/control/sessions", methods=["GET"])
    async def sessions(_: Request) -> Response:
        return JSONResponse(server.sessions)

    @server.custom_route("/control/tool/{name}", methods=["POST"])
    async def tool(request: Request) -> Response:
        about = request.query_params.get("about")
        server.add_tool(lambda: "new", name=request.path_params["name"], description=about)
        return JSONResponse(None)

    @server.custom_route("/control/keep", methods=["POST"])
    async def keep(_: Request) -> Response:
        server.keeps_sessions = True
        return JSONResponse(None)

    @server.custom_route("/control/answer/{status}", methods=["POST"])
    async def answer(request: Request) -> Response:
        query = request.query_params
        server.next_answer = Response(query["body"], int(request.path_params["status"]), media_type=query["kind"])
        return JSONResponse(None)

    @server.custom_route("/control/held/{name}", methods=["GET"])
    async def held(request: Request) -> Response:
        hold = server.holds.get(request.path_params["name"])
        return JSONResponse(hold.waiting if hold else 0)

    @server.custom_route("/control/release/{name}", methods=["POST"])
    async def release(request: Request) -> Response:
        hold = server.holds[request.path_params["name"]]
        hold.released.set()
        return JSONResponse(hold.waiting)


def _add_others(server: RecordingMCP) -> None:
    @server.custom_route("/moved", methods=["GET", "POST"])
    async def moved(request: Request) -> Response:
        return RedirectResponse(request.query_params["to"])

    @server.custom_route("/page", methods=["GET", "POST"])
    async def page(_: Request) -> Response:
        return HTMLResponse("<html>")


class McpServer(ServerProcess):
    """Runs the MCP server in a subprocess: `with McpServer() as mcp: … mcp.url` (it ends in /mcp, with `sse` in /sse).

    A kill loses its sessions and counts; the calls so far are kept.
    """

    module = "tests.support.mcp_server"

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        *,
        sse: bool = False,
        token: str = "",
    ) -> None:
        """`token`: 401 without `Authorization: Bearer <token>`."""
        descriptor, name = tempfile.mkstemp(prefix="caravan-mcp-calls-", suffix=".jsonl")
        os.close(descriptor)
        options = ["--sse"] if sse else []
        super().__init__(port, host, ["--calls", name, "--token", token, *options])
        self._calls_file = Path(name)
        weakref.finalize(self, self._calls_file.unlink, missing_ok=True)

    def calls(self) -> list[dict[str, Any]]:
        """Each call of a tool, in order, also while the server is down: `tool`, `arguments`, `_meta` (the request's),
        `authorization` (its header), `id`, `at` (seconds since the epoch) and `ended`: None (still running), finished,
        failed, cancelled or killed.
        """
        return read_calls(self._calls_file)

    def counts(self) -> dict[str, int]:
        """How often the side effect of each key happened."""
        return dict(self.control("GET", "counts"))

    def sessions(self) -> int:
        """How many were opened since the start, or the last reset."""
        return int(self.control("GET", "sessions"))

    def add_tool(self, name: str, about: str = "A new one.") -> None:
        self.control("POST", f"tool/{name}?{urlencode({'about': about})}")

    def keep_sessions(self) -> None:
        """Clients cannot end them (405 for DELETE), as with many servers; until a reset."""
        self.control("POST", "keep")

    def answer_next(self, status: int, kind: str = "text/plain", body: str = "") -> None:
        """The next request of a client in a session is answered so, and not looked at."""
        self.control("POST", f"answer/{status}?{urlencode({'kind': kind, 'body': body})}")

    def release(self, name: str) -> int:
        """Lets every call that holds this name go on, now and until a reset; how many were waiting."""
        return int(self.control("POST", f"release/{name}"))

    def wait_held(self, name: str, count: int = 1, timeout: float = PATIENCE_SECONDS) -> None:
        """Waits, blocking, until so many calls hold this name (seconds)."""
        wait_until(lambda: int(self.control("GET", f"held/{name}")) >= count, timeout)

    def reset(self) -> None:
        """Forgets calls, counts and released names; lets go of what is held."""
        os.truncate(self._calls_file, 0)
        if self.pid:
            self.control("POST", "reset")

    def kill(self) -> None:
        super().kill()
        for call in self.calls():
            if call["ended"] is None:
                append_line(self._calls_file, {"id": call["id"], "ended": "killed"})


class Doors:
    """ASGI middleware: who is let in. Counts sessions, and answers as it was told to."""

    def __init__(self, app: ASGIApp, server: RecordingMCP, token: str) -> None:
        self.app, self.server, self.token = app, server, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(Request(scope)) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send)

    def _answer(self, request: Request) -> Response | None:
        path, is_post = request.url.path, request.method == "POST"
        if path.startswith("/control/"):
            return None
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return Response(status_code=401)
        if self.server.keeps_sessions and request.method == "DELETE":
            return Response(status_code=405)
        in_session = "mcp-session-id" in request.headers or path.startswith("/messages/")
        if is_post and in_session and (answer := self.server.next_answer):
            self.server.next_answer = None
            return answer
        self.server.sessions += not in_session and ((is_post and path == "/mcp") or path == "/sse")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="An MCP server with a few tools.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--calls", type=Path, default=os.devnull, help="the file of JSON lines that records calls")
    parser.add_argument("--sse", action="store_true", help="the older transport, in place of streamable HTTP")
    parser.add_argument("--token", default="", help="what clients must send as Authorization: Bearer")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args()
    if arguments.exit_with_parent:
        exit_with_parent()
    server = build(arguments.host, arguments.calls)
    app, path = (server.sse_app(), "sse") if arguments.sse else (server.streamable_http_app(), "mcp")
    app.add_middleware(Doors, server=server, token=arguments.token)
    listener = socket.create_server((arguments.host, arguments.port), backlog=1024)
    print(f"ready http://{arguments.host}:{listener.getsockname()[1]}/{path}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
