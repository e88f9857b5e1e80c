"""Turns of a session: create, resume, cancel, read, follow."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from llama_stack.apis.agents import AgentStepResponse, AgentToolGroup, Document, Turn
from llama_stack.apis.inference import ToolConfig, ToolResponse, ToolResponseMessage, UserMessage
from pydantic import BaseModel, ConfigDict, Field

from app.api.compat import resume
from app.api.compat.dialect import CurrentDialect, Dialect
from app.api.documentation import LEG_HEADERS, TURN_HEADERS, event_stream, header_docs, refusals
from app.api.errors import answers, failure_status
from app.api.identifiers import AgentId, SessionId, StepId, TurnId
from app.api.service import JSON, CurrentService, Owner, Service
from app.api.sse import TurnStream
from app.api.validation import plain
from app.domain import shapes
from app.domain.errors import Conflict, InvalidRequest, NotFound, OutcomeUnknown, TurnFailure, Unavailable
from app.domain.events import START, Event, EventId
from app.domain.turns import ENDED, MultitaskStrategy, TurnStatus
from app.identity.secrets import Secrets, provider_data
from app.store import admission, agents, turns
from app.store.admission import Accepted, Resumption, Submission
from app.store.turns import TurnRow

router = APIRouter(tags=["Agents"])

CANCEL_WAIT_SECONDS = 3.0
RESOLVE_SECONDS = 30.0
"""How long a client waits to be told whether its turn was accepted, when Postgres goes away in the commit."""

RESOLVE_PAUSE_SECONDS = 0.5
NOT_STORED = {"stream", "multitask_strategy"}
TURN_PATH = "/agents/{agent_id}/session/{session_id}/turn"


class CreateTurn(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True},
                {
                    "messages": [{"role": "user", "content": "What does it say?"}],
                    "documents": [{"content": "It says hello.", "mime_type": "text/plain"}],
                    "stream": False,
                },
            ]
        }
    )

    messages: Annotated[list[UserMessage | ToolResponseMessage], Field(min_length=1)]
    stream: bool | None = False
    documents: list[Document] | None = None
    toolgroups: list[AgentToolGroup] | None = None
    tool_config: ToolConfig | None = None
    multitask_strategy: MultitaskStrategy | None = Field(
        default=None,
        description="If the session has a turn that is queued or running: `enqueue` (default) waits for it, `reject` "
        "answers 409, `interrupt` cancels it. `X-Multitask-Strategy` says the same.",
    )


class ResumeTurn(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "tool_responses": [{"call_id": "call_1", "tool_name": "temperature", "content": "31 °C"}],
                    "stream": True,
                }
            ]
        }
    )

    tool_responses: list[ToolResponse]
    stream: bool | None = False


_EVENTS = event_stream(
    "AgentTurnResponseStreamChunk",
    'id: 1-1\ndata: {"event":{"payload":{"event_type":"step_start","step_type":"inference","step_id":"…"}}}\n\n',
)
_LEG: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Turn,
        "description": "The turn, or with `stream: true` its events until this leg of it ends",
        "content": _EVENTS,
        "headers": header_docs(LEG_HEADERS | TURN_HEADERS),
    },
    **refusals(409, 422, 424, "4XX"),
}
_FOLLOWED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The turn's events",
        "content": _EVENTS,
        "headers": header_docs({"X-Turn-Id": LEG_HEADERS["X-Turn-Id"]}),
    }
}


IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="For 24 hours, the same key with the same request gives the same turn and its stream",
    ),
]

RetryCount = Annotated[int, Header(include_in_schema=False)]


async def _provider_data(
    x_llamastack_provider_data: Annotated[
        str | None,
        Header(
            description="A JSON object: keys for the turn's tools (`tavily_search_api_key`, …), and `mcp_headers` by "
            "the URL of their MCP server. Sealed until the turn ends.",
            examples=['{"tavily_search_api_key": "tvly-…"}'],
        ),
    ] = None,
) -> dict[str, Any]:
    return provider_data(x_llamastack_provider_data)


ProviderData = Annotated[dict[str, Any], Depends(_provider_data)]


@router.post(TURN_PATH, response_model=None, responses=_LEG | refusals(429))
async def create_turn(
    agent_id: AgentId,
    session_id: SessionId,
    body: CreateTurn,
    request: Request,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
    brought: ProviderData,
    idempotency_key: IdempotencyKey = None,
    x_multitask_strategy: Annotated[
        MultitaskStrategy | None, Header(description="As `multitask_strategy` of the body, which goes first")
    ] = None,
    x_stainless_retry_count: RetryCount = 0,
) -> Response:
    """Create a turn. It is stored before anything is answered, and runs whether the client stays or leaves."""
    stored, turn_id = plain(body, exclude=NOT_STORED), str(uuid.uuid4())
    asked = Submission(
        owner=owner,
        agent_id=agent_id,
        session_id=session_id,
        turn_id=turn_id,
        request=stored,
        request_hash=request_hash("turn", agent_id, session_id, stored),
        caps=service.caps,
        strategy=body.multitask_strategy or x_multitask_strategy or MultitaskStrategy.ENQUEUE,
        idempotency_key=idempotency_key,
        is_retry=x_stainless_retry_count > 0,
        sealed=service.sealed(Secrets(brought), turn_id),
    )
    return await _submit(service, asked, request, dialect, bool(body.stream))


async def _submit(service: Service, asked: Submission, request: Request, dialect: Dialect, stream: bool) -> Response:
    accepted = await _accept(service, asked)
    if accepted.is_new:
        await service.ring(accepted.turn_id, request.headers.get("traceparent"))
        await service.announce(accepted.ended, accepted.interrupted)
    return await _answer(service, dialect, asked.agent_id, asked.session_id, accepted, stream)


def request_hash(*what: Any) -> bytes:
    """Of all that makes a request the same one: not whether it streams, nor its strategy.

    Nor its secrets: a token may have been renewed between two tries, and could be guessed from a hash.
    """
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()


async def _accept(service: Service, asked: Submission) -> Accepted:
    raise_fence = service.endings.log.raise_fence
    try:
        return await service.store.run(admission.accept, asked, raise_fence)
    except OutcomeUnknown:
        return await resolved(lambda: service.store.run(admission.accept_again, asked, raise_fence))


async def resolved(again: Callable[[], Awaitable[Accepted]]) -> Accepted:
    """After a lost commit reply, asks until Postgres answers. Raises Unavailable: that takes too long."""
    deadline = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            return await again()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RESOLVE_PAUSE_SECONDS)


@router.post(TURN_PATH + "/{turn_id}/resume", response_model=None, responses=_LEG)
async def resume_turn(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    body: ResumeTurn,
    request: Request,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
    brought: ProviderData,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> Response:
    """Resume a turn that awaits input, with the responses of the client's tools.

    Provider data take the place of those that the turn has; without any, these hold on.
    """
    session = await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    responses = [plain(response) for response in body.tool_responses]
    digest = request_hash("resume", turn_id, responses)
    is_retry = x_stainless_retry_count > 0
    if resume.goes_on(session, turn, responses, repeated=is_retry or idempotency_key is not None):
        next_id = str(uuid.uuid4())
        asked = Submission(
            owner=owner,
            agent_id=agent_id,
            session_id=session_id,
            turn_id=next_id,
            request=plain(CreateTurn(messages=resume.as_messages(responses)), exclude=NOT_STORED),
            request_hash=digest,
            caps=service.caps,
            idempotency_key=idempotency_key,
            is_retry=is_retry,
            sealed=service.sealed(Secrets(brought), next_id),
        )
        return await _submit(service, asked, request, dialect, bool(body.stream))
    sealed = service.sealed(Secrets(brought), turn_id)
    resumption = Resumption(owner, session_id, turn_id, responses, digest, service.caps, idempotency_key, sealed)
    accepted = await _resume(service, turn, resumption)
    if accepted.is_new:
        await service.ring(turn_id, request.headers.get("traceparent"))
    return await _answer(service, dialect, agent_id, session_id, accepted, bool(body.stream))


async def _resume(service: Service, turn: TurnRow, asked: Resumption) -> Accepted:
    async def again() -> Accepted:
        try:
            return await service.store.run(admission.resume, asked)
        except Conflict:
            return Accepted(asked.turn_id, turn.last)  # it went through the first time

    try:
        return await service.store.run(admission.resume, asked)
    except OutcomeUnknown:
        return await resolved(again)


class CancelledTurn(BaseModel):
    """How a turn stands after it was asked to end: it may have finished before."""

    turn_id: str
    session_id: str
    status: TurnStatus


@router.post(
    TURN_PATH + "/{turn_id}/cancel",
    **answers(CancelledTurn, {202: "It was asked to end, and its worker has not answered yet"}),
)
async def cancel_turn(
    agent_id: AgentId, session_id: SessionId, turn_id: TurnId, response: Response, service: CurrentService, owner: Owner
) -> JSON:
    """Cancel a turn that is queued, running or awaiting input; its recorded steps are kept, its session goes on.

    Asking again does no harm. `status` tells how the turn ended: it may have finished before it could be cancelled. It
    is `running`, with 202, if its worker cannot be reached at this moment.
    """
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    status = await cancelled(service, turn)
    response.status_code = 200 if status in ENDED else 202
    return {"turn_id": turn_id, "session_id": session_id, "status": status}


class Cancellable(Protocol):
    """What of a turn is needed to cancel it."""

    @property
    def turn_id(self) -> str: ...

    @property
    def status(self) -> TurnStatus: ...

    @property
    def last(self) -> EventId: ...


async def cancelled(service: Service, turn: Cancellable) -> TurnStatus:
    """Asks until the turn has ended: a running one may come to await input, or be handed over, in between.

    Gives `running` if it was asked to end and has not after `CANCEL_WAIT_SECONDS`. Raises Unavailable: it may not have
    been asked.
    """
    deadline = asyncio.get_running_loop().time() + CANCEL_WAIT_SECONDS
    status = turn.status
    while status not in ENDED:
        found = await service.cancel(turn.turn_id)
        if found is None:
            raise NotFound("Turn", turn.turn_id)
        status = found
        if status == TurnStatus.RUNNING:
            try:
                async with asyncio.timeout_at(deadline):
                    async for _ in service.relay.follow(turn.turn_id, turn.last, through_legs=False):
                        pass
            except TimeoutError:
                break
    return status


async def _answer(
    service: Service, dialect: Dialect, agent_id: str, session_id: str, accepted: Accepted, stream: bool
) -> Response:
    """One leg, as a stream or as the turn that it leads to."""
    turn_id = accepted.turn_id
    headers = {"Location": shapes.turn_path(agent_id, session_id, turn_id), "X-Turn-Id": turn_id}
    just_accepted = accepted.is_new and accepted.after == START
    batches = service.relay.follow(turn_id, accepted.after, through_legs=False, just_accepted=just_accepted)
    if stream:
        return _stream(service, dialect.events(batches), headers)
    async for _ in batches:
        pass
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    if turn.error is not None:
        failure = TurnFailure(**turn.error)
        return JSONResponse({"error": failure.as_dict()}, failure_status(failure), headers)
    return JSONResponse(dialect.turn(turn_shape(turn)), headers=headers | _headers(turn))


def _stream(service: Service, batches: AsyncIterator[list[Event]], headers: dict[str, str]) -> TurnStream:
    return TurnStream(
        batches,
        ping_seconds=service.settings.ping_seconds,
        send_timeout_seconds=service.settings.stream_send_timeout_seconds,
        headers=headers,
    )


@router.get(TURN_PATH + "/{turn_id}", **answers(Turn, headers=header_docs(TURN_HEADERS)))
async def get_turn(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    response: Response,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
) -> JSON:
    """A turn with the steps it has so far. Headers tell its status and the worker process that ran it last."""
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    response.headers.update(_headers(turn))
    return dialect.turn(turn_shape(turn))


@router.get(TURN_PATH + "/{turn_id}/step/{step_id}", **answers(AgentStepResponse))
async def get_step(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    step_id: StepId,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
) -> JSON:
    """One step of a turn."""
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    for step in turn.steps:
        if step["step_id"] == step_id:
            return {"step": dialect.step(step)}
    raise NotFound("Step", step_id)


@router.get(TURN_PATH + "/{turn_id}/events", responses=_FOLLOWED, response_class=Response)
async def follow_turn(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
    last_event_id: Annotated[str | None, Header(description="The id of the last event that the client has")] = None,
    after: Annotated[str | None, Query(description="The same, for clients that cannot set headers")] = None,
) -> Response:
    """A turn's events from the start, or from behind a given one: replayed, then live, through all its legs.

    Ends with the turn, or when it awaits input.
    """
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    cursor = _cursor(after or last_event_id, turn)
    batches = service.relay.follow(turn_id, cursor, through_legs=True)
    return _stream(service, dialect.events(batches), {"X-Turn-Id": turn_id})


def _cursor(identifier: str | None, turn: TurnRow) -> EventId:
    """Raises InvalidRequest: it is no event of this turn, which would be waited for in vain."""
    if not identifier:
        return START
    try:
        cursor = EventId.parse(identifier)
    except ValueError as error:
        raise InvalidRequest(f"Last-Event-ID or after: {error}") from None
    if cursor.fence > turn.fence or (turn.status in ENDED and cursor > turn.last):
        raise InvalidRequest(f"Last-Event-ID or after: {identifier} is no event of this turn; its last is {turn.last}")
    return cursor


def turn_shape(row: TurnRow) -> JSON:
    """`Turn`; one that failed or was cancelled has `error` beside it."""
    shape = shapes.turn(
        turn_id=row.turn_id,
        session_id=row.session_id,
        input_messages=row.request["messages"],
        steps=row.steps,
        output_message=row.output_message or _last_message(row),
        started_at=row.started_at or row.created_at,
        completed_at=row.completed_at,
    )
    return {**shape, "error": row.error} if row.error else shape


def _last_message(row: TurnRow) -> JSON:
    """So far, of a turn without an end, or without a message at its end.

    A message that ends a turn is recorded with that end, unless output shields are still to judge it: it is not shown.
    """
    messages = [step["model_response"] for step in row.steps if step["step_type"] == "inference"]
    if not messages or messages[-1]["stop_reason"] != "end_of_message":
        return shapes.NO_MESSAGE
    return {**messages[-1], "tool_calls": []}


def _headers(row: TurnRow) -> dict[str, str]:
    return {"X-Turn-Status": row.status.value, **({"X-Caravan-Worker": row.worker} if row.worker else {})}
