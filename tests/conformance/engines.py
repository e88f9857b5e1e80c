"""The two engines, each playing a script with real parts: `ChatAgent`, and ours over Postgres and Redis."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any, Protocol, cast

from llama_stack.apis.agents import AgentConfig, AgentTurnCreateRequest, AgentTurnResumeRequest, Turn
from llama_stack.apis.inference import ToolResponseMessage, UserMessage
from llama_stack.providers.inline.agents.meta_reference.agent_instance import ChatAgent
from llama_stack.providers.inline.agents.meta_reference.persistence import AgentSessionInfo

from app.domain.events import START, Event, EventKind
from app.events.log import EventLog
from app.settings import Settings
from app.store import Store
from app.store.claims import Claim
from tasks.engine.agent_turn import AgentTurn
from tasks.engine.attempt import Attempt, Tools
from tasks.stack import LlamaStack
from tasks.tools.sandbox import Limits, Sandbox
from tests.conformance.scripts import Answer, Ask, Script
from tests.conformance.transcripts import Json, Leg, Transcript, payload
from tests.conformance.world import World
from tests.integration.store.seeds import Seeds
from tests.support.scripted_model import ScriptedModel


class Engine(Protocol):
    async def ask(self, ask: Ask) -> Leg: ...

    async def answer(self, turn: Json, responses: list[Json]) -> Leg: ...


async def play(engine: Engine, script: Script, world: World, model: ScriptedModel) -> Transcript:
    """Every leg of a script, and what the model and the tools saw of it."""
    transcript, before = Transcript(), len(model.requests())
    for leg in script.legs:
        if isinstance(leg, Ask):
            played = await engine.ask(leg)
        else:
            played = await _answer(engine, leg, payload(transcript.legs[-1].events[-1])["turn"])
        transcript.legs.append(played)
    transcript.requests = [record["body"] for record in model.requests()[before:]]
    transcript.calls = [[name, arguments] for name, arguments in world.calls]
    return transcript


async def _answer(engine: Engine, answer: Answer, turn: Json) -> Leg:
    calls = turn["output_message"]["tool_calls"]
    responses = [
        {"call_id": call["call_id"], "tool_name": call["tool_name"], "content": answer.contents[call["tool_name"]]}
        for call in calls
    ]
    if not answer.as_turn:
        return await engine.answer(turn, responses)
    return await engine.ask(Ask([{**response, "role": "tool"} for response in responses]))


def messages_of(ask: Ask) -> list[Json]:
    """A user's message, or the tool messages that a client before 0.1.6 answers with."""
    if isinstance(ask.text, list) and "role" in ask.text[0]:
        return [{key: one[key] for key in ("role", "call_id", "content")} for one in ask.text]
    return [{"role": "user", "content": ask.text}]


class Reference:
    """llama_stack's `ChatAgent`, one for each leg, over a storage in memory. It is the storage itself."""

    def __init__(self, script: Script, world: World) -> None:
        self._config = AgentConfig(**{"model": "scripted", "instructions": "", **script.agent})
        self._world = world
        self._session_id = str(uuid.uuid4())
        self._turns: dict[str, Turn] = {}
        self._in_progress: dict[str, Any] = {}
        self._iterations: dict[str, int] = {}

    async def ask(self, ask: Ask) -> Leg:
        common = {"agent_id": "agent", "session_id": self._session_id, "messages": messages_of(ask), "stream": True}
        more = {"documents": list(ask.documents) or None, "toolgroups": list(ask.toolgroups) or None}
        chosen = {"tool_config": ask.tool_config} if ask.tool_config else {}
        request = AgentTurnCreateRequest(**common, **more, **chosen)
        return await self._collect(self._agent().create_and_execute_turn(request))

    async def answer(self, turn: Json, responses: list[Json]) -> Leg:
        request = AgentTurnResumeRequest(
            agent_id="agent",
            session_id=self._session_id,
            turn_id=turn["turn_id"],
            tool_responses=responses,
            stream=True,
        )
        return await self._collect(self._agent().resume_turn(request))

    def _agent(self) -> Any:
        world = self._world
        apis = {"inference_api": world.inference, "tool_runtime_api": world, "tool_groups_api": world}
        agent = ChatAgent(
            agent_id="agent",
            agent_config=self._config,
            safety_api=world.their_safety,
            vector_io_api=None,
            persistence_store=None,
            created_at="",
            policy=[],
            **apis,
        )
        agent.storage = self
        return agent

    async def _collect(self, stream: Any) -> Leg:
        leg = Leg()
        try:
            async for chunk in stream:
                leg.events.append(json.loads(chunk.model_dump_json()))
        except AssertionError:  # its own doubt about itself is no failure of the model
            raise
        except Exception:
            leg.failed = True
        return leg

    # What ChatAgent asks of its storage

    async def get_session_info(self, session_id: str) -> AgentSessionInfo:
        return AgentSessionInfo(session_id=session_id, session_name="", turns=[], started_at=datetime.now(UTC))

    async def get_session_turns(self, session_id: str) -> list[Turn]:
        return [turn.model_copy(deep=True) for turn in self._turns.values()]

    async def add_turn_to_session(self, session_id: str, turn: Turn) -> None:
        self._turns[turn.turn_id] = turn.model_copy(deep=True)

    async def get_in_progress_tool_call_step(self, session_id: str, turn_id: str) -> Any:
        return self._in_progress.get(turn_id)

    async def set_in_progress_tool_call_step(self, session_id: str, turn_id: str, step: Any) -> None:
        self._in_progress[turn_id] = step

    async def get_num_infer_iters_in_turn(self, session_id: str, turn_id: str) -> int:
        return self._iterations.get(turn_id, 0)

    async def set_num_infer_iters_in_turn(self, session_id: str, turn_id: str, count: int) -> None:
        self._iterations[turn_id] = count


class Ours:
    """Our engine: turns accepted and claimed in Postgres, attempts run with a log in Redis, events read back."""

    def __init__(self, script: Script, world: World, tools: Tools) -> None:
        self._seeds = Seeds(tools.store)
        self._tools = tools
        self._session_id = self._seeds.session(self._seeds.agent(**script.agent))
        self._worker_id = self._seeds.worker(600)

    async def ask(self, ask: Ask) -> Leg:
        return await self._run(self.accept(ask), START)

    def accept(self, ask: Ask) -> str:
        given = {"documents": list(ask.documents), "toolgroups": list(ask.toolgroups), "tool_config": ask.tool_config}
        return self._seeds.turn(self._session_id, messages=_stored(messages_of(ask)), **given)

    async def answer(self, turn: Json, responses: list[Json]) -> Leg:
        stored = [{**response, "metadata": None} for response in responses]
        after = self._seeds.resume(turn["turn_id"], self._session_id, stored).after
        return await self._run(turn["turn_id"], after)

    async def _run(self, turn_id: str, after: Any) -> Leg:
        await self.attempt(turn_id).run()
        events = self._seeds.events(turn_id, after)
        failed = events[-1].kind == EventKind.ERROR
        return Leg([json.loads(event.data) for event in events[: len(events) - failed]], failed)

    def claim(self, turn_id: str) -> Claim:
        return self._seeds.claimed(turn_id, self._worker_id)

    def attempt(self, turn_id: str) -> Attempt:
        return AgentTurn(self._tools, self.claim(turn_id))

    def events(self, turn_id: str) -> list[Event]:
        return self._seeds.events(turn_id)

    @property
    def seeds(self) -> Seeds:
        return self._seeds


def _stored(messages: list[Json]) -> list[Json]:
    """As the API stores them."""
    kinds = {"user": UserMessage, "tool": ToolResponseMessage}
    return [kinds[message["role"]](**message).model_dump(mode="json") for message in messages]


def engine_tools(store: Store, log: EventLog, world: World, **settings: Any) -> Tools:
    """What an attempt works with, over the shared world in place of a Llama Stack."""
    chosen = Settings(_env_file=None, database_url="postgresql://unused", inference_model="scripted", **settings)
    stack = cast(LlamaStack, world)
    return Tools(chosen, store, log, stack, Sandbox(Limits.of(chosen), 1), lambda: True)
