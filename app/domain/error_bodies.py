"""What the body of an error says, in the shape that the clients of its route read.

Routes of OpenAI's API have OpenAI's, `{"error": {"message", "type", "param", "code"}}`, with `detail` beside it for
older Llama Stack clients. All others have 0.3.5's: `{"detail"}`, and for a wrong field
`{"error": {"detail": {"errors": [{"loc", "msg", "type"}]}}}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPENAI = re.compile(
    r"/v1/(openai/v1/|(responses|conversations|chat/completions|completions|embeddings|models|files|vector_stores"
    r"|moderations)(/|$))"
)
_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


def is_openai(path: str) -> bool:
    """Whether a path is one of OpenAI's API; behind a prefix of a proxy too."""
    return _OPENAI.search(path) is not None


def error_body(
    path: str, status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error answer. `param`: the field that is wrong; `code`: by default the status's own."""
    if not is_openai(path):
        return {"detail": message}
    return {**openai_error(status, message, param=param, code=code), "detail": message}


def openai_error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, as it is in a body and amid a stream. Its types and codes go by the HTTP status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def invalid_body(path: str, errors: Sequence[Mapping[str, Any]], body: object) -> dict[str, Any]:
    """The body of a 400 for pydantic's errors of a request with this (parsed) body."""
    if is_openai(path):
        message, param = first_problem(errors, body)
        return error_body(path, 400, message, param=param)
    told = [{"loc": list(each["loc"]), "msg": each["msg"], "type": each["type"]} for each in errors]
    return {"error": {"detail": {"errors": told}}}


def first_problem(errors: Sequence[Mapping[str, Any]], body: object) -> tuple[str, str | None]:
    """(message, param) of the first of pydantic's errors of a request with this body."""
    param = _param(errors[0], body)
    return (f"{param}: {errors[0]['msg']}" if param else str(errors[0]["msg"])), param


def _param(error: Mapping[str, Any], body: object) -> str | None:
    """The field's path, as `messages[0].content`: pydantic's `loc` without what only names the branches of a union."""
    parts = list(error["loc"])
    if parts[:1] != ["body"]:
        return str(parts[-1]) if parts else None
    path, value = "", body
    for part in parts[1:]:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{part}", value[part]
    missing = f".{parts[-1]}" if error["type"] == "missing" and len(parts) > 1 else ""
    return (path + missing).removeprefix(".") or None
