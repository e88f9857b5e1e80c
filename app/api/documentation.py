"""`/openapi.json` and `/docs`. Routes say what is theirs; what holds for all of a kind is added here.

How a route documents itself:

- its request's model has at least one example (`model_config = ConfigDict(json_schema_extra={"examples": [...]})`);
- `**answers(Model)` (`app.api.errors`) names the model of its answer, `event_stream` what the events of a stream are,
  which must be one of `EVENTS`;
- `refusals(409, 429)` names the statuses of its own. 400, 401, 404, 413 and 503, and the bodies of all errors, are
  added by `_complete`, by what the route takes and whose shape its clients read;
- the first line of its docstring is the summary's explanation, in the imperative.

tests/acceptance/test_openapi.py asks every route for what is documented, and fails for what is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from llama_stack.apis.agents import AgentTurnResponseStreamChunk
from llama_stack.apis.agents.openai_responses import OpenAIResponseObjectStream
from pydantic import BaseModel, TypeAdapter

from app.domain.error_bodies import is_openai
from app.stack.chunks import Chunk, TextCompletion

JSON = dict[str, Any]
REF = "#/components/schemas/"
EVENTS: dict[str, Any] = {
    "AgentTurnResponseStreamChunk": AgentTurnResponseStreamChunk,
    "ChatCompletionChunk": Chunk,
    "TextCompletion": TextCompletion,
    "OpenAIResponseObjectStream": OpenAIResponseObjectStream,
}

DESCRIPTION = """
Llama Stack's agents, and OpenAI's Responses and Conversations, on a Web-Queue-Worker pattern: whatever is asked is
stored, queued and run by a worker, and its stream can be left and joined again. Any Llama Stack SDK (0.1 and later)
and OpenAI's SDKs work unmodified. The agents routes are served under `/v1` too. The Llama Stack's other routes
(models, toolgroups, vector stores, files, …) are served beside these.

## Streaming

With `stream: true` an answer is a stream of Server-Sent Events: each `data:` is one JSON object, in ASCII. Lines end
with LF; comments (`: ping`) keep the connection alive. What is wrong with a request is told by a status before the
stream begins. A stream of a turn ends with `turn_complete`, `turn_awaiting_input` or `{"error": {"code",
"message"}}`; one that ends without any of these was cut: join it again.

## Resuming

Leaving a stream changes nothing: the turn goes on. Every event of a turn has an `id`. `GET …/turn/{turn_id}/events`
with the header `Last-Event-ID` (or `?after=`) replays what came after it and goes on live, on any web process. A turn
that awaits input goes on with `POST …/turn/{turn_id}/resume`, which brings the responses of the client's tools. A
response's stream is joined by `GET /v1/responses/{response_id}?stream=true&starting_after=N`, N being a
`sequence_number`.

## Cancelling

`POST …/turn/{turn_id}/cancel` and `POST /v1/responses/{response_id}/cancel` end what is queued, running or awaiting
input, any number of times, and answer with the status that it ended with. Finished steps are kept.

## Sending twice

A POST with an `Idempotency-Key`, sent again within 24 hours with the same body, gives the same turn and its stream
from the start; with another body it is 422. An SDK that repeats a POST by itself finds the turn that its first try
made.

## Errors

The agents routes answer `{"detail"}`, and for wrong fields `{"error": {"detail": {"errors": [{loc, msg, type}]}}}`;
OpenAI's routes answer `{"error": {message, type, param, code}}` with `detail` beside it. Ids of others are 404, as if
they had never been given.
"""

TAGS = [
    {"name": "Agents", "description": "Agents, their sessions, and the turns of a session, which run in order."},
    {"name": "Responses", "description": "OpenAI's Responses, run by workers."},
    {"name": "Conversations", "description": "OpenAI's Conversations: items that responses go on from."},
    {"name": "Inference", "description": "Passed to the model in the web process; nothing is stored."},
]


class Detail(BaseModel):
    """What every error of the agents routes says."""

    detail: str


class FieldError(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class FieldErrors(BaseModel):
    errors: list[FieldError]


class FieldErrorsDetail(BaseModel):
    detail: FieldErrors


class WrongFields(BaseModel):
    """What is wrong with each field of a request to an agents route."""

    error: FieldErrorsDetail


class FailedTurnError(BaseModel):
    code: str
    message: str
    status: int | None = None


class FailedTurn(BaseModel):
    """Why a turn that was waited for without a stream failed, or that it was cancelled."""

    error: FailedTurnError


class OpenAIErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """OpenAI's error; `detail` is the message again, for older Llama Stack clients."""

    error: OpenAIErrorObject
    detail: str | None = None


ERRORS: tuple[type[BaseModel], ...] = (Detail, WrongFields, FailedTurn, OpenAIError)

MEANINGS: dict[int | str, str] = {
    400: "The body or a parameter is wrong",
    401: "No key, or a wrong one; on a server without keys: the request comes from beyond its machine",
    404: "There is no such thing of yours",
    409: "Not now: another one got there first. SDKs do not try it again",
    413: "The body is over `REQUEST_MAX_BYTES`",
    422: "The `Idempotency-Key` was given before, with another request",
    424: "Without a stream: it failed, or was cancelled",
    429: "Too many turns are queued or running; nothing was stored",
    502: "The model server cannot be reached, or broke off",
    503: "Postgres cannot be reached, or this web process is stopping",
    504: "The model server was silent for too long",
    "4XX": "Without a stream: what the model server refused",
    "default": "What the model server answered",
}
_HEADERS: dict[str, dict[str, str]] = {
    "401": {"WWW-Authenticate": "`Bearer`"},
    "409": {"x-should-retry": "`false`"},
    "429": {"Retry-After": "Seconds"},
    "503": {"Retry-After": "Seconds"},
}
TURN_HEADERS = {
    "X-Turn-Status": "`queued`, `running`, `awaiting_input`, `completed`, `failed` or `cancelled`",
    "X-Caravan-Worker": "`host:pid` of the worker that ran it last",
}
LEG_HEADERS = {"X-Turn-Id": "The turn's id, before its first event", "Location": "The path of the turn"}


def refusals(*statuses: int | str) -> dict[int | str, JSON]:
    """Statuses of a route's own, for its `responses`."""
    return {status: {"description": MEANINGS[status]} for status in statuses}


def header_docs(meanings: dict[str, str]) -> JSON:
    return {name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in meanings.items()}


def event_stream(event: str, example: str, *, error: str = "FailedTurn", end: str | None = None) -> JSON:
    """The content of an answer that is a stream: each event's data are an `event`, of `EVENTS`; the last one's may be
    an `error`, or the text `end`.

    The schema is of one event, as OpenAPI 3.2's `itemSchema`, which 3.1 has not.
    """
    content = {"anyOf": [{"$ref": REF + event}, {"$ref": REF + error}]}
    data: JSON = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    if end:
        data = {"anyOf": [{"const": end}, data]}
    schema = {
        "type": "object",
        "description": "One event",
        "properties": {"id": {"type": "string"}, "data": data},
        "required": ["data"],
    }
    return {"text/event-stream": {"schema": schema, "example": example}}


def install(app: FastAPI) -> None:
    """The application's own description, made once."""

    def openapi() -> JSON:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=TAGS
            )
            app.openapi_schema = _complete(made)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _complete(schema: JSON) -> JSON:
    components = schema["components"]
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "A key names the principal, whose things are its own",
        }
    }
    schema["security"] = [{"key": []}]
    for model in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(model, None)
    components["schemas"] = {**_models(), **components["schemas"]}
    for path, operation in _operations(schema):
        _complete_operation(path, operation)
    return schema


def _models() -> JSON:
    """The schemas of what no route answers with as a whole, and of what they consist of."""
    kinds = EVENTS | {kind.__name__: kind for kind in ERRORS}
    written: Literal["serialization"] = "serialization"
    adapters = [(name, written, TypeAdapter(kind)) for name, kind in kinds.items()]
    schemas, shared = TypeAdapter.json_schemas(adapters, ref_template=REF + "{model}")
    named = {name: schemas[name, written] for name, _, _ in adapters}
    return {**named, **shared["$defs"]}


def _operations(schema: JSON) -> Iterator[tuple[str, JSON]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation


def _complete_operation(path: str, operation: JSON) -> None:
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422")):
        del answers["422"]  # FastAPI's own, which is 400 here
    places = {parameter["in"] for parameter in operation.get("parameters", [])}
    has_body = "requestBody" in operation
    common = [401, 503]
    common += [400] if has_body or places - {"path"} else []
    common += [404] if "path" in places else []
    common += [413] if has_body else []
    for status in common:
        answers.setdefault(str(status), {"description": MEANINGS[status]})
    for status, answer in answers.items():
        if status[0] in "45d":
            answer["content"] = {"application/json": {"schema": _error_schema(path, status)}}
            answer["headers"] = header_docs(_HEADERS.get(status, {}))
    operation["responses"] = dict(sorted(answers.items()))


def _error_schema(path: str, status: str) -> JSON:
    if is_openai(path):
        return {"$ref": REF + OpenAIError.__name__}
    kinds = {"400": (WrongFields, Detail), "424": (FailedTurn,), "4XX": (FailedTurn,)}.get(status, (Detail,))
    refs = [{"$ref": REF + kind.__name__} for kind in kinds]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}
