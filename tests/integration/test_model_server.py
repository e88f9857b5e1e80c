"""The adapter of the model server, asked by itself: answers that the scripted model never gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.stack.chunks import ModelError
from app.stack.inference import ModelServer, ModelServerConfig

JSON = "200 OK\r\ncontent-type: application/json"
EVENTS = "200 OK\r\ncontent-type: text/event-stream"
DEEP = "[" * 100_000


class OddServer:
    """Gives every request the same answer, and hangs up."""

    def __init__(self) -> None:
        self.head = JSON
        self.body = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {self.head}\r\nconnection: close\r\n\r\n{self.body}".encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def server() -> OddServer:
    return OddServer()


@pytest.fixture
async def adapter(server: OddServer) -> AsyncIterator[ModelServer]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    asked = ModelServer(ModelServerConfig(url=url, models=[], timeout_seconds=60))
    yield asked
    await asked.shutdown()
    listening.close()


async def relayed(adapter: ModelServer, *, streams: bool) -> list[Any]:
    answer = await adapter.relay("/chat/completions", {"stream": streams}, name="m", streams=streams)
    return [json.loads(answer)] if isinstance(answer, bytes) else [chunk async for chunk in answer]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("head", "body", "message", "status"),
    [
        ("400 No", DEEP, "\\[", 400),
        ("302 Elsewhere", "{}", "302 Elsewhere", 502),
        ("700 Odd", '{"error": {"message": "odd"}}', "odd", 502),
        ("400 No", '{"error": {"message": "so far \\ud83d"}}', r"so far \\ud83d", 400),
        (JSON, '{"error":{"message":"a gateway","code":404}}', "a gateway", 404),
    ],
)
async def test_every_error_has_a_message_and_a_status(
    adapter: ModelServer, server: OddServer, head: str, body: str, message: str, status: int, streams: bool
) -> None:
    """Also one with a good status, where a stream was asked for."""
    server.head, server.body = head, body
    with pytest.raises(ModelError, match=message) as raised:
        await relayed(adapter, streams=streams)
    assert raised.value.status_code == status


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("86400", 86400),
        ("0", 0),
        ("86401", None),
        ("-1", None),
        ("1.5", None),
        ("9" * 5000, None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
async def test_of_a_wish_to_wait_only_a_number_of_seconds_is_taken(
    adapter: ModelServer, server: OddServer, header: str, seconds: int | None
) -> None:
    server.head = f"429 Busy\r\nretry-after: {header}"
    with pytest.raises(ModelError) as raised:
        await relayed(adapter, streams=False)
    assert raised.value.retry_after == seconds


async def test_an_answer_that_is_nested_too_deeply_is_an_error(adapter: ModelServer, server: OddServer) -> None:
    """The server's, whole or amid a stream."""
    for server.head, server.body in ((JSON, DEEP), (EVENTS, f"data: {DEEP}\n\n")):
        with pytest.raises(ModelError, match="nested"):
            await relayed(adapter, streams=server.head == EVENTS)


async def test_choices_that_are_no_list_are_passed_on(adapter: ModelServer, server: OddServer) -> None:
    """The client's business, as everything in an answer."""
    server.head, server.body = EVENTS, 'data: {"choices":5}\n\ndata: [DONE]\n\n'
    assert await relayed(adapter, streams=True) == [{"choices": 5}]
