"""An attempt at a turn of a Llama Stack agent: decide, do, record."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from llama_stack.apis.agents import AgentConfig, Document, InferenceStep, ShieldCallStep, Step, ToolExecutionStep
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

from app.domain import events, history, shapes
from app.domain.decide import AwaitInput, Finish, Infer, RecordResponses, RunShields, RunTools, decide
from app.domain.events import EventKind
from app.domain.turns import TurnStatus
from app.stack.fetching import Fetched
from app.store import session_files
from app.store.claims import Claim, LegEnd
from app.store.session_files import Changes
from tasks.engine import documents, inference, shields, tools
from tasks.engine.attempt import Attempt, Outcome, Tools
from tasks.engine.knowledge import Knowledge
from tasks.engine.ledger import Made, ServerCall
from tasks.engine.messages import chat_request
from tasks.engine.server_tools import ServerTools
from tasks.tools.code_interpreter import CodeInterpreter

_steps: TypeAdapter[list[Step]] = TypeAdapter(list[Step])
_inputs: TypeAdapter[list[Message]] = TypeAdapter(list[UserMessage | ToolResponseMessage])
_documents: TypeAdapter[list[Document]] = TypeAdapter(list[Document])
_responses: TypeAdapter[list[ToolResponse]] = TypeAdapter(list[ToolResponse])


class AgentTurn(Attempt):
    """Raises what pydantic raises: the turn cannot be read."""

    def __init__(self, given: Tools, claim: Claim) -> None:
        super().__init__(given, claim)
        self._config = _turn_config(claim)
        self._journal: list[Step] = _steps.validate_python(claim.steps)
        self._responses = {int(key): _responses.validate_python(value) for key, value in claim.tool_responses.items()}
        self._inputs: list[Message] = _inputs.validate_python(claim.request["messages"])
        self._knowledge = Knowledge(given.stack, given.store, claim.session_id)
        load = partial(self._persistently, session_files.folder, claim.session_id)
        code = CodeInterpreter(given.sandbox, load, shapes.turn_path(claim.agent_id, claim.session_id, claim.turn_id))
        self._server_tools = ServerTools(
            given.stack, given.settings, claim.session_id, self._knowledge, self._mcp, code
        )

    async def _leg(self) -> Outcome:
        self._server_tools.secrets = self._secrets
        await self._resolve()
        while True:
            if handed := await self._between_steps():
                return handed
            action = decide(self._config, self._journal, self._responses)
            match action:
                case RunShields():
                    if ended := await self._run_shields(action):
                        return ended
                case Infer():
                    if ended := await self._infer():
                        return ended
                case RunTools():
                    await self._run_tools(action)
                case RecordResponses():
                    await self._record_responses(action)
                case AwaitInput(message) | Finish(message):
                    return await self._end_leg(action, message)

    async def _resolve(self) -> None:
        if self._claim.resolved is not None:
            self._server_tools.resolved = tools.Resolved.model_validate(self._claim.resolved)
            return
        request = self._claim.request
        if not (self._config.toolgroups or request.get("toolgroups") or request.get("documents")):
            return
        resolved = await tools.resolve(self._given.stack, self._config, request, self._server_tools.listed)
        files: Changes = {}
        if given := _documents.validate_python(request.get("documents") or []):
            resolved.context, files = await self._take_in(given, resolved)
        await self._record(resolved=resolved.model_dump(mode="json"), files=files)
        self._server_tools.resolved = resolved

    async def _take_in(self, given: list[Document], resolved: tools.Resolved) -> tuple[str, Changes]:
        """The turn's documents: made searchable, files for its code, or both; if neither, they are text.

        Gives what they add to the model's input, and the files.
        """
        fetched = await documents.fetched(given, self._given.settings)
        if not (resolved.searches_documents or resolved.runs_code):
            return "\n".join(await documents.as_texts(fetched, self._given.settings)), {}
        if resolved.searches_documents:
            texts = await documents.as_texts(fetched, self._given.settings, or_files=resolved.runs_code)
            await self._knowledge.insert(given, fetched, texts)
        if not resolved.runs_code:
            return "", {}
        files = await self._as_files(fetched)
        return documents.told(files), files

    async def _as_files(self, fetched: Sequence[Fetched]) -> Mapping[str, bytes]:
        """Raises TurnFailure: the session's folder would hold more than it may."""
        sizes = await self._persistently(session_files.sizes, self._claim.session_id)
        files = documents.as_files(fetched, sizes)
        documents.check_folder(sizes | {name: len(content) for name, content in files.items()}, self._given.settings)
        return files

    async def _run_shields(self, action: RunShields) -> Outcome | None:
        """One step for all shields of one kind. Raises TurnFailure: one of them failed."""
        step_id, started_at = str(uuid.uuid4()), datetime.now(UTC)
        started = events.step_start("shield_call", step_id, touchpoint=action.touchpoint)
        self._writer.emit(EventKind.STEP_START, started)
        conversation = self._messages(self._journal[: action.ordinal])
        if action.message is not None:
            conversation.append(action.message)
        limit = self._given.settings.model_call_timeout_seconds
        step = ShieldCallStep(
            step_id=step_id,
            turn_id=self._claim.turn_id,
            violation=await shields.run(self._given.stack.safety, action.shields, conversation, limit),
            started_at=started_at,
            completed_at=datetime.now(UTC),
        )
        return await self._complete(step)

    async def _infer(self) -> Outcome | None:
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
        return await self._complete(step)

    async def _complete(self, step: InferenceStep | ShieldCallStep) -> Outcome | None:
        """Records a step. If the leg ends with it, both are recorded at once."""
        following = decide(self._config, [*self._journal, step], self._responses)
        if isinstance(following, AwaitInput | Finish):
            return await self._end_leg(following, following.message, step)
        calls = following.calls if isinstance(following, RunTools) else ()
        started = [(len(self._journal), index) for index, _ in calls]
        await self._record_step(step, started_calls=started)
        self._ledger.started(started)
        return None

    async def _ask_model(self, step_id: str) -> CompletionMessage:
        messages = self._messages(self._journal)
        request = await chat_request(self._config, messages, tools.offered(self._config, self._server_tools.resolved))
        answer = inference.Inference(
            events.StepProgress("inference", step_id),
            self._progress,
            inference.call_ids(messages),
        )
        return await self._ask(request, answer.run)

    def _messages(self, journal: Sequence[Step]) -> list[Message]:
        past = [
            (_with_context(_inputs.validate_python(turn.messages), turn.context), _steps.validate_python(turn.steps))
            for turn in self._claim.past
        ]
        current = (_with_context(self._inputs, self._server_tools.resolved.context), journal)
        return history.conversation(self._config, [*past, current])

    async def _run_tools(self, action: RunTools) -> None:
        calls = [self._server_call(action.ordinal, index, call) for index, call in action.calls]
        asked = dict(action.calls)

        async def record(index: int, running: asyncio.Task[Made]) -> None:
            await self._tool_step(action.ordinal, index, asked[index], running)

        await self._ledger.run(action.ordinal, calls, record)

    def _server_call(self, ordinal: int, index: int, call: ToolCall) -> ServerCall:
        runs_code = self._server_tools.runs_code(call)
        return ServerCall(
            index,
            repeatable=self._server_tools.repeatable(call),
            make=partial(self._run_code, ordinal, index, call) if runs_code else partial(self._call_tool, call),
            unknown=events.dump(tools.failed(call, tools.OUTCOME_UNKNOWN)),
        )

    async def _call_tool(self, call: ToolCall, key: str) -> dict[str, Any]:
        return events.dump(await self._server_tools.call(call, key))

    async def _run_code(self, ordinal: int, index: int, call: ToolCall, key: str) -> dict[str, Any]:
        """Records the result together with what the code left: both or neither, so that it can be run again."""
        code = self._server_tools.code
        async with code.in_order:
            result = await self._call_tool(call, key)
            await self._record(result=(ordinal, index, result), files=code.take_changes())
            return result

    async def _tool_step(self, ordinal: int, index: int, call: ToolCall, running: asyncio.Task[Made]) -> None:
        step_id = str(uuid.uuid4())
        self._writer.emit(EventKind.STEP_START, events.step_start("tool_execution", step_id))
        progress = events.StepProgress("tool_execution", step_id).tool_call(events.dump(call), "in_progress")
        self._writer.emit(EventKind.STEP_PROGRESS, progress)
        made = await running
        step = ToolExecutionStep(
            step_id=step_id,
            turn_id=self._claim.turn_id,
            tool_calls=[call],
            tool_responses=[ToolResponse.model_validate(made.result)],
            started_at=made.started_at,
            completed_at=datetime.now(UTC),
        )
        await self._record_step(step, result=(ordinal, index, made.result))

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


def _turn_config(claim: Claim) -> AgentConfig:
    """The agent's configuration with what the turn overrides."""
    config = AgentConfig.model_validate(claim.agent_config)
    override = claim.request.get("tool_config")
    if override:
        fields = {"tool_config": override, "tool_choice": None, "tool_prompt_format": None}
        config = AgentConfig.model_validate({**(claim.agent_config or {}), **fields})
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
