"""Bodies of errors: OpenAI's shape on OpenAI's routes, 0.3.5's on all others."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from app.domain.error_bodies import error_body, invalid_body, is_openai


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses",
        "/v1/responses/resp_1/cancel",
        "/v1/conversations/conv_1/items",
        "/v1/chat/completions",
        "/v1/vector_stores/vs_1/files",
        "/v1/models/meta/llama",
        "/v1/openai/v1/anything",
        "/prefix/v1/embeddings",
    ],
)
def test_openai_routes(path: str) -> None:
    assert is_openai(path)


@pytest.mark.parametrize(
    "path",
    ["/v1/agents", "/v1alpha/agents/a/session/s/turn", "/v1/vector-dbs", "/v1/modelsx", "/v1/toolgroups", "/docs"],
)
def test_other_routes(path: str) -> None:
    assert not is_openai(path)
    assert error_body(path, 404, "gone", param="x") == {"detail": "gone"}


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (401, "invalid_request_error", "invalid_api_key"),
        (404, "invalid_request_error", "not_found"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (500, "server_error", None),
        (503, "service_unavailable_error", None),
    ],
)
def test_types_and_codes_are_openais(status: int, kind: str, code: str | None) -> None:
    told = {"message": "no", "type": kind, "param": "model", "code": code}
    assert error_body("/v1/responses", status, "no", param="model") == {"error": told, "detail": "no"}


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    content: str | list[Part]


class Asked(BaseModel):
    model: str
    messages: list[Message] = Field(min_length=1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"content": "hi"}]}, "model"),
        ({"model": 1, "messages": [{"content": "hi"}]}, "model"),
        ({"model": "m", "messages": [{"content": "hi"}, {}]}, "messages[1].content"),
        # Which branch of the union was tried is no field of the request.
        ({"model": "m", "messages": [{"content": 7}]}, "messages[0].content"),
        ({"model": "m", "messages": []}, "messages"),
        ([], None),
    ],
)
def test_param_is_the_path_of_the_first_wrong_field(body: Any, param: str | None) -> None:
    with pytest.raises(ValidationError) as raised:
        Asked.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]
    told = invalid_body("/v1/chat/completions", errors, body)
    assert told["error"]["param"] == param
    assert told["error"]["message"].startswith(f"{param}: " if param else "Input should be")
    assert told["error"]["type"] == "invalid_request_error"
    assert [error["loc"][0] for error in invalid_body("/v1/agents", errors, body)["error"]["detail"]["errors"]]
