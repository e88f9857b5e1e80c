"""One attempt at one leg of a turn: decide, do, record, until the leg ends or the turn is somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from llama_stack.apis.agents import AgentConfig, InferenceStep, Step, ToolExecutionStep
from llama_stack.apis.common.content_types import TextContentItem
from llama_stack.apis.inference import (
    CompletionMessage,
    Message,
    ToolCall,
    ToolResponse,
    ToolResponseMessage,
    UserMessage,
)
from pydantic import TypeAdapter
from redis.exceptions import RedisError

from app.domain import events, history, shapes
from app.domain.decide import AwaitInput, Finish, Infer, RecordResponses, RunTools, decide
from app.domain.errors import AttemptLost, TurnFailure, Unavailable
from app.domain.events import LOST_TAIL_LEAP, Event, EventKind
from app.domain.turns import ENDED, TurnStatus
from app.events.log import EventLog
from app.events.writer import EventWriter
from app.settings import Settings
from app.stack.access import acting_as
from app.store import Store, claims
from app.store.claims import Claim, LegEnd
from app.store.workers import overdue_failure
from tasks.engine import inference, tools
from tasks.engine.messages import chat_request
from tasks.stack import LlamaStack

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
Outcome = Literal["completed", "awaiting_input", "failed", "cancelled", "handed over", "lost", "broken"]
Reason = Literal["cancel", "expire", "drop", "hand over"]

_steps: TypeAdapter[list[Step]] = TypeAdapter(list[Step])
_inputs: TypeAdapter[list[Message]] = TypeAdapter(list[UserMessage | ToolResponseMessage])
_responses: TypeAdapter[list[ToolResponse]] = TypeAdapter(list[ToolResponse])


@dataclass(frozen=True)
class Tools:
    """What an attempt works with: one set for the whole process. `may_write`: the lease is not in doubt."""

    settings: Settings
    store: Store
    log: EventLog
    stack: LlamaStack
    may_write: Any


class Attempt:
    """Owns a claimed turn until `run` returns. `cancel`, `expire`, `drop` and `hand_over` stop it, on the same loop."""

    def __init__(self, given: Tools, claim: Claim) -> None:
        self._given = given
        self._claim = claim
        self._config = _turn_config(claim)
        self._journal: list[Step] = _steps.validate_python(claim.steps)
        self._responses = {int(key): _responses.validate_python(value) for key, value in claim.tool_responses.items()}
        self._inputs: list[Message] = _inputs.validate_python(claim.request["messages"])
        self._resolved = tools.Resolved()
        self._leg_started = datetime.now(UTC)
        self._task: asyncio.Task[Outcome] | None = None
        self._stop: Reason | None = None
        self._draining = False
        self._started_calls: set[tuple[int, int]] = set()
        self._recording = asyncio.Lock()
        self.done = asyncio.Event()

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
        if self._stop is None and self._task is not None:
            self._stop = reason
            self._task.cancel()

    @property
    def following(self) -> str | None:
        """Once the turn has ended: the session's next turn, if it is to be rung."""
        return self._claim.following

    async def run(self) -> Outcome:
        """To the end of the leg. Never raises."""
        with acting_as(self._claim.owner):
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
            return await (self._stopped() if self._stop else self._steps_of_leg())
        except asyncio.CancelledError:
            return await self._stopped()
        except TurnFailure as failure:
            return await self._fail(failure)
        except AttemptLost:
            raise
        except Exception as error:
            logger.exception("the turn failed by a fault of this program")
            return await self._fail(TurnFailure("internal_error", f"Internal error: {type(error).__name__}"))

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

    async def _steps_of_leg(self) -> Outcome:
        await self._resolve()
        while True:
            self._check_size()
            if self._draining:
                return await self._hand_over(between_steps=True)
            action = decide(self._config, self._journal, self._responses)
            match action:
                case Infer():
                    ended = await self._infer()
                    if ended:
                        return ended
                case RunTools():
                    await self._run_tools(action)
                case RecordResponses():
                    await self._record_responses(action)
                case AwaitInput(message) | Finish(message):
                    return await self._end_leg(action, message)

    async def _resolve(self) -> None:
        if self._claim.resolved is not None:
            self._resolved = tools.Resolved.model_validate(self._claim.resolved)
            return
        request = self._claim.request
        if not (self._config.toolgroups or request.get("toolgroups") or request.get("documents")):
            return
        limit = self._given.settings.document_max_bytes
        self._resolved = await tools.resolve(self._given.stack, self._config, request, limit)
        await self._record(resolved=self._resolved.model_dump(mode="json"))

    async def _infer(self) -> Outcome | None:
        """One inference step. If the leg ends with it, both are recorded at once."""
        step_id, started_at = str(uuid.uuid4()), datetime.now(UTC)
        self._writer.emit(EventKind.STEP_START, events.step_start("inference", step_id))
        message = await self._ask_model(step_id)
        step = InferenceStep(
            step_id=step_id,
            turn_id=self._claim.turn_id,
            model_response=message,
            started_at=started_at,
            completed_at=datetime.now(UTC),
        )
        following = decide(self._config, [*self._journal, step], self._responses)
        if isinstance(following, AwaitInput | Finish):
            return await self._end_leg(following, following.message, step)
        calls = following.calls if isinstance(following, RunTools) else ()
        started = [(len(self._journal), index) for index, _ in calls]
        await self._record_step(step, started_calls=started)
        self._started_calls.update(started)
        return None

    async def _ask_model(self, step_id: str) -> CompletionMessage:
        messages = self._messages()
        request = await chat_request(self._config, messages, tools.offered(self._config, self._resolved))
        answer = inference.Inference(
            events.StepProgress("inference", step_id),
            self._progress,
            inference.call_ids(messages),
        )
        limit = self._given.settings.model_call_timeout_seconds
        try:
            async with asyncio.timeout(limit) as taken:
                stream: AsyncGenerator[Any] = await self._given.stack.inference.openai_chat_completion(request)
                async with aclosing(stream):
                    return await answer.run(stream)
        except TurnFailure:
            raise
        except Exception as error:
            if taken.expired():
                message = f"The model did not finish within {limit:g} s (MODEL_CALL_TIMEOUT_SECONDS)."
                raise TurnFailure("model_timeout", message) from error
            logger.warning("the model failed: %s", error)
            raise inference.model_failure(error) from error

    def _progress(self, data: str) -> None:
        self._writer.emit(EventKind.STEP_PROGRESS, data)
        self._check_size()

    def _check_size(self) -> None:
        """Raises TurnFailure: the turn says more than it may."""
        limit = self._given.settings.event_log_max_bytes
        if self._claim.event_bytes + self._writer.unrecorded_bytes > limit:
            message = f"The turn's events are over {limit} bytes (EVENT_LOG_MAX_BYTES)."
            raise TurnFailure("event_log_exceeded", message)

    def _messages(self) -> list[Message]:
        past = [
            (_with_context(_inputs.validate_python(turn.messages), turn.context), _steps.validate_python(turn.steps))
            for turn in self._claim.past
        ]
        current = (_with_context(self._inputs, self._resolved.context), self._journal)
        return history.conversation(self._config, [*past, current])

    async def _run_tools(self, action: RunTools) -> None:
        """All calls at once; their steps are recorded and published in the order that the model asked in."""
        to_start = [(action.ordinal, index) for index, _ in action.calls if self._to_start(action.ordinal, index)]
        if to_start:
            await self._record(started_calls=to_start)
        running = {
            index: asyncio.create_task(self._call_tool(action.ordinal, index, call)) for index, call in action.calls
        }
        self._next_call = action.calls[0][0]
        try:
            for index, call in action.calls:
                self._next_call = index
                await self._tool_step(action.ordinal, index, call, running[index])
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    def _to_start(self, ordinal: int, index: int) -> bool:
        """Whether a call is still to be noted as made by this attempt, which must come before it is made.

        It was never made (the turn was handed over before), or was in flight when its worker died and is repeated.
        """
        if (ordinal, index) in self._started_calls:
            return False
        entry = self._claim.ledger.get((ordinal, index))
        return entry is None or (entry.result is None and self._repeatable(ordinal, index))

    def _repeatable(self, ordinal: int, index: int) -> bool:
        tool = self._resolved.tool(self._journal[ordinal].model_response.tool_calls[index])
        return tool is not None and tool.safe_to_repeat(self._given.settings.tools_safe_to_repeat)

    async def _call_tool(self, ordinal: int, index: int, call: ToolCall) -> tuple[ToolResponse, datetime]:
        """The call's response, from the ledger if it is there; recorded at once if its step cannot be yet."""
        started_at = datetime.now(UTC)
        entry = self._claim.ledger.get((ordinal, index))
        if entry is not None and entry.result is not None:
            return ToolResponse.model_validate(entry.result), started_at
        if entry is not None and not self._repeatable(ordinal, index):
            return tools.failed(call, tools.OUTCOME_UNKNOWN), started_at
        settings = self._given.settings
        limits = tools.Limits(settings.tool_timeout_seconds, settings.tool_result_max_bytes)
        key = f"{self._claim.turn_id}:{ordinal}:{index}"
        response = await tools.call(self._given.stack, self._resolved, self._claim.session_id, call, key, limits)
        if index != self._next_call:
            await self._persist([], result=(ordinal, index, events.dump(response)))
        return response, started_at

    async def _tool_step(
        self, ordinal: int, index: int, call: ToolCall, running: asyncio.Task[tuple[ToolResponse, datetime]]
    ) -> None:
        step_id = str(uuid.uuid4())
        self._writer.emit(EventKind.STEP_START, events.step_start("tool_execution", step_id))
        progress = events.StepProgress("tool_execution", step_id).tool_call(events.dump(call), "in_progress")
        self._writer.emit(EventKind.STEP_PROGRESS, progress)
        response, started_at = await running
        step = ToolExecutionStep(
            step_id=step_id,
            turn_id=self._claim.turn_id,
            tool_calls=[call],
            tool_responses=[response],
            started_at=started_at,
            completed_at=datetime.now(UTC),
        )
        await self._record_step(step, result=(ordinal, index, events.dump(response)))

    async def _record_responses(self, action: RecordResponses) -> None:
        step = ToolExecutionStep(
            step_id=str(uuid.uuid4()),
            turn_id=self._claim.turn_id,
            tool_calls=list(action.calls),
            tool_responses=list(action.responses),
            started_at=self._journal[-1].completed_at,
            completed_at=datetime.now(UTC),
        )
        await self._record_step(step)

    async def _record_step(self, step: Step, **more: Any) -> None:
        self._writer.stage(EventKind.STEP_COMPLETE, events.step_complete(step))
        await self._record(step=events.dump(step), **more)
        self._journal.append(step)

    async def _end_leg(
        self, action: AwaitInput | Finish, message: CompletionMessage, step: Step | None = None
    ) -> Outcome:
        completed_at = datetime.now(UTC)
        steps = self._claim.steps
        if step is not None:
            self._writer.stage(EventKind.STEP_COMPLETE, events.step_complete(step))
            steps = [*steps, events.dump(step)]
        turn = shapes.turn(
            turn_id=self._claim.turn_id,
            session_id=self._claim.session_id,
            input_messages=self._claim.request["messages"],
            steps=steps,
            output_message=events.dump(message),
            started_at=self._claim.started_at,
            completed_at=completed_at,
        )
        awaits = isinstance(action, AwaitInput)
        status = TurnStatus.AWAITING_INPUT if awaits else TurnStatus.COMPLETED
        if awaits:
            self._writer.stage(EventKind.TURN_AWAITING_INPUT, events.turn_awaiting_input(turn))
        else:
            self._writer.stage(EventKind.TURN_COMPLETE, events.turn_complete(turn))
        end = LegEnd(
            status,
            events.dump(message),
            completed_at=completed_at,
            deadline_seconds=self._given.settings.input_wait_seconds if awaits else None,
        )
        await self._record(step=events.dump(step) if step else None, end=end)
        return "awaiting_input" if awaits else "completed"

    async def _fail(self, failure: TurnFailure) -> Outcome:
        self._writer.forget_staged()
        self._writer.stage(EventKind.ERROR, events.error(failure))
        cancelled = failure.code == "cancelled"
        status = TurnStatus.CANCELLED if cancelled else TurnStatus.FAILED
        await self._record(end=LegEnd(status, failure=failure, completed_at=datetime.now(UTC)))
        logger.warning("the turn %s: %s", status, failure)
        return "cancelled" if cancelled else "failed"

    async def _hand_over(self, *, between_steps: bool) -> Outcome:
        self._writer.forget_staged()
        async with self._recording:
            segment = self._writer.unrecorded(staged=False)
            handed = await self._persistently(claims.hand_over, segment, between_steps=between_steps)
        return "handed over" if handed else "lost"

    async def _record(self, **what: Any) -> None:
        """Records in one transaction, then publishes what was staged for it. Not to be cut off by a cancellation."""
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
        return await self._persistently(claims.record, segment, **what)

    async def _persistently(self, write: Callable[..., Any], segment: list[Event], **what: Any) -> Any:
        """Tries until Postgres answers. Raises AttemptLost."""
        while True:
            try:
                return await self._given.store.run(write, self._claim, segment, **what)
            except Unavailable as error:
                logger.warning("nothing can be recorded, trying again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)


async def _succeeded(task: asyncio.Task[None]) -> bool:
    await asyncio.wait([task])
    return task.exception() is None


def _turn_config(claim: Claim) -> AgentConfig:
    """The agent's configuration with what the turn overrides."""
    config = AgentConfig.model_validate(claim.agent_config)
    override = claim.request.get("tool_config")
    if override:
        fields = {**claim.agent_config, "tool_config": override, "tool_choice": None, "tool_prompt_format": None}
        config = AgentConfig.model_validate(fields)
    return config


def _with_context(messages: list[Message], context: str) -> list[Message]:
    """A turn's input messages, the last one followed by the text of the turn's documents."""
    if not context:
        return messages
    content = messages[-1].content
    if isinstance(content, str):
        extended: Any = content + context
    else:
        extended = [*(content if isinstance(content, list) else [content]), TextContentItem(text=context)]
    return [*messages[:-1], messages[-1].model_copy(update={"content": extended})]
