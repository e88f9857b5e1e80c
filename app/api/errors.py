"""One status for each error; its body is in the shape that the route's clients read (`app.domain.error_bodies`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.domain.error_bodies import error_body, invalid_body
from app.domain.errors import (
    CaravanError,
    CompletionError,
    Conflict,
    InvalidRequest,
    KeyReused,
    NotFound,
    TooManyTurns,
    TurnFailure,
    Unavailable,
)
from app.domain.events import ascii_json

logger = logging.getLogger(__name__)

TOO_LARGE = 413

STATUSES: dict[type[CaravanError], int] = {
    InvalidRequest: 400,
    NotFound: 404,
    Conflict: 409,
    KeyReused: 422,
    TooManyTurns: 429,
    Unavailable: 503,
}


def answers(
    model: type[BaseModel],
    also: Mapping[int, str] = MappingProxyType({}),
    *,
    headers: Mapping[str, Any] | None = None,
    errors: Mapping[int | str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """A route's answer as documented. Routes give plain JSON values in that shape: what is stored is sent as it is.

    `also`: other statuses that come with the same model, and what they mean. `errors`: of its own, beside those that
    `app.api.documentation` adds.
    """
    documented = {status: {"model": model, "description": meaning} for status, meaning in also.items()}
    answer = {"model": model, **({"headers": headers} if headers else {})}
    return {"response_model": None, "responses": {200: answer, **documented, **errors}}


def failure_status(failure: TurnFailure) -> int:
    """The status of a turn that failed while its client waited without a stream: SDKs retry 5xx and 409, so neither
    is given where a retry would run the turn again for nothing."""
    if failure.code == "model_error" and failure.status is not None and 400 <= failure.status < 500:
        return failure.status if failure.status not in (408, 409, 429) else 424
    return 424


def install(app: FastAPI, request_max_bytes: int) -> None:
    app.add_middleware(NamedBodyLimit, request_max_bytes=request_max_bytes)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(CaravanError, _error)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)


class ErrorResponse(JSONResponse):
    """In ASCII: a message may quote what was sent, half of a surrogate pair too, which UTF-8 cannot say."""

    def render(self, content: Any) -> bytes:
        return ascii_json(content).encode()


class NamedBodyLimit:
    """Middleware: the 413 that FastAPI answers in plain text becomes one of ours, which names the setting."""

    def __init__(self, app: ASGIApp, request_max_bytes: int) -> None:
        self.app = app
        self.message = f"The body is over {request_max_bytes} bytes (REQUEST_MAX_BYTES)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def send_ours(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and _is_frameworks_own(message):
                replaced = True
                await JSONResponse(error_body(scope["path"], TOO_LARGE, self.message), TOO_LARGE)(scope, receive, send)
            elif not replaced:
                await send(message)

        await self.app(scope, receive, send_ours)


def _is_frameworks_own(message: Message) -> bool:
    """Whether it is FastAPI's 413: a model server's, which is passed on, is JSON."""
    kind = Headers(raw=message["headers"]).get("content-type", "")
    return message["status"] == TOO_LARGE and kind.startswith("text/plain")


def _status(error: Exception) -> int:
    if isinstance(error, CompletionError):
        return error.status
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)


async def _error(request: Request, error: Exception) -> JSONResponse:
    status = _status(error)
    headers = {}
    if isinstance(error, Unavailable | TooManyTurns):
        headers["Retry-After"] = "2"
    if isinstance(error, CompletionError) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Conflict):
        headers["x-should-retry"] = "false"
    if status >= 500:
        logger.error("%s %s: %s", request.method, request.url.path, error)
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return ErrorResponse(error_body(request.url.path, status, str(error), param=param, code=code), status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(each["loc"] == ("body",) for each in problems) and not _is_json(request.headers.get("content-type", "")):
        problems = [{"loc": ("header", "content-type"), "msg": "Must be application/json", "type": "content_type"}]
    return ErrorResponse(invalid_body(request.url.path, problems, error.body), 400)


def _is_json(content_type: str) -> bool:
    kind = content_type.split(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: a method that a route has not, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    body = error_body(request.url.path, error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """The framework raises the error again afterwards, and the server logs it."""
    return JSONResponse(error_body(request.url.path, 500, "Internal server error"), 500)
