"""One attempt at one leg of a turn: takes it over, runs it, records, until it ends or the turn is somebody else's.

What happens in a leg is its subclass's: `tasks.engine.agent_turn` (Llama Stack's agents), `tasks.engine.response`
(OpenAI's Responses).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from redis.exceptions import RedisError

from app.domain import events
from app.domain.errors import AttemptLost, TurnFailure, Unavailable, Unsealable
from app.domain.events import LOST_TAIL_LEAP, Event, EventKind
from app.domain.turns import ENDED, TurnStatus
from app.events.log import EventLog
from app.events.writer import EventWriter
from app.identity.sealing import Sealing
from app.identity.secrets import Secrets
from app.settings import Settings
from app.stack.access import acting_as
from app.store import Store, claims
from app.store.claims import Claim, LegEnd
from app.store.workers import overdue_failure
from tasks.engine.inference import model_failure
from tasks.engine.ledger import Ledger
from tasks.engine.mcp import Connections, max_message_bytes
from tasks.stack import LlamaStack
from tasks.tools.sandbox import Sandbox

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
Outcome = Literal["completed", "awaiting_input", "failed", "cancelled", "handed over", "lost", "broken"]
Reason = Literal["cancel", "expire", "drop", "hand over"]


@dataclass(frozen=True)
class Tools:
    """What an attempt works with: one set for the whole process. `may_write`: the lease is not in doubt."""

    settings: Settings
    store: Store
    log: EventLog
    stack: LlamaStack
    sandbox: Sandbox
    may_write: Callable[[], bool]


class Attempt(ABC):
    """Owns a claimed turn until `run` returns. `cancel`, `expire`, `drop` and `hand_over` stop it, on the same loop."""

    def __init__(self, given: Tools, claim: Claim) -> None:
        self._given = given
        self._claim = claim
        self._task: asyncio.Task[Outcome] | None = None
        self._stop: Reason | None = None
        self._draining = False
        self._settled = False
        """What becomes of the turn is written, or being written: nothing can change that, nor hide it."""
        self._recording = asyncio.Lock()
        self._ledger = Ledger(claim.turn_id, claim.ledger, self._record, self._persist)
        self._secrets = Secrets()
        self._mcp = Connections(max_message_bytes(given.settings))
        self.done = asyncio.Event()

    @abstractmethod
    async def _leg(self) -> Outcome:
        """Goes on with the leg to its end, `_between_steps` before each step. Raises TurnFailure, AttemptLost."""

    def cancel(self) -> None:
        """Ends the turn as cancelled."""
        self._interrupt("cancel")

    def expire(self) -> None:
        """Ends the turn as failed: it is past its deadline."""
        self._interrupt("expire")

    def drop(self) -> None:
        """Leaves the turn at once and writes nothing more: it is not ours any longer."""
        self._interrupt("drop")

    def hand_over(self, *, now: bool = False) -> None:
        """Puts the turn back for another worker, at the end of the current step, or at once."""
        self._draining = True
        if now:
            self._interrupt("hand over")

    def _interrupt(self, reason: Reason) -> None:
        if self._stop is None and self._task is not None and not self._settled:
            self._stop = reason
            self._task.cancel()

    @property
    def following(self) -> str | None:
        """Once the turn has ended: the session's next turn, if it is to be rung."""
        return self._claim.following

    async def run(self) -> Outcome:
        """To the end of the leg. Never raises."""
        self._task = asyncio.create_task(self._guarded(), name=f"turn {self._claim.turn_id}")
        try:
            await asyncio.wait([self._task])
            return "lost" if self._task.cancelled() else self._task.result()
        finally:
            self.done.set()

    async def _guarded(self) -> Outcome:
        taking = asyncio.create_task(self._take_over())
        try:
            await asyncio.shield(taking)
        except AttemptLost:
            return "lost"
        except asyncio.CancelledError:
            # What is to be written about the end comes behind what a dead attempt left, so taking over goes on.
            if self._stop == "drop" or not await _succeeded(taking):
                return "lost"
        except Exception:
            logger.exception("the turn cannot be taken over; it is put back, at the cost of one of its failures")
            return "broken"
        checkpoints = asyncio.create_task(self._checkpoints(), name=f"checkpoints {self._claim.turn_id}")
        try:
            return await self._until_it_ends()
        except AttemptLost as lost:
            logger.warning("%s", lost)
            return "lost"
        finally:
            self._settled = True
            self._mcp.close()
            checkpoints.cancel()
            await self._writer.finish()

    async def _checkpoints(self) -> None:
        """Records long streams while they go on, so that what Redis holds of a turn is bounded."""
        with contextlib.suppress(AttemptLost):  # the leg finds out by itself
            while True:
                await self._writer.full.wait()
                await self._record()

    async def _until_it_ends(self) -> Outcome:
        try:
            return await (self._stopped() if self._stop else self._leg_as_owner())
        except asyncio.CancelledError:
            return await self._stopped()
        except TurnFailure as failure:
            return await self._fail(failure)
        except AttemptLost:
            raise
        except Exception as error:
            logger.exception("the turn failed by a fault of this program")
            return await self._fail(TurnFailure("internal_error", f"Internal error: {type(error).__name__}"))

    async def _leg_as_owner(self) -> Outcome:
        """Raises what `_leg` does, and TurnFailure: the secrets of the request cannot be opened."""
        claim, sealing = self._claim, Sealing(self._given.settings.sealing_keys)
        try:
            self._secrets = Secrets.opened(sealing, claim.sealed, claim.turn_id)
        except Unsealable as error:
            raise TurnFailure("internal_error", str(error)) from error
        with acting_as(claim.owner, self._secrets.provider_data):
            return await self._leg()

    async def _stopped(self) -> Outcome:
        if self._stop == "drop":
            return "lost"
        if self._stop == "hand over":
            return await self._hand_over(between_steps=False)
        if self._stop == "expire":
            return await self._fail(overdue_failure())
        return await self._fail(TurnFailure("cancelled", "Cancelled."))

    async def _take_over(self) -> None:
        """Raises the fence in the log, and records what a dead attempt left there before the first new event."""
        claim = self._claim
        try:
            tail = await self._given.log.raise_fence(claim.turn_id, claim.fence, claim.last)
        except (RedisError, OSError, TimeoutError):
            tail = None
        if tail:
            self._claim = await self._persist(tail)
        last = self._claim.last
        self._writer = EventWriter(
            self._given.log,
            claim.turn_id,
            claim.fence,
            last,
            last.n + 1 + (LOST_TAIL_LEAP if tail is None and claim.tail_lost else 0),
            may_write=self._given.may_write,
            still_owned=self._still_owned,
            on_lost=self.drop,
        )

    async def _still_owned(self) -> bool:
        return await self._given.store.run(claims.still_owned, self._claim)

    async def _between_steps(self) -> Outcome | None:
        """Hands the turn over here, if this worker drains. Raises TurnFailure: the turn says more than it may."""
        self._check_size()
        return await self._hand_over(between_steps=True) if self._draining else None

    async def _ask[Answer](self, request: Any, take: Callable[[AsyncIterator[Any]], Awaitable[Answer]]) -> Answer:
        """What `take` makes of the model's streamed answer. Raises TurnFailure."""
        limit = self._given.settings.model_call_timeout_seconds
        try:
            async with asyncio.timeout(limit) as taken:
                stream: AsyncGenerator[Any] = await self._given.stack.inference.openai_chat_completion(request)
                async with aclosing(stream):
                    return await take(stream)
        except TurnFailure:
            raise
        except Exception as error:
            if taken.expired():
                message = f"The model did not finish within {limit:g} s (MODEL_CALL_TIMEOUT_SECONDS)."
                raise TurnFailure("model_timeout", message) from error
            logger.warning("the model failed: %s", error)
            raise model_failure(error) from error

    def _progress(self, data: str, kind: EventKind = EventKind.STEP_PROGRESS) -> None:
        self._writer.emit(kind, data)
        self._check_size()

    def _check_size(self) -> None:
        """Raises TurnFailure: the turn says more than it may."""
        limit = self._given.settings.event_log_max_bytes
        if self._claim.event_bytes + self._writer.unrecorded_bytes > limit:
            message = f"The turn's events are over {limit} bytes (EVENT_LOG_MAX_BYTES)."
            raise TurnFailure("event_log_exceeded", message)

    async def _fail(self, failure: TurnFailure) -> Outcome:
        self._writer.forget_staged()
        self._writer.stage(EventKind.ERROR, events.error(failure))
        cancelled = failure.code == "cancelled"
        status = TurnStatus.CANCELLED if cancelled else TurnStatus.FAILED
        await self._record(end=LegEnd(status, failure=failure, completed_at=datetime.now(UTC)))
        logger.warning("the turn %s: %s", status, failure)
        return "cancelled" if cancelled else "failed"

    async def _hand_over(self, *, between_steps: bool) -> Outcome:
        self._settled = True
        self._writer.forget_staged()
        async with self._recording:
            segment = self._writer.unrecorded(staged=False)
            handed = await self._persistently(claims.hand_over, self._claim, segment, between_steps=between_steps)
        return "handed over" if handed else "lost"

    async def _record(self, **what: Any) -> None:
        """Records in one transaction, then publishes what was staged for it. Not to be cut off by a cancellation."""
        self._settled |= "end" in what
        recording = asyncio.create_task(self._write(**what))
        try:
            await asyncio.shield(recording)
        finally:
            # A cancellation waits: what is committed and what this attempt believes must not part.
            await recording

    async def _write(self, **what: Any) -> None:
        """One at a time, each behind the other. What is staged belongs to the step or the end that it tells of."""
        async with self._recording:
            segment = self._writer.unrecorded(staged="step" in what or "end" in what)
            self._claim = await self._persist(segment, **what)
            if segment:
                self._writer.recorded(segment, final="end" in what and what["end"].status in ENDED)

    async def _persist(self, segment: list[Event], **what: Any) -> Claim:
        """Raises AttemptLost."""
        return await self._persistently(claims.record, self._claim, segment, **what)

    async def _persistently(self, query: Callable[..., Any], *args: Any, **what: Any) -> Any:
        """Tries until Postgres answers. Raises what the query does (AttemptLost)."""
        while True:
            try:
                return await self._given.store.run(query, *args, **what)
            except Unavailable as error:
                logger.warning("nothing can be recorded or read, trying again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)


async def _succeeded(task: asyncio.Task[None]) -> bool:
    await asyncio.wait([task])
    return task.exception() is None
