"""The tool runtime's methods, called in the web process and run by a worker: both ends of the queue.

A web process checks the arguments, as llama_stack's routes do, and hands them over as JSON, with the caller's name and
provider data; a worker calls the method of its own stack, as that caller. Tools need what workers have: their keys,
their way to the internet, their time.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any

import llama_stack.core.server.server as server
from llama_stack.core.request_headers import PROVIDER_DATA_VAR
from pydantic import BaseModel, create_model
from pydantic_core import to_json

from app.identity import LOCAL_PRINCIPAL
from app.identity.secrets import told_members
from app.stack.access import acting_principal

INVOKE = "invoke_tool"
INSERT = "rag_tool.insert"
METHODS = (INVOKE, INSERT, "rag_tool.query")

RunOnWorker = Callable[[str, bytes, str, dict[str, Any]], Awaitable[bytes]]
"""(method, arguments, principal, provider data) → what it gave; all but the principal as JSON. Raises NoAnswer."""


class NoAnswer(Exception):
    """The method failed, or no worker could run it. HTTP clients get `status_code`, `headers` and `detail`: a text, or
    what llama_stack makes of a ValidationError."""

    def __init__(self, detail: Any, status_code: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status_code = status_code
        self.headers = headers


def on_worker(implementation: Callable[..., Any], method: str, run: RunOnWorker) -> Callable[..., Awaitable[Any]]:
    """A method of the tool runtime that is run by a worker. Its answer is JSON."""
    arguments = _arguments(implementation)

    @functools.wraps(implementation)
    async def call(**given: Any) -> Any:
        content = arguments(**given).model_dump_json(by_alias=True).encode()
        members = told_members(PROVIDER_DATA_VAR.get() or {})
        return json.loads(await run(method, content, acting_principal() or LOCAL_PRINCIPAL, members))

    call.__signature__ = inspect.signature(implementation)  # type: ignore[attr-defined]
    return call


async def call(tool_runtime: Any, method: str, arguments: bytes) -> bytes:
    """What a method of the worker's own stack gives. Raises NoAnswer."""
    implementation = getattr(tool_runtime, method)
    try:
        given = _arguments(implementation).model_validate_json(arguments)
        return to_json(await implementation(**{name: getattr(given, name) for name in type(given).model_fields}))
    except Exception as error:
        translated = server.translate_exception(error)
        raise NoAnswer(translated.detail, translated.status_code) from error


@functools.cache
def _arguments(implementation: Callable[..., Any]) -> type[BaseModel]:
    parameters = inspect.signature(implementation, eval_str=True).parameters.values()
    fields: Any = {
        parameter.name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for parameter in parameters
    }
    return create_model("Arguments", **fields)
