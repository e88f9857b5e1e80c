"""Chat completions, completions and embeddings, as HTTP clients ask for them.

A model of ours (`app.stack.inference`) gets the request as it came, and its answer goes back as it is: whatever the two
sides know passes through. A provider of a user's own `run.yaml` is asked through llama_stack's typed API, and what
its types would drop is refused. Both go by llama_stack's registry and policy: whoever is identified may use any model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import llama_stack.core.server.server as server
from llama_stack.apis.common.errors import ModelNotFoundError, ModelTypeError
from llama_stack.apis.inference import (
    OpenAIChatCompletionRequestWithExtraBody,
    OpenAICompletionRequestWithExtraBody,
    OpenAIEmbeddingsRequestWithExtraBody,
)
from llama_stack.apis.models import ModelType
from llama_stack.core.request_headers import PROVIDER_DATA_VAR
from llama_stack.core.utils.context import preserve_contexts_async_generator
from llama_stack.providers.datatypes import Api
from llama_stack.providers.utils.telemetry.tracing import CURRENT_TRACE_CONTEXT
from pydantic import BaseModel, ValidationError

from app.domain.error_bodies import first_problem
from app.domain.errors import CaravanError, CompletionError, InvalidRequest
from app.identity.secrets import HEADER, provider_data
from app.stack import access
from app.stack.chunks import ModelError
from app.stack.inference import ModelServer
from app.stack.library import Impls, close_stream

log = logging.getLogger(__name__)

JSON = dict[str, Any]
INTERNAL_ERROR = 500


@dataclass(frozen=True)
class Endpoint:
    """`path` is the model server's; `request` and `method` are llama_stack's."""

    path: str
    request: type[BaseModel]
    method: str
    model_type: ModelType = ModelType.llm

    def streams(self, body: JSON) -> bool:
        return self.model_type == ModelType.llm and bool(body.get("stream"))


CHAT = Endpoint("/chat/completions", OpenAIChatCompletionRequestWithExtraBody, "openai_chat_completion")
TEXT = Endpoint("/completions", OpenAICompletionRequestWithExtraBody, "openai_completion")
EMBEDDINGS = Endpoint("/embeddings", OpenAIEmbeddingsRequestWithExtraBody, "openai_embeddings", ModelType.embedding)


@dataclass(frozen=True)
class Begun:
    """A stream whose first chunk is there, so that what fails before it can be told by a status; `close` it."""

    first: JSON | None
    rest: AsyncGenerator[JSON]

    async def chunks(self) -> AsyncIterator[JSON]:
        """Raises CompletionError."""
        if self.first is not None:
            yield self.first
        async for chunk in self.rest:
            yield chunk

    async def close(self) -> None:
        """Hangs up on the model, if it has not ended."""
        await self.rest.aclose()


async def ask(
    impls: Impls, endpoint: Endpoint, body: JSON, *, principal: str, headers: Mapping[str, str]
) -> bytes | Begun:
    """The whole answer's JSON, or with `stream` in the body what has begun. Cancelling it hangs up on the model.

    `headers` may bring a provider's key (llama_stack's X-LlamaStack-Provider-Data). Raises CompletionError, and
    InvalidRequest for what the model's provider would not be told.
    """
    with access.acting_as(principal, provider_data(headers.get(HEADER))):
        try:
            answer = await _asked(impls.get(Api.inference), endpoint, body)
        except Exception as error:
            raise completion_error(error, body) from error
        if isinstance(answer, bytes):
            return answer
        rest = _chunks(answer, body)
        return Begun(await anext(rest, None), rest)


async def _asked(inference: Any, endpoint: Endpoint, body: JSON) -> Any:
    if inference is None:
        raise CompletionError("This server has no models: its configuration names no inference API.", 404)
    provider, served_as = await inference._get_model_provider(body["model"], endpoint.model_type)
    streams = endpoint.streams(body)
    if isinstance(provider, ModelServer):
        asked = {**body, "model": served_as}
        return await provider.relay(endpoint.path, asked, name=body["model"], streams=streams)
    answer = await getattr(inference, endpoint.method)(_typed(endpoint.request, body))
    return _in_context(answer) if streams else json.dumps(_named(_plain(answer), body["model"])).encode()


async def _in_context(stream: Any) -> AsyncGenerator[JSON]:
    """A provider may look into its context at every step, each of which is another task's."""
    try:
        async for chunk in preserve_contexts_async_generator(stream, [CURRENT_TRACE_CONTEXT, PROVIDER_DATA_VAR]):
            yield _plain(chunk)
    finally:
        await close_stream(stream)


async def _chunks(stream: Any, body: JSON) -> AsyncGenerator[JSON]:
    """Raises CompletionError for every trouble amid the stream."""
    async with aclosing(stream):
        try:
            async for chunk in stream:
                yield _named(chunk, body["model"])
        except Exception as error:
            raise completion_error(error, body) from error


def _plain(answer: Any) -> JSON:
    return answer if isinstance(answer, dict) else answer.model_dump(mode="json")


def _named(answer: JSON, model: str) -> JSON:
    """As llama_stack's: under the name that the client knows the model by."""
    return {**answer, "model": model} if "model" in answer else answer


def _typed(kind: type[BaseModel], body: JSON) -> BaseModel:
    """Raises InvalidRequest: the types have no place for a field. ValidationError: a field has another type."""
    params = kind.model_validate(body)
    if lost := _lost(body, params.model_dump(exclude_unset=True)):
        raise InvalidRequest(f"{lost}: this model's provider does not know this field", lost)
    return params


def _lost(given: Any, kept: Any, path: str = "") -> str | None:
    """The path of the first field of `given` that is not in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            place = f"{path}.{name}" if path else name
            if name not in kept:
                return place
            if lost := _lost(value, kept[name], place):
                return lost
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (value, its) in enumerate(zip(given, kept, strict=False)):
            if lost := _lost(value, its, f"{path}[{index}]"):
                return lost
    return None


def completion_error(error: Exception, body: JSON) -> CaravanError:
    """What a client is told of it."""
    if isinstance(error, CaravanError):
        return error
    if isinstance(error, ModelNotFoundError):
        return CompletionError(str(error), 404, "model", "model_not_found")
    if isinstance(error, ModelTypeError):
        return CompletionError(str(error), 400, "model")
    if isinstance(error, ModelError):
        return _model_error(error)
    if isinstance(error, ValidationError):
        located = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        return InvalidRequest(*first_problem(located, body))
    translated = server.translate_exception(error)
    if translated.status_code == INTERNAL_ERROR:
        log.error("A completion failed for a reason that its client is not told", exc_info=error)
    return CompletionError(str(translated.detail), translated.status_code)


def _model_error(error: ModelError) -> CompletionError:
    if error.status_code in (401, 403):
        # Not the client's key was refused, but ours.
        return CompletionError(f"The model server refused this server's INFERENCE_API_KEY: {error}", 502)
    param, code = (value if isinstance(value := error.details.get(name), str) else None for name in ("param", "code"))
    return CompletionError(str(error), error.status_code, param, code, error.retry_after)
