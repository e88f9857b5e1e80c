"""Agents."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from llama_stack.apis.agents import Agent, AgentConfig, AgentCreateResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.config import JsonDict

from app.api.compat.agents import with_schemas
from app.api.compat.dialect import CurrentDialect
from app.api.errors import answers
from app.api.identifiers import AgentId
from app.api.service import JSON, CurrentService, Owner
from app.api.validation import SHIELDS, check_agent_config, plain
from app.domain import shapes
from app.domain.errors import InvalidRequest, TurnFailure
from app.stack.mounted import StackApp
from app.store import agents
from app.store.agents import AgentRow

router = APIRouter(tags=["Agents"])

DELETED = TurnFailure("deleted", "The agent, session or conversation of this turn was deleted.")
EXAMPLE: JsonDict = {
    "model": "my-model",
    "instructions": "You are helpful.",
    "client_tools": [
        {
            "name": "temperature",
            "description": "How warm it is in a city, in °C",
            "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        }
    ],
    "toolgroups": [],
    "max_infer_iters": 10,
    "sampling_params": {"strategy": {"type": "greedy"}, "max_tokens": 512},
}
PageStart = Annotated[int, Query(ge=0, le=2**31 - 1)]
PageLimit = Annotated[int, Query(ge=1, le=1000)]


class Page[T](BaseModel):
    """Part of a list; the next part begins at `start_index` plus the number of `data`."""

    data: list[T]
    has_more: bool
    url: str | None = None


class CreateAgent(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"agent_config": EXAMPLE}]})

    agent_config: Annotated[AgentConfig, BeforeValidator(with_schemas)]


@router.post("/agents", **answers(AgentCreateResponse))
async def create_agent(body: CreateAgent, request: Request, service: CurrentService, owner: Owner) -> JSON:
    """Create an agent with the given configuration."""
    check_agent_config(body.agent_config)
    await _check_shields(body.agent_config, request.app.state.stack, owner)
    agent_id = str(uuid.uuid4())
    config = plain(body.agent_config)
    await service.store.run(agents.create_agent, owner, agent_id, config)
    return {"agent_id": agent_id}


async def _check_shields(config: AgentConfig, stack: StackApp, owner: str) -> None:
    """Raises InvalidRequest: a shield that would fail every turn."""
    for field in SHIELDS:
        if missing := await stack.missing_shields(getattr(config, field) or (), owner):
            raise InvalidRequest(
                f"agent_config.{field}: there is no shield {missing[0]}; POST /v1/shields registers one"
            )


@router.get("/agents", **answers(Page[Agent]))
async def list_agents(
    request: Request,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentDialect,
    start_index: PageStart = 0,
    limit: PageLimit = 100,
) -> JSON:
    """List agents, oldest first."""
    rows, has_more = await service.store.run(agents.list_agents, owner, start_index, limit)
    data = [dialect.agent(_shape(row)) for row in rows]
    return {"data": data, "has_more": has_more, "url": request.url.path}


@router.get("/agents/{agent_id}", **answers(Agent))
async def get_agent(agent_id: AgentId, service: CurrentService, owner: Owner, dialect: CurrentDialect) -> JSON:
    """Describe an agent."""
    return dialect.agent(_shape(await service.store.run(agents.get_agent, owner, agent_id)))


@router.delete("/agents/{agent_id}", status_code=204)
async def delete_agent(agent_id: AgentId, service: CurrentService, owner: Owner) -> Response:
    """Delete an agent, its sessions and turns. What runs there is cancelled and its streams end first."""
    unfinished = await service.store.run(agents.mark_agent_deleted, owner, agent_id)
    await end_all(service, unfinished)
    return Response(status_code=204)


async def end_all(service: CurrentService, turn_ids: list[str]) -> None:
    """Ends the turns of something deleted; those that run are cancelled by their workers."""
    for turn_id in reversed(turn_ids):
        await service.cancel(turn_id, DELETED)


def _shape(row: AgentRow) -> JSON:
    return {"agent_id": row.agent_id, "agent_config": row.config, "created_at": shapes.iso(row.created_at)}
