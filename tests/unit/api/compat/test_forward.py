"""A route that answers with what another route answers: over HTTP, in one application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Body, FastAPI, Request, Response
from starlette.responses import JSONResponse, StreamingResponse

from app.api import errors
from app.api.compat.forward import Chunks, Forwarded, routes_of
from app.api.compat.paths import CurrentPaths
from app.domain.errors import CompletionError


class Doubled(Chunks):
    """Each chunk twice, and one that counts them at the end."""

    def __init__(self) -> None:
        self.seen = 0

    def of(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.seen += 1
        yield from (chunk, chunk)

    def end(self) -> Iterator[dict[str, Any]]:
        yield {"seen": self.seen}


AnyBody = Annotated[Any, Body()]

app = FastAPI()
errors.install(app, request_max_bytes=10_000)
app.add_middleware(CurrentPaths)


@app.post("/v1/inner")
async def inner(request: Request, body: AnyBody) -> Response:
    if "status" in body:
        return JSONResponse({"detail": "no"}, body["status"])
    if "pieces" in body:
        return StreamingResponse(pieces(body["pieces"]), media_type="text/event-stream")
    return JSONResponse({"body": body, "query": str(request.query_params), "key": request.headers["authorization"]})


async def pieces(texts: list[str]) -> AsyncIterator[str]:
    for text in texts:
        yield text


@app.post("/outer/{name}")
async def outer(name: str, request: Request, body: AnyBody) -> Response:
    changed = {**body, "name": name}
    return Forwarded(routes_of(request), "POST", "/v1/inner", changed, answer=lambda answer: [answer], chunks=Doubled())


@app.post("/untranslatable")
async def untranslatable(request: Request, body: AnyBody) -> Response:
    def fail(answer: Any) -> Any:
        raise CompletionError("no choice", 502)

    return Forwarded(routes_of(request), "POST", "/v1/inner", body, answer=fail)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    headers = {"authorization": "Bearer k"}
    async with httpx.AsyncClient(transport=transport, base_url="http://caravan", headers=headers) as plain:
        yield plain


async def test_the_body_and_the_answer_are_translated(client: httpx.AsyncClient) -> None:
    """The caller's headers and query go along; the lengths are the translated bodies' own."""
    answer = await client.post("/outer/é?a=1", json={"x": "é"})
    assert answer.json() == [{"body": {"x": "é", "name": "é"}, "query": "a=1", "key": "Bearer k"}]
    assert int(answer.headers["content-length"]) == len(answer.content)


async def test_a_translation_that_fails_has_a_status(client: httpx.AsyncClient) -> None:
    """That of its error, as if the outer route had raised it."""
    answer = await client.post("/untranslatable", json={})
    assert (answer.status_code, answer.json()) == (502, {"detail": "no choice"})


async def test_an_error_is_passed_on_as_it_is(client: httpx.AsyncClient) -> None:
    """Its status and body are the other route's."""
    answer = await client.post("/outer/n", json={"status": 418})
    assert (answer.status_code, answer.json()) == (418, {"detail": "no"})


async def test_a_stream_is_translated_however_it_was_cut(client: httpx.AsyncClient) -> None:
    """Lines end with LF, the data are ASCII, comments stay without a blank line, `[DONE]` is dropped."""
    sent = 'data: {"t":"é"}\r\n\r\n: ping\n\nevent: x\ndata:{"t":2}\n\ndata: [DONE]\n\n'
    for cut in (1, 5, 9, 30, len(sent)):
        texts = [sent[start : start + cut] for start in range(0, len(sent), cut)]
        answer = await client.post("/outer/n", json={"pieces": texts})
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.text.split("\n")
        assert [line for line in lines if line] == [
            'data: {"t":"\\u00e9"}',
            'data: {"t":"\\u00e9"}',
            ": ping",
            'data: {"t":2}',
            'data: {"t":2}',
            'data: {"seen":2}',
        ]
        assert lines[lines.index(": ping") + 1] != ""


async def test_an_older_path_is_another_name_of_the_same_route(client: httpx.AsyncClient) -> None:
    """Routing sees the current one."""
    answer = await client.post("/v1/openai/v1/inner", json={"a": 1})
    assert answer.json()["body"] == {"a": 1}


@pytest.mark.parametrize("prefix", ["", "/behind"])
async def test_an_older_path_behind_a_proxys_prefix(prefix: str) -> None:
    """`uvicorn --root-path`: every path has it in front, or none, as the proxy does it."""
    transport = httpx.ASGITransport(app, root_path="/behind")
    headers = {"authorization": "Bearer k"}
    async with httpx.AsyncClient(transport=transport, base_url="http://caravan", headers=headers) as plain:
        answer = await plain.post(f"{prefix}/v1/openai/v1/inner", json={"a": 1})
    assert answer.json()["body"] == {"a": 1}
