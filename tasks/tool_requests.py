"""Runs requests to the tool runtime: no turn's, but a client's own, who waits for the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from typing import Any

from app.domain.errors import Unavailable, Unsealable
from app.identity.sealing import Sealing
from app.identity.secrets import Secrets
from app.settings import Settings
from app.stack.access import acting_as
from app.stack.tool_requests import INSERT, NoAnswer, call
from app.store import Store, tool_requests
from app.store.tool_requests import Answer, ToolRequest
from tasks.stack import LlamaStack

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
FAILED = Answer(500, b'"Internal server error: An unexpected error occurred."')
"""By a fault of this program; in llama_stack's words."""


async def claim(store: Store, request_id: str, worker_id: str) -> ToolRequest | None:
    """None: it is not to be run here. Raises Unavailable: nothing was claimed."""
    return await store.run_until_known(tool_requests.claim, request_id, worker_id)


async def answer(settings: Settings, stack: LlamaStack, request: ToolRequest) -> Answer:
    """Failures are answers too. Nothing in it repeats a secret of the request."""
    try:
        secrets = Secrets.opened(Sealing(settings.sealing_keys), request.sealed, request.request_id)
    except Unsealable as error:
        return Answer(500, _json(str(error)))
    try:
        with acting_as(request.owner, secrets.provider_data):
            given = _bounded(settings, await _call(settings, stack, request))
        return Answer(200, _json(secrets.hide(json.loads(given))))
    except NoAnswer as failure:
        if failure.status_code >= 500:
            why = "".join(traceback.format_exception(failure.__cause__ or failure))
            logger.error("tool request %s, %s failed: %s", request.request_id, request.method, secrets.hide(why))
        return Answer(failure.status_code, _json(secrets.hide(failure.detail)))


async def _call(settings: Settings, stack: LlamaStack, request: ToolRequest) -> bytes:
    """Documents have the time that a turn has: to embed many takes long."""
    name = "turn_timeout_seconds" if request.method == INSERT else "tool_timeout_seconds"
    within: float = getattr(settings, name)
    try:
        async with asyncio.timeout(within):
            return await call(stack.tool_runtime, request.method, request.arguments)
    except TimeoutError as error:
        raise NoAnswer(f"The tool took longer than {within:g} s ({name.upper()}).", 504) from error


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _bounded(settings: Settings, given: bytes) -> bytes:
    most = settings.tool_result_max_bytes
    if len(given) > most:
        raise NoAnswer(f"The tool's result has {len(given)} bytes, and may have {most} (TOOL_RESULT_MAX_BYTES).", 502)
    return given


async def finish(store: Store, request: ToolRequest, given: Answer) -> None:
    """Tries until Postgres answers: a client waits."""
    while True:
        try:
            await store.run(tool_requests.finish, request.request_id, request.worker_id, given)
            return
        except Unavailable as error:
            logger.warning("the answer of tool request %s waits: %s", request.request_id, error)
            await asyncio.sleep(RETRY_SECONDS)
