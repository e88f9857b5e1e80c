"""The inference provider for `INFERENCE_URL`: any OpenAI-compatible server.

Differs from llama_stack's own remote providers: clients see the model ids as the server knows them, with no provider
in front; no network at start; one HTTP client, and so one connection pool, for each event loop; a lean stream
(`app.stack.chunks`); a default `max_tokens` of 0 means none, and is not sent; no key is made up where none is set.

Not a subclass of `OpenAIMixin`, and without the openai SDK: version 3 of that runs on `httpx2`, version 2 on `httpx`,
and neither takes the other's client or raises the other's errors.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import httpx
from llama_stack.apis.inference import (
    OpenAIChatCompletionRequestWithExtraBody,
    OpenAICompletionRequestWithExtraBody,
    OpenAIEmbeddingsRequestWithExtraBody,
    OpenAIEmbeddingsResponse,
)
from llama_stack.apis.models import Model
from llama_stack.providers.datatypes import Api
from pydantic import BaseModel, Field, SecretStr, ValidationError

from app.stack.chunks import (
    ChatCompletion,
    Chunk,
    ModelError,
    TextCompletion,
    parse_event,
    read_chunks,
    read_events,
    server_error,
)

log = logging.getLogger(__name__)

GATEWAY_TIMEOUT = 504

# Tries of one request, the first included. Only a connection that failed before the answer began is tried again: an
# answer, even an error, is the caller's business, and a stream that has begun cannot be begun again.
TRIES = 3
RETRY_SECONDS = 0.1
CONNECT_SECONDS = 10.0
WRITE_SECONDS = 60.0
# The server usually closes its answer together with `[DONE]`; waiting a moment for that keeps the connection alive.
DRAIN_SECONDS = 0.2

_LOST_CONNECTION = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.CloseError)
_LIMITS_OF_ZERO = ("max_tokens", "max_completion_tokens")


class ModelServerConfig(BaseModel):
    url: str = Field(description="Base of the server, with `/v1`")
    api_key: SecretStr | None = None
    models: list[str] = Field(description="Ids of the models that clients see, as the server knows them")
    timeout_seconds: float = Field(gt=0, description="Seconds without a byte after which a request fails")


class ModelServer:
    """The adapter. Every trouble with the server is a `ModelError` with the server's own status and message."""

    def __init__(self, config: ModelServerConfig) -> None:
        self._config = config
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    async def initialize(self) -> None:
        pass

    async def shutdown(self) -> None:
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def list_models(self) -> None:
        """None: llama_stack leaves the registry alone. `app.stack.registry.publish_models` registers the models."""

    async def should_refresh_models(self) -> bool:
        return False

    async def register_model(self, model: Model) -> Model:
        """The model as it is entered in the registry: under the server's own id, where llama_stack puts a prefix."""
        return model.model_copy(update={"identifier": model.provider_resource_id or model.identifier})

    async def unregister_model(self, model_id: str) -> None:
        pass

    async def openai_chat_completion(
        self, params: OpenAIChatCompletionRequestWithExtraBody
    ) -> ChatCompletion | AsyncIterator[Chunk]:
        """A completion, or an iterator of its chunks, after the server has accepted the request.

        Closing the iterator, or cancelling the task that waits for it, closes the connection to the server at once.
        """
        response = await self._ask("/chat/completions", _body(params))
        if not params.stream:
            return await _whole(response, ChatCompletion)
        blocks = response.aiter_bytes()
        include_usage = bool((params.stream_options or {}).get("include_usage"))
        return _stream(response, read_chunks(blocks, include_usage=include_usage), blocks)

    async def openai_completion(
        self, params: OpenAICompletionRequestWithExtraBody
    ) -> TextCompletion | AsyncIterator[dict[str, Any]]:
        """As `openai_chat_completion`; the chunks of a stream are the server's own objects."""
        response = await self._ask("/completions", _body(params))
        return (
            _stream(response, _objects(blocks := response.aiter_bytes()), blocks)
            if params.stream
            else (await _whole(response, TextCompletion))
        )

    async def openai_embeddings(self, params: OpenAIEmbeddingsRequestWithExtraBody) -> OpenAIEmbeddingsResponse:
        return await _whole(await self._ask("/embeddings", _body(params)), OpenAIEmbeddingsResponse)

    async def _ask(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The head of a successful answer. Its body is still to be read, and the answer to be closed."""
        client = self._client()
        try:
            response = await client.send(client.build_request("POST", self._config.url + path, json=body), stream=True)
        except httpx.HTTPError as error:
            raise _broken(error) from error
        if response.is_success:
            return response
        raise await _refused(response)

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = _new_client(self._config)
        return self._clients[loop]


class PatientClient(httpx.AsyncClient):
    """Sends a request again if the connection failed before the answer began (`TRIES` in all)."""

    async def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        for tries in count(1):
            try:
                return await super().send(request, **kwargs)
            except httpx.HTTPError as error:
                if tries == TRIES or not _is_lost_connection(error):
                    raise
                log.info("The connection to the model server failed before it answered; trying again: %r", error)
                await asyncio.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")


def _new_client(config: ModelServerConfig) -> httpx.AsyncClient:
    return PatientClient(
        headers={"Authorization": f"Bearer {config.api_key.get_secret_value()}"} if config.api_key else {},
        timeout=httpx.Timeout(config.timeout_seconds, connect=CONNECT_SECONDS, write=WRITE_SECONDS, pool=None),
        # The engine bounds what runs at once; a second bound here would only make turns wait unseen.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=200, keepalive_expiry=30),
        follow_redirects=True,
    )


def _body(params: BaseModel) -> dict[str, Any]:
    # Fields that the type does not know are llama_stack's `extra_body`; they are dumped beside the others.
    body: dict[str, Any] = params.model_dump(exclude_none=True)
    return {name: value for name, value in body.items() if name not in _LIMITS_OF_ZERO or value}


async def _stream[T](
    response: httpx.Response, chunks: AsyncIterator[T], blocks: AsyncIterator[bytes]
) -> AsyncIterator[T]:
    try:
        async for chunk in chunks:
            yield chunk
        with suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(DRAIN_SECONDS):
                async for _ in blocks:
                    pass
    except httpx.HTTPError as error:
        raise _broken(error) from error
    finally:
        await response.aclose()


async def _objects(blocks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    async for data in read_events(blocks):
        if data == b"[DONE]":
            return
        yield parse_event(data)


async def _whole[T: BaseModel](response: httpx.Response, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(await response.aread())
    except httpx.HTTPError as error:
        raise _broken(error) from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ModelError(f"The model server sent what is no {kind.__name__}: {problem}") from error
    finally:
        await response.aclose()


def _is_lost_connection(error: httpx.HTTPError) -> bool:
    # A server that closed an idle connection just as it was used again shows as RemoteProtocolError without an answer.
    return isinstance(error, _LOST_CONNECTION) or (
        isinstance(error, httpx.RemoteProtocolError) and "without sending a response" in str(error)
    )


def _broken(error: httpx.HTTPError) -> ModelError:
    if isinstance(error, httpx.TimeoutException):
        return ModelError("The model server did not answer in time.", GATEWAY_TIMEOUT)
    if isinstance(error, httpx.ConnectError):
        return ModelError(f"The model server cannot be reached: {error}")
    return ModelError(f"The connection to the model server broke: {error or type(error).__name__}")


async def _refused(response: httpx.Response) -> ModelError:
    try:
        text = (await response.aread()).decode(errors="replace").strip()
    except httpx.HTTPError:
        text = ""
    finally:
        await response.aclose()
    try:
        body: Any = json.loads(text)
    except ValueError:
        body = text
    return server_error(body or f"HTTP {response.status_code} {response.reason_phrase}", response.status_code)


async def get_adapter_impl(config: ModelServerConfig, _deps: dict[Api, Any]) -> ModelServer:
    return ModelServer(config)
