"""A web search server of the shape of Tavily's, Brave's and Bing's, which remembers who asked what with which key.

The query tells what is to happen:

    STATUS n        answers with this status, and repeats the key that it was sent in the body
    LEAK            repeats the key in an honest answer
    HUGE n          n bytes in one result
    PACKED n        the same, compressed
    GARBAGE         no JSON
    OTHER           JSON of another shape
    NOTHING         no results
    HANG            never answers
    DROP            closes the connection
    anything else   two results about it

Control: GET /control/searches, POST /control/reset.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support import ServerProcess, exit_with_parent

Found = list[dict[str, str]]


def results(query: str, key: str) -> Found:
    """`title`, `url`, `text` of each."""
    command, _, rest = query.partition(" ")
    if command == "NOTHING":
        return []
    if command in ("HUGE", "PACKED"):
        return [{"title": "huge", "url": "https://huge.example", "text": "x" * int(rest)}]
    about = f"{query} {key}" if command == "LEAK" else query
    return [
        {"title": f"About {about}", "url": f"https://{n}.example/", "text": f"What {n} says about {about}"}
        for n in ("one", "two")
    ]


def as_tavily(query: str, found: Found) -> dict[str, Any]:
    rows = [
        {"title": r["title"], "url": r["url"], "content": r["text"], "score": 0.9, "raw_content": None} for r in found
    ]
    return {"query": query, "answer": None, "images": [], "results": rows, "response_time": 0.1}


def as_brave(query: str, found: Found) -> dict[str, Any]:
    rows = [{"type": "search_result", "title": r["title"], "url": r["url"], "description": r["text"]} for r in found]
    main = [{"type": "web", "index": index, "all": False} for index in range(len(rows))]
    web = {"type": "search", "results": rows}
    return {"type": "search", "query": {"original": query}, "mixed": {"type": "mixed", "main": main}, "web": web}


def as_bing(query: str, found: Found) -> dict[str, Any]:
    pages = [{"id": "1", "name": r["title"], "url": r["url"], "snippet": r["text"]} for r in found]
    return {"_type": "SearchResponse", "queryContext": {"originalQuery": query}, "webPages": {"value": pages}}


SHAPES = {"tavily": as_tavily, "brave": as_brave, "bing": as_bing}


class Search:
    """The application."""

    def __init__(self) -> None:
        self.searches: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[
                Route("/search", self.tavily, methods=["POST"]),
                Route("/web/search", self.brave, methods=["GET"]),
                Route("/search", self.bing, methods=["GET"]),
                Route("/control/searches", self.shown, methods=["GET"]),
                Route("/control/reset", self.reset, methods=["POST"]),
            ]
        )

    async def tavily(self, request: Request) -> Response:
        body = await request.json()
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        return await self.answer("tavily", body["query"], key, body)

    async def brave(self, request: Request) -> Response:
        query = dict(request.query_params)
        return await self.answer("brave", query["q"], request.headers["x-subscription-token"], query)

    async def bing(self, request: Request) -> Response:
        query = dict(request.query_params)
        return await self.answer("bing", query["q"], request.headers["ocp-apim-subscription-key"], query)

    async def answer(self, shape: str, query: str, key: str, asked: dict[str, Any]) -> Response:
        self.searches.append({"shape": shape, "query": query, "key": key, "asked": asked})
        command, _, rest = query.partition(" ")
        if command == "STATUS":
            return JSONResponse({"detail": {"error": f"The key {key} is refused."}}, int(rest))
        if command == "HANG":
            await asyncio.Event().wait()
        if command == "DROP":
            raise RuntimeError("closes the connection")
        if command == "GARBAGE":
            return Response(f"<html>{key}</html>")
        if command == "OTHER":
            return JSONResponse([key])
        content = json.dumps(SHAPES[shape](query, results(query, key))).encode()
        if command == "PACKED":
            return Response(gzip.compress(content), headers={"content-encoding": "gzip"})
        return Response(content, media_type="application/json")

    async def shown(self, _: Request) -> Response:
        return JSONResponse(self.searches)

    async def reset(self, _: Request) -> Response:
        self.searches.clear()
        return JSONResponse(None)


class SearchServer(ServerProcess):
    """Runs the server in a subprocess: `with SearchServer() as search: … search.url`."""

    module = "tests.support.search_server"

    def searches(self) -> list[dict[str, Any]]:
        """`shape` (tavily, brave, bing), `query`, `key` and `asked`: the body, or the query's parameters."""
        found: list[dict[str, Any]] = self.control("GET", "searches")
        return found

    def reset(self) -> None:
        self.control("POST", "reset")


def main() -> None:
    parser = argparse.ArgumentParser(description="A web search server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args()
    if arguments.exit_with_parent:
        exit_with_parent()
    listener = socket.create_server((arguments.host, arguments.port), backlog=1024)
    print(f"ready http://{arguments.host}:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(Search().app, log_level="critical")).run(sockets=[listener])


if __name__ == "__main__":
    main()
