"""What the routes work with: one set for the web process, made by `app.asgi` in its lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from app.dispatch import Doorbell
from app.domain.errors import TurnFailure
from app.domain.events import Event, EventId
from app.domain.turns import TurnStatus
from app.endings import CANCELLED, Endings
from app.events.follow import Relay
from app.identity.sealing import Sealing
from app.identity.secrets import Secrets
from app.settings import Settings
from app.store import Store, turns
from app.store.admission import Caps
from app.store.turns import Ended


class StoreRecords:
    """What a follower asks of Postgres, from the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def segments_after(self, turn_id: str, cursor: EventId, limit: int) -> list[Event]:
        return await self._store.run(turns.segments_after, turn_id, cursor, limit)

    async def standings(self, turn_ids: Sequence[str]) -> dict[str, tuple[TurnStatus, EventId]]:
        found = await self._store.run(turns.standings, turn_ids)
        return {turn_id: (standing.status, standing.last) for turn_id, standing in found.items()}


@dataclass(frozen=True)
class Service:
    settings: Settings
    store: Store
    relay: Relay
    doorbell: Doorbell
    endings: Endings

    async def ring(self, turn_id: str, traceparent: str | None) -> None:
        await asyncio.to_thread(self.doorbell.ring, turn_id, traceparent)

    async def cancel(self, turn_id: str, failure: TurnFailure = CANCELLED) -> TurnStatus | None:
        return await asyncio.to_thread(self.endings.cancel, turn_id, failure)

    async def announce(self, ended: Sequence[Ended], interrupted: str | None = None) -> None:
        if ended:
            await asyncio.to_thread(self.endings.announce, ended)
        if interrupted:
            await asyncio.to_thread(self.endings.log.ask_to_cancel, interrupted)

    def sealed(self, secrets: Secrets, turn_id: str) -> bytes | None:
        """None: there are none. Raises InvalidRequest: SEALING_KEYS is not set."""
        return secrets.sealed(Sealing(self.settings.sealing_keys), turn_id)

    @property
    def caps(self) -> Caps:
        configured = self.settings
        return Caps(configured.max_turns_per_session, configured.max_turns_per_principal, configured.max_turns)


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _owner(request: Request) -> str:
    """The principal that `app.identity` has named."""
    return cast(str, request.scope["principal"])


CurrentService = Annotated[Service, Depends(_service)]
Owner = Annotated[str, Depends(_owner)]
JSON = dict[str, Any]
