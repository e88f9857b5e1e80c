"""Ids in paths. All of ours are UUIDs, so whatever is not one names nothing: 404, never a database error."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import Depends, Path

from app.domain.errors import NotFound


def _checked(noun: str, identifier: str) -> str:
    try:
        return str(uuid.UUID(identifier))
    except ValueError:
        raise NotFound(noun, identifier) from None


def _agent(agent_id: Annotated[str, Path()]) -> str:
    return _checked("Agent", agent_id)


def _session(session_id: Annotated[str, Path()]) -> str:
    return _checked("Session", session_id)


def _turn(turn_id: Annotated[str, Path()]) -> str:
    return _checked("Turn", turn_id)


def _step(step_id: Annotated[str, Path()]) -> str:
    return _checked("Step", step_id)


AgentId = Annotated[str, Depends(_agent)]
SessionId = Annotated[str, Depends(_session)]
TurnId = Annotated[str, Depends(_turn)]
StepId = Annotated[str, Depends(_step)]


def parsed(identifiers: list[str] | None) -> list[str] | None:
    """Ids from a query, repeated (`a=1&a=2`) or comma-separated; what is not an id names nothing."""
    if identifiers is None:
        return None
    found = []
    for identifier in (part.strip() for given in identifiers for part in given.split(",")):
        try:
            found.append(str(uuid.UUID(identifier)))
        except ValueError:
            continue
    return found
