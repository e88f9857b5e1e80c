"""Turns of a session: create, resume, read, follow."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from llama_stack.apis.agents import AgentStepResponse, AgentToolGroup, Document, Turn
from llama_stack.apis.inference import ToolConfig, ToolResponse, ToolResponseMessage, UserMessage
from pydantic import BaseModel, Field

from app.api.errors import answers, failure_status
from app.api.identifiers import AgentId, SessionId, StepId, TurnId
from app.api.service import JSON, CurrentService, Owner, Service
from app.api.sse import TurnStream
from app.domain import shapes
from app.domain.errors import Conflict, InvalidRequest, NotFound, TurnFailure, Unavailable
from app.domain.events import START, Event, EventId
from app.domain.turns import TurnStatus
from app.store import agents, turns
from app.store.turns import TurnRow

router = APIRouter(tags=["Agents"])

TURN_PATH = "/agents/{agent_id}/session/{session_id}/turn"


class CreateTurn(BaseModel):
    messages: Annotated[list[UserMessage | ToolResponseMessage], Field(min_length=1)]
    stream: bool | None = False
    documents: list[Document] | None = None
    toolgroups: list[AgentToolGroup] | None = None
    tool_config: ToolConfig | None = None


class ResumeTurn(BaseModel):
    tool_responses: list[ToolResponse]
    stream: bool | None = False


_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The turn, or with `stream: true` its events: `AgentTurnResponseStreamChunk`s",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(TURN_PATH, response_model=None, responses=_STREAM)
async def create_turn(
    agent_id: AgentId, session_id: SessionId, body: CreateTurn, request: Request, service: CurrentService, owner: Owner
) -> Response:
    """Create a turn. It is stored before anything is answered, and runs whether the client stays or leaves."""
    turn_id = str(uuid.uuid4())
    stored = body.model_dump(mode="json", exclude={"stream"})
    superseded = await _accept(service, owner, agent_id, session_id, turn_id, stored)
    await service.ring(turn_id, request.headers.get("traceparent"))
    await service.announce(superseded)
    return await _answer(service, agent_id, session_id, turn_id, START, bool(body.stream))


async def _accept(
    service: Service, owner: str, agent_id: str, session_id: str, turn_id: str, stored: JSON
) -> list[turns.Ended]:
    """A lost commit reply is resolved by reading the turn's id again."""
    try:
        return await service.store.run(turns.accept, owner, agent_id, session_id, turn_id, stored)
    except Unavailable:
        if not await service.store.run(turns.standings, [turn_id]):
            raise
        return []


@router.post(TURN_PATH + "/{turn_id}/resume", response_model=None, responses=_STREAM)
async def resume_turn(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    body: ResumeTurn,
    request: Request,
    service: CurrentService,
    owner: Owner,
) -> Response:
    """Resume a turn that awaits input, with the responses of the client's tools."""
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    responses = _matched(turn, body.tool_responses)
    leg_before = await _resume(service, turn, responses)
    await service.ring(turn_id, request.headers.get("traceparent"))
    return await _answer(service, agent_id, session_id, turn_id, leg_before, bool(body.stream))


async def _resume(service: Service, turn: TurnRow, responses: list[JSON]) -> EventId:
    """The last event of the leg before. A lost commit reply is resolved by reading the turn again."""
    try:
        return await service.store.run(turns.resume, turn.turn_id, turn.session_id, responses)
    except Unavailable:
        standing = (await service.store.run(turns.standings, [turn.turn_id])).get(turn.turn_id)
        if standing is None or standing.status == TurnStatus.AWAITING_INPUT:
            raise
        return turn.last


def _matched(turn: TurnRow, responses: list[ToolResponse]) -> list[JSON]:
    """The responses in the order of the calls that await them. Raises Conflict, InvalidRequest."""
    if turn.status != TurnStatus.AWAITING_INPUT or turn.output_message is None:
        raise Conflict(f"Turn '{turn.turn_id}' is {turn.status}, so it does not await tool responses")
    asked = [call["call_id"] for call in turn.output_message["tool_calls"]]
    given = {response.call_id: response.model_dump(mode="json") for response in responses}
    missing, unasked = set(asked) - given.keys(), given.keys() - set(asked)
    if missing or unasked:
        problem = (
            f"missing: {', '.join(sorted(missing))}" if missing else f"not asked for: {', '.join(sorted(unasked))}"
        )
        raise InvalidRequest(f"tool_responses: must answer each call of the turn by its call_id; {problem}")
    return [given[call_id] for call_id in asked]


async def _answer(
    service: Service, agent_id: str, session_id: str, turn_id: str, after: EventId, stream: bool
) -> Response:
    """One leg, as a stream or as the turn that it leads to."""
    location = f"/v1/agents/{agent_id}/session/{session_id}/turn/{turn_id}"
    headers = {"Location": location, "X-Turn-Id": turn_id}
    batches = service.relay.follow(turn_id, after, through_legs=False, just_accepted=after == START)
    if stream:
        return _stream(service, batches, headers)
    async for _ in batches:
        pass
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    if turn.error is not None:
        failure = TurnFailure(**turn.error)
        return JSONResponse({"error": failure.as_dict()}, failure_status(failure), headers)
    return JSONResponse(turn_shape(turn), headers=headers | _headers(turn))


def _stream(service: Service, batches: AsyncIterator[list[Event]], headers: dict[str, str]) -> TurnStream:
    return TurnStream(
        batches,
        ping_seconds=service.settings.ping_seconds,
        send_timeout_seconds=service.settings.stream_send_timeout_seconds,
        headers=headers,
    )


@router.get(TURN_PATH + "/{turn_id}", **answers(Turn))
async def get_turn(
    agent_id: AgentId, session_id: SessionId, turn_id: TurnId, response: Response, service: CurrentService, owner: Owner
) -> JSON:
    """A turn with the steps it has so far. Headers tell its status and the worker process that ran it last."""
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    response.headers.update(_headers(turn))
    return turn_shape(turn)


@router.get(TURN_PATH + "/{turn_id}/step/{step_id}", **answers(AgentStepResponse))
async def get_step(
    agent_id: AgentId, session_id: SessionId, turn_id: TurnId, step_id: StepId, service: CurrentService, owner: Owner
) -> JSON:
    """One step of a turn."""
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    turn = await service.store.run(turns.get_turn, session_id, turn_id)
    for step in turn.steps:
        if step["step_id"] == step_id:
            return {"step": step}
    raise NotFound("Step", step_id)


@router.get(TURN_PATH + "/{turn_id}/events", responses=_STREAM, response_class=Response)
async def follow_turn(
    agent_id: AgentId,
    session_id: SessionId,
    turn_id: TurnId,
    service: CurrentService,
    owner: Owner,
    last_event_id: Annotated[str | None, Header(description="The id of the last event that the client has")] = None,
    after: Annotated[str | None, Query(description="The same, for clients that cannot set headers")] = None,
) -> Response:
    """A turn's events from the start, or from behind a given one: replayed, then live, through all its legs.

    Ends with the turn, or when it awaits input.
    """
    await service.store.run(agents.get_session, owner, agent_id, session_id)
    await service.store.run(turns.get_turn, session_id, turn_id)
    cursor = _cursor(after or last_event_id)
    batches = service.relay.follow(turn_id, cursor, through_legs=True)
    return _stream(service, batches, {"X-Turn-Id": turn_id})


def _cursor(identifier: str | None) -> EventId:
    if not identifier:
        return START
    try:
        return EventId.parse(identifier)
    except ValueError as error:
        raise InvalidRequest(f"Last-Event-ID or after: {error}") from None


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
    messages = [step["model_response"] for step in row.steps if step["step_type"] == "inference"]
    return {**messages[-1], "tool_calls": []} if messages else shapes.NO_MESSAGE


def _headers(row: TurnRow) -> dict[str, str]:
    return {"X-Turn-Status": row.status.value, **({"X-Caravan-Worker": row.worker} if row.worker else {})}
