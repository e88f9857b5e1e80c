"""Chat completions, completions and embeddings: passed to the model in this process, streamed as the chunks come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from llama_stack.apis.inference import (
    OpenAIChatCompletionRequestWithExtraBody,
    OpenAICompletionRequestWithExtraBody,
    OpenAIEmbeddingsRequestWithExtraBody,
    OpenAIEmbeddingsResponse,
)
from pydantic import ConfigDict, Field
from starlette.types import Receive, Scope, Send

from app.api.compat.version import is_llama_stack
from app.api.documentation import event_stream, refusals
from app.api.service import JSON, CurrentService, Owner, Service
from app.api.sse import EventStream
from app.domain.error_bodies import openai_error
from app.domain.errors import CaravanError, CompletionError
from app.stack.chunks import ChatCompletion, TextCompletion
from app.stack.completions import CHAT, EMBEDDINGS, TEXT, Begun, Endpoint
from app.stack.mounted import StackApp

router = APIRouter(tags=["Inference"])

DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499  # nginx's; nobody reads it

Objects = list[dict[str, Any]]


def _answers(model: type[Any], event: str | None = None, object_: str = "") -> JSON:
    example = (
        f'data: {{"id":"…","object":"{object_}","created":0,"model":"my-model","choices":[…]}}\n\ndata: [DONE]\n\n'
    )
    content = {"content": event_stream(event, example, error="OpenAIError", end="[DONE]")} if event else {}
    answer = {"model": model, "description": "The model server's own answer; with `stream: true` its chunks", **content}
    return {"response_model": None, "responses": {200: answer, **refusals(404, 502, 504, "default")}}


def _examples(**fields: Any) -> JSON:
    return {"examples": [{"model": "my-model", **fields}]}


# What the model server knows to be wrong is its business: it may know more than llama_stack's types.


class ChatCompletionRequest(OpenAIChatCompletionRequestWithExtraBody):
    model_config = ConfigDict(json_schema_extra=_examples(messages=[{"role": "user", "content": "Say hello."}]))

    messages: Annotated[Objects, Field(min_length=1)]
    response_format: dict[str, Any] | None = None


class CompletionRequest(OpenAICompletionRequestWithExtraBody):
    model_config = ConfigDict(json_schema_extra=_examples(prompt="Once upon a time", max_tokens=16))

    logprobs: int | bool | None = None


class EmbeddingsRequest(OpenAIEmbeddingsRequestWithExtraBody):
    model_config = ConfigDict(json_schema_extra=_examples(input=["A text", "Another one"]))

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: str | None = None


@router.post("/chat/completions", **_answers(ChatCompletion, "ChatCompletionChunk", "chat.completion.chunk"))
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, service: CurrentService, owner: Owner
) -> Response:
    """Let the model answer a conversation. Nothing is stored, no tool is run."""
    return await _answer(CHAT, body, request, service, owner)


@router.post("/completions", **_answers(TextCompletion, "TextCompletion", "text_completion"))
async def create_completion(
    body: CompletionRequest, request: Request, service: CurrentService, owner: Owner
) -> Response:
    """Let the model go on with a text."""
    return await _answer(TEXT, body, request, service, owner)


@router.post("/embeddings", **_answers(OpenAIEmbeddingsResponse))
async def create_embeddings(
    body: EmbeddingsRequest, request: Request, service: CurrentService, owner: Owner
) -> Response:
    """Embed texts."""
    return await _answer(EMBEDDINGS, body, request, service, owner)


async def _answer(endpoint: Endpoint, body: Any, request: Request, service: Service, owner: str) -> Response:
    """What fails before the first chunk has a status of its own; a model that thinks for longer than `PING_SECONDS`
    is waited for on a stream, so that the connection is kept alive."""
    stack: StackApp = request.app.state.stack
    # Just what was sent, null and unknown fields too.
    asked: JSON = body.model_dump(exclude_unset=True)
    streams = endpoint.streams(asked)
    answer = asyncio.create_task(stack.complete(endpoint, asked, principal=owner, headers=request.headers))
    handed_over = False
    try:
        there = await _wait(answer, request, service.settings.ping_seconds if streams else None)
        if not there:
            return Response(status_code=CLIENT_LEFT)
        if not streams:
            return Response(await answer, media_type="application/json")
        if answer.done():
            answer.result()
        handed_over = True
        return CompletionStream(answer, request, service)
    finally:
        if not handed_over:
            answer.cancel()


async def _wait(answer: asyncio.Task[Any], request: Request, seconds: float | None) -> bool:
    """Until the answer is there, or the time is over. False: the client has left before."""
    left = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((answer, left), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return answer.done() or not left.done()
    finally:
        left.cancel()


async def _disconnected(request: Request) -> None:
    """The body has been read, so there is nothing else to come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class CompletionStream(EventStream):
    """The chunks as `data:` events, then `[DONE]`; an error amid them as OpenAI's error object, and nothing after it.

    Llama Stack's clients get no `[DONE]`, since those up to 0.3 take it for JSON.
    """

    def __init__(self, answer: asyncio.Task[bytes | Begun], request: Request, service: Service) -> None:
        self._answer = answer
        super().__init__(
            _events(answer, b"" if is_llama_stack(request.headers) else DONE),
            ping_seconds=service.settings.ping_seconds,
            send_timeout_seconds=service.settings.stream_send_timeout_seconds,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._hang_up()

    async def _hang_up(self) -> None:
        """However it ended, and also if it never began: the model need not go on."""
        self._answer.cancel()
        if self._answer.done() and not self._answer.cancelled() and not self._answer.exception():
            begun = self._answer.result()
            assert isinstance(begun, Begun)
            await begun.close()


async def _events(answer: asyncio.Task[bytes | Begun], end: bytes) -> AsyncIterator[bytes]:
    try:
        begun = await answer
        assert isinstance(begun, Begun)
        async for chunk in begun.chunks():
            yield _event(chunk)
    except CaravanError as error:
        yield _event(_error(error))
    else:
        if end:
            yield end


def _event(data: JSON) -> bytes:
    # ASCII: a character that is cut between two reads breaks several SDKs.
    return b"data: %b\n\n" % json.dumps(data, separators=(",", ":")).encode()


def _error(error: CaravanError) -> JSON:
    if isinstance(error, CompletionError):
        return openai_error(error.status, str(error), param=error.param, code=error.code)
    return openai_error(400, str(error), param=getattr(error, "param", None))
