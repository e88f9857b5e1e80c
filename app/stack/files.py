"""A file as every client reads it: llama_stack's has no `status`, which OpenAI's has, and ogx-client demands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from llama_stack.apis.files import ListOpenAIFileResponse, OpenAIFileObject


def with_status(implementation: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A method of the files API whose files have `status`: they are whole, and to be used, once they are there."""

    @functools.wraps(implementation)
    async def call(*given: Any, **named: Any) -> Any:
        return _told(await implementation(*given, **named))

    call.__signature__ = inspect.signature(implementation)  # type: ignore[attr-defined]
    return call


def _told(answer: Any) -> Any:
    if isinstance(answer, OpenAIFileObject):
        return {**answer.model_dump(mode="json"), "status": "processed"}
    if isinstance(answer, ListOpenAIFileResponse):
        return {**answer.model_dump(mode="json"), "data": [_told(file) for file in answer.data]}
    return answer
