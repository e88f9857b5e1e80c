"""Sessions of an agent."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from llama_stack.apis.agents import AgentSessionCreateResponse, Session
from pydantic import BaseModel, ConfigDict, Field

from app.api.agents import Page, PageLimit, PageStart, end_all
from app.api.compat.dialect import CurrentDialect
from app.api.errors import answers
from app.api.identifiers import AgentId, SessionId, parsed
from app.api.service import JSON, CurrentService, Owner
from app.api.turns import turn_shape
from app.api.validation import check_text
from app.domain import shapes
from app.store import agents, turns
from app.store.agents import SessionRow

router = APIRouter(tags=["Agents"])


class CreateSession(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"session_name": "Monday"}]})

    session_name: Annotated[str, Field(max_length=10_000)]


@router.post("/agents/{agent_id}/session", **answers(AgentSessionCreateResponse))
async def create_session(agent_id: AgentId, body: CreateSession, service: CurrentService, owner: Owner) -> JSON:
    """Create a session of an agent."""
    check_text("session_name", body.session_name)
    session_id = str(uuid.uuid4())
    await service.store.run(agents.create_session, owner, agent_id, session_id, body.session_name)
    return {"session_id": session_id}


@router.get("/agents/{agent_id}/sessions", **answers(Page[Session]))
async def list_sessions(
    agent_id: AgentId,
    request: Request,
    service: CurrentService,
    owner: Owner,
    start_index: PageStart = 0,
    limit: PageLimit = 100,
) -> JSON:
    """List the sessions of an agent, oldest first, without their turns."""
    rows, has_more = await service.store.run(agents.list_sessions, owner, agent_id, start_index, limit)
    data = [_shape(row, []) for row in rows]
    return {"data": data, "has_more": has_more, "url": request.url.path}


@router.get("/agents/{agent_id}/session/{session_id}", **answers(Session))
async def get_session(
    agent_id: AgentId,
    session_id: SessionId,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
    turn_ids: Annotated[list[str] | None, Query(description="Only these turns")] = None,
) -> JSON:
    """A session with its turns in order."""
    session = await service.store.run(agents.get_session, owner, agent_id, session_id)
    rows = await service.store.run(turns.session_turns, session_id, parsed(turn_ids))
    return _shape(session, [dialect.turn(turn_shape(row)) for row in rows])


@router.delete("/agents/{agent_id}/session/{session_id}", status_code=204)
async def delete_session(agent_id: AgentId, session_id: SessionId, service: CurrentService, owner: Owner) -> Response:
    """Delete a session and its turns. What runs there is cancelled and its streams end first."""
    unfinished = await service.store.run(agents.mark_session_deleted, owner, agent_id, session_id)
    await end_all(service, unfinished)
    return Response(status_code=204)


def _shape(row: SessionRow, its_turns: list[JSON]) -> JSON:
    return {
        "session_id": row.session_id,
        "session_name": row.name,
        "turns": its_turns,
        "started_at": shapes.iso(row.created_at),
    }
