"""The inference provider for `INFERENCE_URL` and `EMBEDDING_URL`: any OpenAI-compatible server.

Differs from llama_stack's own remote providers: clients see the model ids as the server knows them, with no provider
in front; no network at start; one HTTP client, and so one connection pool, for each event loop; a lean stream
(`app.stack.chunks`); a default `max_tokens` of 0 means none, and is not sent; no key is made up where none is set.

Not a subclass of `OpenAIMixin`, and without the openai SDK: that parses slowly and makes a client for every request.
aiohttp, which llama_stack needs anyway, because httpx's pool searches all idle connections at every request: with 64
streams at once its client took 8.7 ms of CPU a stream, aiohttp's 0.2 ms.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
from llama_stack.apis.inference import (
    OpenAIChatCompletionRequestWithExtraBody,
    OpenAICompletionRequestWithExtraBody,
    OpenAIEmbeddingsRequestWithExtraBody,
    OpenAIEmbeddingsResponse,
    OpenAIEmbeddingUsage,
)
from llama_stack.apis.models import Model
from llama_stack.providers.datatypes import Api
from pydantic import BaseModel, Field, SecretStr, ValidationError

from app.stack.chunks import (
    UNFINISHED,
    ChatCompletion,
    Chunk,
    ModelError,
    TextCompletion,
    parse_event,
    read_chunks,
    read_events,
    renamed,
    server_error,
)

log = logging.getLogger(__name__)

GATEWAY_TIMEOUT = 504

# Tries of one request, the first included. Only a connection that failed before the answer began is tried again: an
# answer, even an error, is the caller's business, and a stream that has begun cannot be begun again.
TRIES = 3
RETRY_SECONDS = 0.1
EMBEDDING_BATCH = 64
CONNECT_SECONDS = 10.0
KEEPALIVE_SECONDS = 30.0
# The server usually closes its answer together with `[DONE]`; waiting a moment for that keeps the connection alive.
DRAIN_SECONDS = 0.2
MAX_RETRY_AFTER = 86_400

_LIMITS_OF_ZERO = ("max_tokens", "max_completion_tokens")
_SECONDS = re.compile("[0-9]{1,5}")


class ModelServerConfig(BaseModel):
    url: str = Field(description="Base of the server, with `/v1`")
    api_key: SecretStr | None = None
    models: list[str] = Field(description="Ids of the models that clients see, as the server knows them")
    aliases: dict[str, str] = Field(default={}, description="More ids that clients see, each of one of these models")
    embedding_dimension: int | None = Field(default=None, description="Of its models, if they are embedding models")
    settings: str = Field(default="", description="What its settings begin with, for errors to name; empty: not named")
    timeout_seconds: float = Field(gt=0, description="Seconds without a byte after which a request fails")


class ModelServer:
    """The adapter. Every trouble with the server is a `ModelError` with the server's own status and message."""

    def __init__(self, config: ModelServerConfig) -> None:
        self._config = config
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = WeakKeyDictionary()

    async def initialize(self) -> None:
        pass

    async def shutdown(self) -> None:
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

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
        blocks = response.content.iter_any()
        include_usage = bool((params.stream_options or {}).get("include_usage"))
        return _stream(response, read_chunks(blocks, include_usage=include_usage), blocks)

    async def openai_completion(
        self, params: OpenAICompletionRequestWithExtraBody
    ) -> TextCompletion | AsyncIterator[dict[str, Any]]:
        """As `openai_chat_completion`; the chunks of a stream are the server's own objects."""
        response = await self._ask("/completions", _body(params))
        return (
            _stream(response, _objects(blocks := response.content.iter_any()), blocks)
            if params.stream
            else (await _whole(response, TextCompletion))
        )

    async def openai_embeddings(self, params: OpenAIEmbeddingsRequestWithExtraBody) -> OpenAIEmbeddingsResponse:
        """Of any number of texts: asked for in batches that any server takes, one after the other."""
        texts = [params.input] if isinstance(params.input, str) else params.input
        answers = [
            await self._embed(params.model_copy(update={"input": texts[start : start + EMBEDDING_BATCH]}))
            for start in range(0, len(texts) or 1, EMBEDDING_BATCH)
        ]
        return answers[0] if len(answers) == 1 else _joined(answers)

    async def _embed(self, params: OpenAIEmbeddingsRequestWithExtraBody) -> OpenAIEmbeddingsResponse:
        with self._naming_settings():
            answer = await _whole(await self._ask("/embeddings", _body(params)), OpenAIEmbeddingsResponse)
        if params.dimensions is None:
            self._check_dimension(answer)
        return answer

    def _check_dimension(self, answer: OpenAIEmbeddingsResponse) -> None:
        expected = self._config.embedding_dimension
        found = {len(entry.embedding) for entry in answer.data if isinstance(entry.embedding, list)} - {expected}
        if expected and found:
            prefix = self._config.settings
            raise ModelError(f"{prefix}_DIMENSION is {expected}, but {prefix}_URL gave {found.pop()} numbers")

    @contextmanager
    def _naming_settings(self) -> Iterator[None]:
        """Of an embeddings server, an error says which setting is to blame: who searches may not know of it."""
        try:
            yield
        except ModelError as error:
            if not (prefix := self._config.settings):
                raise
            if error.status_code in (401, 403):  # not the client's key was refused, but ours
                raise ModelError(f"{prefix}_URL refused {prefix}_API_KEY: {error}") from error
            message = f"{prefix}_URL ({self._config.url}): {error}"
            raise ModelError(message, error.status_code, error.details, error.retry_after) from error

    async def relay(
        self, path: str, body: dict[str, Any], *, name: str, streams: bool
    ) -> bytes | AsyncIterator[dict[str, Any]]:
        """The server's own answer to a client's own request, with `name` as its model, or its chunks; neither is looked
        into.

        Closing the iterator, or cancelling the task that waits for it, closes the connection to the server at once.
        """
        with self._naming_settings():
            response = await self._ask(path, body)
            if streams:
                return _stream(response, _objects(blocks := response.content.iter_any()), blocks)
            try:
                return renamed(await response.read(), name)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise _broken(error) from error
            finally:
                response.close()

    async def _ask(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """The head of a successful answer. Its body is still to be read, and the answer to be closed."""
        try:
            response = await self._post(self._config.url + path, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _broken(error) from error
        if response.status < 300:
            return response
        raise await _refused(response)

    async def _post(self, url: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """Asks again if the connection failed before the answer began (`TRIES` in all)."""
        for tries in count(1):
            try:
                return await self._client().post(url, json=body)
            except aiohttp.ClientConnectionError as error:
                if tries == TRIES or isinstance(error, TimeoutError):
                    raise
                log.info("The connection to the model server failed before it answered; trying again: %r", error)
                await asyncio.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")

    def _client(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = _new_client(self._config)
        return self._clients[loop]


def _new_client(config: ModelServerConfig) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {config.api_key.get_secret_value()}"} if config.api_key else {},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=config.timeout_seconds),
        # The engine bounds what runs at once; a second bound here would only make turns wait unseen.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=True,
    )


def _body(params: BaseModel) -> dict[str, Any]:
    # Fields that the type does not know are llama_stack's `extra_body`; they are dumped beside the others.
    body: dict[str, Any] = params.model_dump(exclude_none=True)
    return {name: value for name, value in body.items() if name not in _LIMITS_OF_ZERO or value}


def _joined(answers: list[OpenAIEmbeddingsResponse]) -> OpenAIEmbeddingsResponse:
    entries = (entry for answer in answers for entry in answer.data)
    return OpenAIEmbeddingsResponse(
        data=[entry.model_copy(update={"index": index}) for index, entry in enumerate(entries)],
        model=answers[0].model,
        usage=OpenAIEmbeddingUsage(
            prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
            total_tokens=sum(answer.usage.total_tokens for answer in answers),
        ),
    )


async def _stream[T](
    response: aiohttp.ClientResponse, chunks: AsyncIterator[T], blocks: AsyncIterator[bytes]
) -> AsyncIterator[T]:
    try:
        async for chunk in chunks:
            yield chunk
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(DRAIN_SECONDS):
                async for _ in blocks:
                    pass
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _broken(error) from error
    finally:
        response.close()


async def _objects(blocks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Raises ModelError, also if the server ended before any choice was finished."""
    finished = False
    async for data in read_events(blocks):
        if data == b"[DONE]":
            return
        event = parse_event(data)
        choices = event.get("choices")
        if isinstance(choices, list):
            finished = finished or any(choice.get("finish_reason") for choice in choices if isinstance(choice, dict))
        yield event
    if not finished:
        raise ModelError(UNFINISHED)


async def _whole[T: BaseModel](response: aiohttp.ClientResponse, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(await response.read())
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _broken(error) from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ModelError(f"The model server sent what is no {kind.__name__}: {problem}") from error
    finally:
        response.close()


def _broken(error: aiohttp.ClientError | TimeoutError) -> ModelError:
    if isinstance(error, TimeoutError):
        return ModelError("The model server did not answer in time.", GATEWAY_TIMEOUT)
    if isinstance(error, aiohttp.ClientConnectorError):
        return ModelError(f"The model server cannot be reached: {error}")
    return ModelError(f"The connection to the model server broke: {str(error) or type(error).__name__}")


async def _refused(response: aiohttp.ClientResponse) -> ModelError:
    try:
        text = (await response.read()).decode(errors="replace").strip()
    except (aiohttp.ClientError, TimeoutError):
        text = ""
    finally:
        response.close()
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        body = text
    told = body or f"HTTP {response.status} {response.reason}"
    return server_error(told, response.status, _retry_after(response.headers))


def _retry_after(headers: Mapping[str, str]) -> int | None:
    """None: it names no seconds, or a date, or more than a day."""
    seconds = headers.get("Retry-After", "")
    return int(seconds) if _SECONDS.fullmatch(seconds) and int(seconds) <= MAX_RETRY_AFTER else None


async def get_adapter_impl(config: ModelServerConfig, _deps: dict[Api, Any]) -> ModelServer:
    return ModelServer(config)
