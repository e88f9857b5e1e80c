"""Requests to the tool runtime, for whose answer a client waits: handed to a worker and asked for until it is there.

One task asks Postgres for all that wait in this process, so that many cost no more than one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from contextlib import suppress
from typing import Any

from app.api.service import Service
from app.domain.errors import InvalidRequest, TooManyTurns, Unavailable
from app.identity.secrets import Secrets
from app.stack.tool_requests import INVOKE, NoAnswer
from app.store import tool_requests, workers
from app.store.tool_requests import Answer, Standing

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
RETRY_SECONDS = 0.5
MAX_BYTES = 67_108_864
"""Of a request's arguments. A document in them has a limit of its own (DOCUMENT_MAX_BYTES)."""

LATER = {"Retry-After": "2"}
NO_RETRY = {"x-should-retry": "false"}
"""Told to the SDKs, which make a request that failed with 5xx again by themselves."""


class ToolRequests:
    """Of one web process. `run` is `app.stack.tool_requests.RunOnWorker`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = service.store
        self.max_wait_seconds = service.settings.max_queue_wait_seconds
        self._unanswered: set[str] = set()
        self._waiting: dict[str, asyncio.Future[Standing]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def run(self, method: str, arguments: bytes, principal: str, provider_data: dict[str, Any]) -> bytes:
        """Raises NoAnswer: the method failed, its worker was lost, no worker took it, or Postgres is down."""
        if len(arguments) > MAX_BYTES:
            raise NoAnswer(f"The request's arguments have {len(arguments)} bytes, and may have {MAX_BYTES}.", 413)
        request_id = str(uuid.uuid4())
        try:
            sealed = self._service.sealed(Secrets(provider_data), request_id)
            row = (request_id, principal, method, arguments, sealed, self._service.caps)
            await self._store.run_until_known(tool_requests.add, *row)
        except InvalidRequest as error:
            raise NoAnswer(str(error), 400) from error
        except TooManyTurns as error:
            raise NoAnswer(str(error), 429, LATER) from error
        except Unavailable as error:
            raise NoAnswer(str(error), 503, LATER) from error
        self._unanswered.add(request_id)
        await asyncio.to_thread(self._service.doorbell.ring_for_tool, request_id)
        return await self._answer(request_id, method)

    async def _answer(self, request_id: str, method: str) -> bytes:
        while True:
            standing = await self._standing(request_id)
            if standing.answer is not None:
                if standing.answer.status != 200:
                    raise failed(method, standing.answer)
                return standing.answer.body
            if standing.lost:
                raise worker_lost(method)
            if await self._withdrawn(request_id):
                raise NoAnswer(await self._why_late(), 503)

    async def _standing(self, request_id: str) -> Standing:
        """Once there is something to say of the request."""
        self._waiting[request_id] = asyncio.get_running_loop().create_future()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), name="tool-requests")
        try:
            return await self._waiting[request_id]
        finally:
            del self._waiting[request_id]

    async def _ask(self) -> None:
        while self._waiting:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self._ask_once()
            except Unavailable as error:
                logger.warning("the answers of tools wait: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                logger.exception("the answers of tools cannot be asked for, trying again")
                await asyncio.sleep(RETRY_SECONDS)

    async def _ask_once(self) -> None:
        found = await self._store.run(tool_requests.standings, list(self._waiting), self.max_wait_seconds)
        for request_id, standing in found.items():
            waiting = self._waiting.get(request_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(standing)
        if over := [request_id for request_id, standing in found.items() if standing.answer or standing.lost]:
            self._unanswered.difference_update(over)
            await self._store.run(tool_requests.forget, over)

    async def _withdrawn(self, request_id: str) -> bool:
        try:
            withdrawn = await self._store.run(tool_requests.withdraw, request_id)
        except Unavailable:
            return False
        if withdrawn:
            self._unanswered.discard(request_id)
        return withdrawn

    async def _why_late(self) -> str:
        message = f"No worker took the request within {self.max_wait_seconds:g} s (MAX_QUEUE_WAIT_SECONDS)"
        try:
            live = len(await self._store.run(workers.live_workers))
        except Unavailable:
            return f"{message}."
        return f"{message}: {workers.why_nobody_took_it(live)}."

    async def close(self) -> None:
        """What no worker has taken is withdrawn: nobody here can tell its answer, and its client makes it again."""
        if self._unanswered:
            with suppress(Unavailable):
                await self._store.run(tool_requests.withdraw, *self._unanswered)
        if self._asking is not None:
            self._asking.cancel()
            with suppress(asyncio.CancelledError):
                await self._asking


def failed(method: str, answer: Answer) -> NoAnswer:
    """Of a tool that failed or took too long, too, nobody knows what it has done."""
    again = method != INVOKE or answer.status < 500
    return NoAnswer(json.loads(answer.body), answer.status, None if again else NO_RETRY)


def worker_lost(method: str) -> NoAnswer:
    """A tool may have done its work, so an SDK must not call it again of its own accord; a search or documents may."""
    message = "The worker that ran the request was lost."
    if method != INVOKE:
        return NoAnswer(f"{message} It can be made again.", 503)
    return NoAnswer(f"{message} Whether the tool did its work is unknown.", 503, NO_RETRY)
