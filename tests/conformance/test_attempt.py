"""An attempt is stopped, lost or taken over: the turn goes on where it was, or ends, and never hangs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import pytest
from llama_stack.apis.inference import ToolCall
from sqlalchemy.engine import make_url

from app.api.service import StoreRecords
from app.domain.errors import Unavailable
from app.domain.events import START, TERMINAL, Event, EventId, EventKind
from app.domain.turns import TurnStatus
from app.events.follow import Relay
from app.events.log import AppendOutcome, EventLog
from app.stack import code_interpreter
from app.store import Store, claims, session_files
from app.store.claims import Claim
from tasks.engine.agent_turn import AgentTurn
from tasks.engine.attempt import Attempt, Tools
from tests.conformance.engines import Ours, engine_tools
from tests.conformance.scripts import ASK_USER, Ask, Script
from tests.conformance.world import World
from tests.integration.store.seeds import Seeds
from tests.support import wait_until
from tests.support.scripted_model import ScriptedModel

ADD = 'CALL add {"a": 1, "b": 2}'
CODE = 'CALL code_interpreter {"code": "1"} | SAY done'
SECONDS = 60


def ours(tools: Tools, world: World, **agent: Any) -> Ours:
    return Ours(Script((), {"toolgroups": ["calc", "slow"], **agent}), world, tools)


async def held(model: ScriptedModel, name: str) -> None:
    await asyncio.to_thread(model.wait_held, name)


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


async def outcome(attempt: Attempt) -> str:
    async with asyncio.timeout(SECONDS):
        return await attempt.run()


def kinds(events: list[Event]) -> list[EventKind]:
    return [event.kind for event in events]


def assert_contiguous(events: list[Event]) -> None:
    """Each event follows the one before it, and no id comes twice."""
    assert [event.after for event in events] == [START, *(event.id for event in events[:-1])]
    assert len({event.id for event in events}) == len(events)


async def test_replay_equals_live_byte_for_byte(tools: Tools, world: World, log: EventLog) -> None:
    """A stream from the first event on, and one of the ended turn, over the real log and the real store."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask(f"PART let me see | {ADD} | UNICODE"))
    async with Relay(log, StoreRecords(tools.store), silence_seconds=1, buffer_bytes=1_000_000) as relay:
        live = asyncio.create_task(wire(relay, turn_id))
        await until(lambda: relay.streams)
        assert await outcome(engine.attempt(turn_id)) == "completed"
        recorded = engine.events(turn_id)
        assert_contiguous(recorded)
        assert await live == await wire(relay, turn_id) == b"".join(event.sse() for event in recorded)


async def wire(relay: Relay, turn_id: str) -> bytes:
    async with asyncio.timeout(SECONDS):
        batches = [batch async for batch in relay.follow(turn_id, START, through_legs=False)]
    return b"".join(event.sse() for batch in batches for event in batch)


async def test_a_drained_turn_goes_on_with_the_tools_that_were_asked_for(
    tools: Tools, world: World, model: ScriptedModel
) -> None:
    """Handed over behind the inference that asked: nobody had called the tool yet, so its outcome is not unknown."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask(f"HOLD drain | {ADD} | SAY done"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await held(model, "drain")
    attempt.hand_over()
    model.release("drain")
    assert await running == "handed over"
    assert engine.seeds.row(turn_id).status == TurnStatus.QUEUED
    assert engine.seeds.column(turn_id, "failures") == 0
    assert await outcome(engine.attempt(turn_id)) == "completed"
    assert_contiguous(engine.events(turn_id))
    assert [step["step_type"] for step in engine.seeds.row(turn_id).steps] == [
        "inference",
        "tool_execution",
        "inference",
    ]
    assert engine.seeds.row(turn_id).steps[1]["tool_responses"][0]["content"] == "3"
    assert len(world.called("add")) == 1


async def test_a_turn_handed_over_at_once_asks_the_model_again(
    tools: Tools, world: World, model: ScriptedModel
) -> None:
    """What was streamed stays in the log; the new attempt opens a step of its own; the turn holds only that."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask("PART some | HOLD now | SAY words"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await held(model, "now")
    attempt.hand_over(now=True)
    assert await running == "handed over"
    model.release("now")
    assert await outcome(engine.attempt(turn_id)) == "completed"
    events = engine.events(turn_id)
    assert_contiguous(events)
    assert kinds(events).count(EventKind.STEP_START) == 2
    [step] = engine.seeds.row(turn_id).steps
    assert step["model_response"]["content"] == "some words "


async def test_a_hand_over_outlasts_an_outage_of_postgres(
    store: Store, log: EventLog, world: World, model: ScriptedModel
) -> None:
    """The turn is put back once Postgres answers; it does not fail."""
    flaky = Flaky(store)
    engine = ours(engine_tools(flaky, log, world), world)
    turn_id = engine.accept(Ask(f"HOLD outage | {ADD} | SAY done"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await held(model, "outage")
    flaky.fail_next(claims.hand_over)
    attempt.hand_over()
    model.release("outage")
    await running
    assert engine.seeds.row(turn_id).error is None
    assert engine.seeds.row(turn_id).status == TurnStatus.QUEUED


class Flaky(Store):
    """A store whose next call of one query finds Postgres down."""

    def __init__(self, store: Store) -> None:
        super().__init__(make_url(store.engine.url), pool_size=4, name="flaky")
        self._failing: list[Any] = []

    def fail_next(self, query: Any) -> None:
        self._failing.append(query)

    def transact(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        if query in self._failing:
            self._failing.remove(query)
            raise Unavailable("Postgres is not available")
        return super().transact(query, *args, **kwargs)


async def test_recording_outlasts_an_outage_of_postgres(store: Store, log: EventLog, world: World) -> None:
    """Each step is recorded once Postgres answers; the client sees nothing of it."""
    flaky = Flaky(store)
    engine = ours(engine_tools(flaky, log, world), world)
    turn_id = engine.accept(Ask(f"{ADD} | SAY done"))
    for _ in range(2):
        flaky.fail_next(claims.record)
    assert await outcome(engine.attempt(turn_id)) == "completed"
    assert_contiguous(engine.events(turn_id))
    assert len(world.called("add")) == 1


async def test_the_folder_of_code_outlasts_an_outage_of_postgres(store: Store, log: EventLog, world: World) -> None:
    """Looking at it for the turn's documents, and reading it for a call, wait until Postgres answers."""
    flaky = Flaky(store)
    engine = ours(engine_tools(flaky, log, world), world, toolgroups=[code_interpreter.TOOLGROUP])
    document = {"content": "a,b", "mime_type": "text/csv"}
    turn_id = engine.accept(Ask(CODE, documents=(document,)))
    for query in (session_files.sizes, session_files.folder):
        flaky.fail_next(query)
    assert await outcome(engine.attempt(turn_id)) == "completed"
    [response] = engine.seeds.row(turn_id).steps[1]["tool_responses"]
    assert "Postgres" not in response["content"]


@pytest.mark.parametrize("script", ["HOLD stop | SAY x", "PART some words | HOLD stop | SAY x", "CALL wait | SAY x"])
async def test_a_cancelled_turn_ends_at_once(tools: Tools, world: World, model: ScriptedModel, script: str) -> None:
    """In the model's silence, in mid-stream or in a tool: a terminal event, and the connection to the model closed."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask(script))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    if "HOLD" in script:
        await held(model, "stop")
    else:
        await until(lambda: world.called("wait"))
    attempt.cancel()
    attempt.cancel()
    assert await running == "cancelled"
    assert engine.seeds.row(turn_id).status == TurnStatus.CANCELLED
    events = engine.events(turn_id)
    assert_contiguous(events)
    assert json.loads(events[-1].data)["error"]["code"] == "cancelled"
    await until(lambda: model.open_streams() == 0)


async def test_a_turn_past_its_deadline_timed_out(tools: Tools, world: World, model: ScriptedModel) -> None:
    """The heartbeat stops it like a cancelled one, by Postgres's clock; the error says why."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask("HOLD late | SAY x"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await held(model, "late")
    attempt.expire()
    assert await running == "failed"
    assert (engine.seeds.row(turn_id).error or {})["code"] == "turn_timeout"


class SlowLog(EventLog):
    """A log whose Redis does not answer when the fence is raised."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def raise_fence(self, turn_id: str, fence: int, last: EventId, **more: Any) -> list[Event] | None:
        self.asked.set()
        await self.answer.wait()
        return await super().raise_fence(turn_id, fence, last, **more)


@pytest.fixture
async def slow_log(redis_url: str) -> AsyncIterator[SlowLog]:
    opened = SlowLog(redis_url)
    yield opened
    await opened.close()


async def test_a_turn_cancelled_while_it_is_taken_over_ends(store: Store, slow_log: SlowLog, world: World) -> None:
    """Redis hangs as the attempt begins: nobody else will ever end the turn of a live worker."""
    engine = ours(engine_tools(store, slow_log, world), world)
    turn_id = engine.accept(Ask("SAY x"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await slow_log.asked.wait()
    attempt.cancel()
    slow_log.answer.set()
    await running
    assert engine.seeds.row(turn_id).status == TurnStatus.CANCELLED


async def test_a_turn_handed_over_while_it_is_taken_over_is_queued(
    store: Store, slow_log: SlowLog, world: World
) -> None:
    """The worker stops at this very moment: another may have the turn at once."""
    engine = ours(engine_tools(store, slow_log, world), world)
    turn_id = engine.accept(Ask("SAY x"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await slow_log.asked.wait()
    attempt.hand_over(now=True)
    slow_log.answer.set()
    assert await running == "handed over"
    assert engine.seeds.row(turn_id).status == TurnStatus.QUEUED


class StuckLog(EventLog):
    """A log whose Redis does not answer when a terminal event is appended."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def append(self, turn_id: str, fence: int, events: Sequence[Event], **more: Any) -> AppendOutcome:
        if any(event.kind in TERMINAL for event in events):
            self.asked.set()
            await self.answer.wait()
        return await super().append(turn_id, fence, events, **more)


@pytest.fixture
async def stuck_log(redis_url: str) -> AsyncIterator[StuckLog]:
    opened = StuckLog(redis_url)
    yield opened
    await opened.close()


STOPS = [Attempt.cancel, Attempt.expire, Attempt.drop, partial(Attempt.hand_over, now=True)]


@pytest.mark.parametrize("stop", STOPS, ids=["cancel", "expire", "drop", "hand over"])
async def test_a_stop_that_comes_behind_the_end_changes_nothing(
    store: Store, stuck_log: StuckLog, world: World, stop: Callable[[Attempt], None]
) -> None:
    """The turn is completed, and Redis is slow to take its last event: the outcome is told, the event published, and no
    task stays behind."""
    engine = ours(engine_tools(store, stuck_log, world), world)
    turn_id = engine.accept(Ask("SAY x"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await stuck_log.asked.wait()
    stop(attempt)
    await asyncio.sleep(0)
    stuck_log.answer.set()
    assert await running == "completed"
    assert engine.seeds.row(turn_id).status == TurnStatus.COMPLETED
    assert (await stuck_log.read(turn_id, START)).last == engine.events(turn_id)[-1].id
    assert not [task for task in asyncio.all_tasks() if turn_id in task.get_name()]


class HeldStore(Store):
    """A store whose transactions of one kind are committed, and their callers told only when they may be."""

    def __init__(self, store: Store, holds: Callable[[Any, dict[str, Any]], bool]) -> None:
        super().__init__(make_url(store.engine.url), pool_size=4, name="held")
        self._holds = holds
        self.committed, self.tell = threading.Event(), threading.Event()

    def transact(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        done = super().transact(query, *args, **kwargs)
        if self._holds(query, kwargs):
            self.committed.set()
            assert self.tell.wait(SECONDS)
        return done


@pytest.mark.parametrize("stop", STOPS, ids=["cancel", "expire", "drop", "hand over"])
@pytest.mark.parametrize("ending", ["completed", "handed over"])
async def test_a_stop_that_comes_with_the_end_changes_nothing(
    store: Store, log: EventLog, world: World, model: ScriptedModel, stop: Callable[[Attempt], None], ending: str
) -> None:
    """The end, or the hand-over, is committed, and the attempt does not know it yet: it still tells its worker, which
    rings the turn that was handed over, or the session's next one."""
    if ending == "completed":
        held_store = HeldStore(store, lambda query, what: query is claims.record and "end" in what)
    else:
        held_store = HeldStore(store, lambda query, what: query is claims.hand_over)
    engine = ours(engine_tools(held_store, log, world), world)
    turn_id = engine.accept(Ask(f"HOLD so | {ADD} | SAY x"))
    behind = engine.accept(Ask("SAY next"))
    attempt = engine.attempt(turn_id)
    running = asyncio.create_task(outcome(attempt))
    await held(model, "so")
    if ending == "handed over":
        attempt.hand_over()
    model.release("so")
    await until(held_store.committed.is_set)
    stop(attempt)
    await asyncio.sleep(0)
    held_store.tell.set()
    assert await running == ending
    assert attempt.following == (behind if ending == "completed" else None)
    held_store.close()


async def crash(attempt: Attempt, running: asyncio.Task[str]) -> None:
    """The process dies: nothing more is written. (`drop` is as near as one process can come.)"""
    attempt.drop()
    assert await running == "lost"


def reaped(engine: Ours, claim: Claim) -> None:
    engine.seeds.lose_worker(claim)
    engine._worker_id = engine.seeds.worker(600)


async def test_a_dead_workers_steps_are_not_made_again(tools: Tools, world: World, model: ScriptedModel) -> None:
    """The next attempt goes on after the last recorded step; what clients saw of the unfinished one stays."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask(f"{ADD} | PART some | HOLD dead | SAY words"))
    claim = engine.claim(turn_id)
    attempt = AgentTurn(tools, claim)
    running = asyncio.create_task(outcome(attempt))
    await held(model, "dead")
    await crash(attempt, running)
    reaped(engine, claim)
    model.release("dead")
    asked = len(model.requests())
    assert await outcome(engine.attempt(turn_id)) == "completed"
    assert len(model.requests()) == asked + 1
    assert len(world.called("add")) == 1
    events = engine.events(turn_id)
    assert_contiguous(events)
    assert {event.id.fence for event in events} == {1, 3}
    assert [event.id.n for event in events] == list(range(1, len(events) + 1))


async def test_a_call_in_flight_when_its_worker_died_is_not_made_again(
    tools: Tools, world: World, model: ScriptedModel
) -> None:
    """It may have had an effect: the model is told that its outcome is unknown. Results that came are kept."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask(f"CALL wait & {ADD} | SAY done"))
    claim = engine.claim(turn_id)
    attempt = AgentTurn(tools, claim)
    running = asyncio.create_task(outcome(attempt))
    stored = "SELECT count(*) FROM tool_calls WHERE turn_id = :id AND result::text <> 'null'"
    await until(lambda: engine.seeds.scalar(stored, id=turn_id))
    await crash(attempt, running)
    reaped(engine, claim)
    assert await outcome(engine.attempt(turn_id)) == "completed"
    responses = [step["tool_responses"][0]["content"] for step in engine.seeds.row(turn_id).steps[1:3]]
    assert "unknown" in responses[0]
    assert responses[1] == "3"
    assert [len(world.called(name)) for name in ("wait", "add")] == [1, 1]


async def test_a_drain_does_not_forget_a_call_that_was_in_flight_when_an_earlier_worker_died(
    tools: Tools, world: World, model: ScriptedModel
) -> None:
    """The attempt in between made no call; the one before it did, and it may have had an effect."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask("CALL wait | SAY done"))
    claim = engine.claim(turn_id)
    attempt = AgentTurn(tools, claim)
    running = asyncio.create_task(outcome(attempt))
    await until(lambda: world.called("wait"))
    await crash(attempt, running)
    reaped(engine, claim)
    between = engine.attempt(turn_id)
    between.hand_over()
    assert await outcome(between) == "handed over"
    world.let_go.set()
    assert await outcome(engine.attempt(turn_id)) == "completed"
    assert len(world.called("wait")) == 1
    assert "unknown" in engine.seeds.row(turn_id).steps[1]["tool_responses"][0]["content"]


async def test_parallel_calls_run_at_once_and_are_recorded_in_order(tools: Tools, world: World) -> None:
    """The second is done first; its step still comes second."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask(f"CALL wait & {ADD} | SAY done"))
    running = asyncio.create_task(outcome(engine.attempt(turn_id)))
    await until(lambda: world.called("add"))
    world.let_go.set()
    assert await running == "completed"
    steps = engine.seeds.row(turn_id).steps
    assert [step["tool_calls"][0]["tool_name"] for step in steps[1:3]] == ["wait", "add"]


async def test_an_attempt_that_lost_its_turn_writes_nothing_more(
    tools: Tools, world: World, model: ScriptedModel, seeds: Seeds
) -> None:
    """A stopped-and-continued worker comes back: the turn and its log are its successor's."""
    engine = ours(tools, world)
    turn_id = engine.accept(Ask("PART some | HOLD stopped | SAY words"))
    claim = engine.claim(turn_id)
    running = asyncio.create_task(outcome(AgentTurn(tools, claim)))
    await held(model, "stopped")
    reaped(engine, claim)
    successor = asyncio.create_task(outcome(engine.attempt(turn_id)))
    await asyncio.to_thread(model.wait_held, "stopped", 2)
    model.release("stopped")
    assert await successor == "completed"
    assert await running == "lost"
    events = engine.events(turn_id)
    assert_contiguous(events)
    assert kinds(events).count(EventKind.TURN_COMPLETE) == 1


@pytest.fixture
def seeds(store: Store) -> Seeds:
    return Seeds(store)


@pytest.mark.parametrize("name", ["ask_user", "code_interpreter", "wolfram_alpha"])
async def test_a_client_tool_may_have_any_name(tools: Tools, world: World, name: str) -> None:
    """Also one that llama_stack knows as a builtin tool: its call awaits input."""
    engine = ours(tools, world, client_tools=[{**ASK_USER, "name": name}])
    turn_id = engine.accept(Ask(f"CALL {name} | SAY done"))
    assert await outcome(engine.attempt(turn_id)) == "awaiting_input"


async def test_events_name_a_builtin_tool_as_the_model_did(tools: Tools, world: World) -> None:
    """llama_stack's type makes an enumeration of such a name."""
    assert ToolCall(call_id="c", tool_name="code_interpreter", arguments="{}").tool_name != "code_interpreter"
    engine = ours(tools, world)
    turn_id = engine.accept(Ask("CALL code_interpreter | SAY done"))
    await outcome(engine.attempt(turn_id))
    [response] = engine.seeds.row(turn_id).steps[1]["tool_responses"]
    assert response["tool_name"] == "code_interpreter"
    assert "BuiltinTool" not in response["content"]
