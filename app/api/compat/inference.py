"""The inference API of 0.1 and 0.2: `/v1/inference/…`, answered by OpenAI's routes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from llama_stack.apis.common.content_types import InterleavedContent, InterleavedContentItem
from pydantic import BaseModel, Field

from app.api.compat.forward import Chunks, Forwarded, routes_of
from app.api.compat.openai import (
    BAD_GATEWAY,
    ChatChunks,
    ChatCompletion,
    Inference,
    chat_answer,
    chat_request,
    choices,
    common_request,
    first_choice,
    stop_reason,
    text,
)
from app.domain.errors import CompletionError, InvalidRequest

router = APIRouter(tags=["Inference of 0.1 and 0.2"])

JSON = dict[str, Any]


class Completion(Inference):
    content: InterleavedContent


class Embeddings(BaseModel):
    model_id: str
    contents: Annotated[list[str | InterleavedContentItem], Field(min_length=1)]
    output_dimension: Annotated[int, Field(ge=1)] | None = None
    task_type: Literal["query", "document"] | None = Field(default=None, description="Has no effect")
    text_truncation: Literal["none", "start", "end"] | None = Field(
        default=None, description="Has no effect: the model server truncates, or refuses"
    )


@router.post("/inference/chat-completion")
async def chat_completion(body: ChatCompletion, request: Request) -> Response:
    """Let the model answer a conversation; with `stream: true` as `ChatCompletionResponseStreamChunk`s."""
    asked = chat_request(body)
    return Forwarded(routes_of(request), "POST", "/v1/chat/completions", asked, answer=chat_answer, chunks=ChatChunks())


@router.post("/inference/completion")
async def completion(body: Completion, request: Request) -> Response:
    """Let the model continue a text; with `stream: true` as `CompletionResponseStreamChunk`s."""
    for field in ("response_format", "logprobs"):
        if getattr(body, field) is not None:
            raise InvalidRequest(f"{field}: is supported by chat completions only")
    asked = {**common_request(body), "prompt": text("content", body.content)}
    return Forwarded(
        routes_of(request), "POST", "/v1/completions", asked, answer=completion_answer, chunks=CompletionChunks()
    )


@router.post("/inference/embeddings")
async def embeddings(body: Embeddings, request: Request) -> Response:
    """The embeddings of texts."""
    texts = [text(f"contents.{number}", given) for number, given in enumerate(body.contents)]
    dimensions = {"dimensions": body.output_dimension} if body.output_dimension else {}
    asked = {"model": body.model_id, "input": texts, "encoding_format": "float", **dimensions}
    return Forwarded(routes_of(request), "POST", "/v1/embeddings", asked, answer=embeddings_answer)


def completion_answer(completion: JSON) -> JSON:
    """`CompletionResponse` of a completion. Raises CompletionError: it has no choice."""
    choice = first_choice(completion)
    return {"content": choice.get("text") or "", "stop_reason": stop_reason(choice), "logprobs": None}


def embeddings_answer(answer: JSON) -> JSON:
    """`EmbeddingsResponse`. Raises CompletionError: there are none."""
    try:
        return {"embeddings": [row["embedding"] for row in answer["data"]]}
    except (KeyError, TypeError):
        raise CompletionError("The model server sent no embeddings.", BAD_GATEWAY) from None


class CompletionChunks(Chunks):
    """`CompletionResponseStreamChunk`s; the last one has the reason why the model stopped."""

    def __init__(self) -> None:
        self._finish: JSON = {}
        self._failed = False

    def of(self, chunk: JSON) -> Iterator[JSON]:
        if "error" in chunk:
            self._failed = True
            yield chunk
        for choice in choices(chunk):
            if choice.get("finish_reason"):
                self._finish = choice
            if choice.get("text"):
                yield {"delta": choice["text"], "stop_reason": None, "logprobs": None}

    def end(self) -> Iterator[JSON]:
        if not self._failed:
            yield {"delta": "", "stop_reason": stop_reason(self._finish), "logprobs": None}
