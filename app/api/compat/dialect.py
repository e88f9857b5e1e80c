"""The shapes in which one request of the agents routes is answered, chosen once by the client's version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Depends, Request

from app.api.compat import agents, tool_calls
from app.api.compat.version import client_version
from app.domain.events import Event

JSON = dict[str, Any]
Batches = AsyncIterator[list[Event]]


class Dialect:
    """0.3.5's, as everything is stored: for clients since 0.3, and for those that do not say what they are."""

    def agent(self, agent: JSON) -> JSON:
        return agent

    def turn(self, turn: JSON) -> JSON:
        return turn

    def step(self, step: JSON) -> JSON:
        return step

    def events(self, batches: Batches) -> Batches:
        return batches


class Before03(Dialect):
    """That of 0.1 and 0.2. The same event always becomes the same bytes, so that a replay equals what was live."""

    def agent(self, agent: JSON) -> JSON:
        return agents.with_parameters(agent)

    def turn(self, turn: JSON) -> JSON:
        return tool_calls.in_turn(turn)

    def step(self, step: JSON) -> JSON:
        return tool_calls.in_step(step)

    async def events(self, batches: Batches) -> Batches:
        async with aclosing(batches):  # type: ignore[type-var]  # it is an async generator
            async for batch in batches:
                yield [tool_calls.in_event(event) for event in batch]


CANONICAL = Dialect()
BEFORE_03 = Before03()


async def _dialect(request: Request) -> Dialect:
    version = client_version(request.headers)
    return BEFORE_03 if version is not None and version < (0, 3) else CANONICAL


CurrentDialect = Annotated[Dialect, Depends(_dialect)]
