"""OpenAI's Responses: each is a turn of the same engine as an agent's, stored, queued, and run by a worker."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from llama_stack.apis.agents.openai_responses import (
    OpenAIDeleteResponseObject,
    OpenAIResponseObject,
    OpenAIResponseObjectWithInput,
)
from pydantic import BaseModel

from app.api.agents import end_all
from app.api.compat.response_events import CurrentResponseDialect, ResponseDialect
from app.api.conversations import ItemList
from app.api.documentation import event_stream, header_docs, refusals
from app.api.errors import answers, failure_status
from app.api.response_requests import SECRETS_OF_TOOLS, CreateResponse, check_includes, stored_request
from app.api.service import JSON, CurrentService, Owner, Service
from app.api.sse import TurnStream
from app.api.turns import IdempotencyKey, ProviderData, cancelled, request_hash, resolved
from app.api.validation import includes
from app.domain import events
from app.domain.error_bodies import openai_error
from app.domain.errors import InvalidRequest, NotFound, OutcomeUnknown, TurnFailure
from app.domain.events import START, Event, EventKind
from app.domain.items import session_of_conversation
from app.domain.responses import shape
from app.domain.responses.events import ResponseEvent, event
from app.domain.turns import ENDED, TurnStatus
from app.identity.secrets import Secrets
from app.store import admission, responses
from app.store.admission import Accepted, ResponseSubmission
from app.store.responses import ResponseRow

router = APIRouter(tags=["Responses"])

PageSize = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query()]
Includes = Annotated[Sequence[str], Depends(includes)]
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "model": OpenAIResponseObject,
        "description": "The response, or with `stream: true` its events: OpenAI's streaming events of Responses",
        "content": event_stream(
            "OpenAIResponseObjectStream",
            'data: {"type":"response.output_text.delta","sequence_number":4,"delta":"Hello",…}\n\n',
        ),
        "headers": header_docs({"X-Turn-Id": "The turn that the response is"}),
    }
}


class ResponseList(BaseModel):
    """One page of responses."""

    object: Literal["list"]
    data: list[OpenAIResponseObjectWithInput]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("/responses", response_model=None, responses=_STREAM | refusals(422, 424, 429, "4XX"))
async def create_response(
    body: CreateResponse,
    request: Request,
    service: CurrentService,
    owner: Owner,
    brought: ProviderData,
    dialect: CurrentResponseDialect,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: Annotated[int, Header(include_in_schema=False)] = 0,
) -> Response:
    """Create a response. It is stored before anything is answered, and runs whether the client stays or leaves.

    With `background` it is answered at once, as `queued`. Any stream can be resumed by
    `GET /responses/{response_id}?stream=true&starting_after=N`.
    """
    asked = _submission(service, owner, body, brought, idempotency_key, x_stainless_retry_count > 0)
    accepted = await _accept(service, asked)
    read = partial(service.store.run, responses.read_response, owner, accepted.turn_id)
    # Queued, as it was accepted: a worker that has heard of it may be quicker than the answer.
    row = await read() if body.background and not body.stream else None
    if accepted.is_new:
        await service.ring(accepted.turn_id, request.headers.get("traceparent"))
    headers = {"Location": f"/v1/responses/{shape.response_id(accepted.turn_id)}", "X-Turn-Id": accepted.turn_id}
    if body.stream:
        return _stream(service, owner, accepted.turn_id, headers, dialect)
    if not body.background:
        async for _ in service.relay.follow(accepted.turn_id, START, through_legs=True):
            pass
    row = row or await read()
    if row.status == TurnStatus.FAILED and not body.background:
        return _failure(row, headers)
    return JSONResponse(dialect.told(response_shape(row)), headers=headers)


def _submission(
    service: Service,
    owner: str,
    body: CreateResponse,
    brought: dict[str, Any],
    idempotency_key: str | None,
    is_retry: bool,
) -> ResponseSubmission:
    """Raises InvalidRequest, NotFound."""
    turn_id = str(uuid.uuid4())
    request, mcp_headers = stored_request(body)
    conversation = request["conversation"]
    return ResponseSubmission(
        owner=owner,
        turn_id=turn_id,
        session_id=session_of_conversation(conversation) if conversation is not None else str(uuid.uuid4()),
        in_conversation=conversation is not None,
        request=request,
        request_hash=request_hash("response", owner, _asked_for(body)),
        caps=service.caps,
        opening=_opening(turn_id, request),
        previous_turn_id=_previous(body.previous_response_id),
        stored=body.store is not False,
        sealed=service.sealed(Secrets(brought, mcp_headers), turn_id),
        idempotency_key=idempotency_key,
        is_retry=is_retry,
    )


def _asked_for(body: CreateResponse) -> JSON:
    """What makes a request the same one when it is sent again."""
    asked = body.model_dump(mode="json", exclude={"stream", "stream_options"})
    for tool in asked["tools"] or ():
        for name in SECRETS_OF_TOOLS:
            tool.pop(name, None)
    return asked


def _previous(response_id: str | None) -> str | None:
    try:
        return None if response_id is None else turn_of(response_id)
    except NotFound as error:
        message = f"Previous response with id {response_id!r} not found."
        raise InvalidRequest(message, "previous_response_id") from error


def _opening(turn_id: str, request: JSON) -> list[Event]:
    """The events that are there before a worker takes the response: a client learns its id at once."""
    status = "queued" if request.get("background") else "in_progress"
    snapshot = shape.response(turn_id=turn_id, request=request, status=status, created_at=datetime.now(UTC))
    said = ["created", "queued"] if request.get("background") else ["created"]
    contents = [(EventKind.RESPONSE, event(type_, response=snapshot)) for type_ in said]
    return events.number(START, 0, contents, 1)


async def _accept(service: Service, asked: ResponseSubmission) -> Accepted:
    async def once() -> Accepted:
        return await service.store.run(admission.accept_response, asked)

    try:
        return await once()
    except OutcomeUnknown:
        return await resolved(once)


@router.get("/responses", **answers(ResponseList, errors=refusals(404)))
async def list_responses(
    service: CurrentService,
    owner: Owner,
    dialect: CurrentResponseDialect,
    after: str | None = None,
    limit: PageSize = 50,
    model: str | None = None,
    order: Order = "desc",
) -> JSON:
    """List responses with their input, newest first."""
    behind = turn_of(after) if after is not None else None
    rows, has_more = await service.store.run(
        lambda connection: responses.list_responses(
            connection, owner, behind, limit, model=model, descending=order == "desc"
        )
    )
    listed = [{**response_shape(row), "input": row.request["input"]} for row in rows]
    return _page(dialect.told(listed), has_more)


@router.get("/responses/{response_id}", response_model=None, responses=_STREAM)
async def get_response(
    response_id: str,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentResponseDialect,
    stream: Annotated[bool, Query(description="Its events, replayed and then live")] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, le=10**15, description="The sequence_number of the last event that the client has")
    ] = None,
    include_obfuscation: bool = False,
    include: Includes = (),
) -> Response:
    """A response as it stands, or its events from the start or from behind a given one."""
    check_includes(include)
    if starting_after is not None and not stream:
        raise InvalidRequest("starting_after: needs stream=true", "starting_after")
    if include_obfuscation:
        raise InvalidRequest("include_obfuscation: true is not supported", "include_obfuscation")
    row = await service.store.run(responses.get_response, owner, turn_of(response_id))
    if not stream:
        return JSONResponse(dialect.told(response_shape(row)))
    if starting_after is not None and row.status in ENDED and starting_after >= row.last.n:
        raise InvalidRequest(f"starting_after: the last event has the number {row.last.n - 1}", "starting_after")
    return _stream(service, owner, row.turn_id, {"X-Turn-Id": row.turn_id}, dialect, starting_after)


@router.get("/responses/{response_id}/input_items", **answers(ItemList))
async def list_input_items(
    response_id: str,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentResponseDialect,
    after: str | None = None,
    before: str | None = None,
    limit: PageSize = 20,
    order: Order = "desc",
    include: Includes = (),
) -> JSON:
    """The items that a response was made from: what its predecessors were given and said, then its own input."""
    check_includes(include)
    found = await service.store.run(responses.input_items, owner, turn_of(response_id))
    listed = found if order == "asc" else found[::-1]
    ids = [item["id"] for item in listed]
    for name, given in (("after", after), ("before", before)):
        if given is not None and given not in ids:
            raise InvalidRequest(f"{name}: there is no such item", name)
    first = ids.index(after) + 1 if after is not None else 0
    last = ids.index(before) if before is not None else len(ids)
    return _page(dialect.told(listed[first:last][:limit]), last - first > limit)


@router.post("/responses/{response_id}/cancel", **answers(OpenAIResponseObject))
async def cancel_response(
    response_id: str, service: CurrentService, owner: Owner, dialect: CurrentResponseDialect
) -> Any:
    """Cancel a response that is queued or running. Asking again does no harm; it may have ended before."""
    row = await service.store.run(responses.get_response, owner, turn_of(response_id))
    await cancelled(service, row)
    return dialect.told(response_shape(await service.store.run(responses.get_response, owner, row.turn_id)))


@router.delete("/responses/{response_id}", **answers(OpenAIDeleteResponseObject))
async def delete_response(response_id: str, service: CurrentService, owner: Owner) -> JSON:
    """Delete a response. If it still runs, it is cancelled and its streams end first."""
    turn_id = turn_of(response_id)
    await end_all(service, await service.store.run(responses.mark_response_deleted, owner, turn_id))
    return {"id": shape.response_id(turn_id), "object": "response", "deleted": True}


def turn_of(response_id: str) -> str:
    """The turn that a response is. Raises NotFound: this is no id of one."""
    try:
        if not response_id.startswith(shape.PREFIX):
            raise ValueError
        return str(uuid.UUID(response_id.removeprefix(shape.PREFIX)))
    except ValueError:
        raise NotFound("Response", response_id) from None


def response_shape(row: ResponseRow) -> JSON:
    return shape.response(
        turn_id=row.turn_id,
        request=row.request,
        status=shape.status_of(row.status, row.request, row.started_at is not None, row.output),
        created_at=row.created_at,
        completed_at=row.completed_at,
        journal=row.steps,
        error=row.error if row.status == TurnStatus.FAILED else None,
        reason=(row.output or {}).get("reason"),
    )


def _page(data: list[JSON], has_more: bool) -> JSON:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


def _failure(row: ResponseRow, headers: dict[str, str]) -> Response:
    """A response that failed while its client waited for it."""
    assert row.error is not None
    failure = TurnFailure(**row.error)
    status = 400 if failure.code == "invalid_request" else failure_status(failure)
    body = {**openai_error(status, failure.message, code=failure.code), "detail": failure.message}
    return JSONResponse(body, status, headers)


def _stream(
    service: Service,
    owner: str,
    turn_id: str,
    headers: dict[str, str],
    dialect: ResponseDialect,
    starting_after: int | None = None,
) -> TurnStream:
    return TurnStream(
        _events(service, owner, turn_id, 0 if starting_after is None else starting_after + 1, dialect),
        ping_seconds=service.settings.ping_seconds,
        send_timeout_seconds=service.settings.stream_send_timeout_seconds,
        headers=headers,
    )


async def _events(
    service: Service, owner: str, turn_id: str, after: int, dialect: ResponseDialect
) -> AsyncIterator[list[ResponseEvent]]:
    """The events with numbers over `after`."""
    cursor = await service.store.run(responses.segment_end_before, turn_id, after) if after else START
    async for batch in service.relay.follow(turn_id, cursor, through_legs=True):
        wanted = [each for each in batch if each.id.n > after]
        if wanted:
            yield [ResponseEvent(dialect.event(await _told(service, owner, turn_id, each))) for each in wanted]


async def _told(service: Service, owner: str, turn_id: str, logged: Event) -> Event:
    """The end of a turn that failed is the same for all turns in the log. OpenAI's is told with the whole response."""
    if logged.kind != EventKind.ERROR:
        return logged
    row = await service.store.run(responses.read_response, owner, turn_id)
    return replace(logged, data=event("failed", response=response_shape(row)))
