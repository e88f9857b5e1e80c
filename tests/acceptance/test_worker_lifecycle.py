"""Workers are told to stop, are killed, and have tasks revoked, in both pools: what becomes of their turns."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from app.dispatch import QUEUE
from app.local.server import free_port
from tests.acceptance.conftest import queue
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import Process, web_process
from tests.support.scripted_model import ScriptedModel

POOLS = {"turn-pool": ("-P", "custom", "--autoscale=50,10"), "prefork": ("--autoscale=3,2",)}

PATIENT = {"LEASE_SECONDS": "60", "HEARTBEAT_SECONDS": "5", "UPKEEP_SECONDS": "60", "DRAIN_SECONDS": "60"}
"""So that nothing but the doorbell of a turn that was handed over can bring it to the next worker in time."""
STREAM_SECONDS = 200.0
ALONE_SECONDS = 100.0
"""A process of its own imports Llama Stack: 4 s of CPU, two of them at once, on a machine with other things to do."""
SOON = 30.0
"""Far below what a lease or a round of upkeep takes then; usually it is some milliseconds."""


@dataclass
class Turn:
    """A turn that was posted; `stream` is the whole body of the answer, once it has ended."""

    url: str
    session: str
    stream: Future[bytes]

    @property
    def headers(self) -> httpx.Headers:
        return httpx.get(self.url, timeout=60).headers

    @property
    def status(self) -> str:
        return self.headers["x-turn-status"]

    @property
    def owner(self) -> int:
        """The process that runs it, or ran it last."""
        return int(self.headers["x-caravan-worker"].rpartition(":")[2])

    @property
    def id(self) -> str:
        return self.url.rpartition("/")[2]

    def end(self) -> dict[str, Any]:
        """The payload of the stream's last event: the whole turn, or an error."""
        last = self.stream.result(STREAM_SECONDS).rpartition(b"data: ")[2]
        event: dict[str, Any] = json.loads(last)
        return event["event"]["payload"] if "event" in event else event

    def answer(self) -> str:
        return str(self.end()["turn"]["output_message"]["content"])

    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.end()["error"]
        return error


@dataclass
class Fleet:
    """A web process on a database of its own, and workers as a test starts and stops them."""

    url: str
    env: dict[str, str]
    logs: Path
    workers: dict[str, list[Process]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.celery = Celery(broker=self.env["REDIS_URL"])
        self.redis = redis.Redis.from_url(self.env["REDIS_URL"])
        self.threads = ThreadPoolExecutor(64)
        self.engine = create_engine(make_url(self.env["DATABASE_URL"]).set(drivername="postgresql+psycopg2"))

    def worker(self, pool: str) -> Process:
        """The one worker that runs: what a test before this one has left, or a new one."""
        left = [worker for worker in self.workers.get(pool, []) if worker.running()]
        if len(left) == 1 and waits_for_messages(self, left[0]):
            return left[0]
        self.stop()
        return self.another_worker(pool)

    def another_worker(self, pool: str, **env: str) -> Process:
        """One more worker, ready."""
        name = f"{pool}-{uuid.uuid4().hex[:6]}"
        custom = {"CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TurnPool"} if pool == "turn-pool" else {}
        command = ["celery", "-A", "tasks", "worker", *POOLS[pool], "-E", "-n", f"{name}@%h"]
        log = self.logs / f"{name}.log"
        worker = Process(name, command, {**self.env, **custom, **env}, log, "ready.")
        worker.start()
        self.workers.setdefault(pool, []).append(worker)
        worker.wait_ready()
        return worker

    def stop(self) -> None:
        for worker in itertools.chain.from_iterable(self.workers.values()):
            worker.kill_all()
        self.workers.clear()
        self.redis.delete(QUEUE)

    def turn(self, script: str, session: str = "", **config: Any) -> Turn:
        """Posted, and accepted."""
        session = session or self.session(**config)
        accepted: Future[str] = Future()
        body = {"messages": [{"role": "user", "content": script}], "stream": True}

        def post() -> bytes:
            with httpx.stream("POST", f"{session}/turn", json=body, timeout=STREAM_SECONDS) as answer:
                accepted.set_result(answer.headers["location"])
                return answer.read().replace(b": ping\n", b"").strip()

        stream = self.threads.submit(post)
        return Turn(self.url + accepted.result(60), session, stream)

    def session(self, **config: Any) -> str:
        agent_config = {"model": "scripted", "instructions": "", **config}
        agent = httpx.post(f"{self.url}/v1/agents", json={"agent_config": agent_config}, timeout=60).json()["agent_id"]
        base = f"{self.url}/v1/agents/{agent}/session"
        return f"{base}/{httpx.post(base, json={'session_name': 'x'}, timeout=60).json()['session_id']}"

    def toolgroup(self, server: McpServer) -> str:
        """Registers an MCP server's tools; the toolgroup's id."""
        group = f"mcp::{uuid.uuid4().hex[:8]}"
        body = {
            "provider_id": "model-context-protocol",
            "toolgroup_id": group,
            "mcp_endpoint": {"uri": server.url},
        }
        httpx.post(f"{self.url}/v1/toolgroups", json=body, timeout=60).raise_for_status()
        return group

    def execute(self, statement: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def failures(self, turn: Turn) -> int:
        """Losses since the last recorded step, which no route tells."""
        with self.engine.connect() as connection:
            query = text("SELECT failures FROM turns WHERE turn_id = :turn")
            return int(connection.execute(query, {"turn": turn.id}).scalar_one())

    def task(self, turn: Turn) -> str:
        """The id of the task that runs a turn."""

        found: list[str] = []

        def look() -> list[str]:
            active = (self.celery.control.inspect(timeout=2).active() or {}).values()
            found.extend(task["id"] for tasks in active for task in tasks if task["args"] == [turn.id])
            return found

        wait_until(look)
        return found[0]


def fleet(env: dict[str, str], logs: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        url, web = web_process(env, logs / "web.log")
        stack.enter_context(web)
        made = Fleet(url, env, logs)
        stack.callback(made.stop)
        yield made


@pytest.fixture(scope="module")
def patient_web(
    environment: dict[str, str], migrated_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    redis_url = queue(environment, 4)
    own = {"DATABASE_URL": migrated_database("caravan_patient"), "REDIS_URL": redis_url, **PATIENT}
    yield from fleet({**environment, **own}, tmp_path_factory.mktemp("patient"))


@pytest.fixture(scope="module")
def hasty_web(
    environment: dict[str, str], migrated_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    redis_url = queue(environment, 10)
    own = {"DATABASE_URL": migrated_database("caravan_hasty"), "REDIS_URL": redis_url}
    yield from fleet({**environment, **own}, tmp_path_factory.mktemp("hasty"))


@pytest.fixture(scope="module", params=list(POOLS))
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def patient(patient_web: Fleet, model: ScriptedModel) -> Fleet:
    """Leases, upkeep and drains take a minute. A worker may be left of an earlier test."""
    return patient_web


@pytest.fixture
def hasty(hasty_web: Fleet, model: ScriptedModel) -> Iterator[Fleet]:
    """Leases and upkeep take a second or two."""
    yield hasty_web
    hasty_web.stop()


@pytest.fixture(scope="module")
def strict_web(
    environment: dict[str, str], migrated_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    redis_url = queue(environment, 6)
    own = {"DATABASE_URL": migrated_database("caravan_strict"), "REDIS_URL": redis_url, "MAX_WORKER_LOSSES": "1"}
    yield from fleet({**environment, **own}, tmp_path_factory.mktemp("strict"))


@pytest.fixture
def strict(strict_web: Fleet, model: ScriptedModel) -> Iterator[Fleet]:
    """As `hasty`, and no turn may lose a worker."""
    yield strict_web
    strict_web.stop()


@pytest.fixture(scope="module")
def mcp_server() -> Iterator[McpServer]:
    with McpServer() as server:
        yield server


@pytest.fixture
def gate() -> str:
    return uuid.uuid4().hex


def stop_by_signal(worker: Process) -> None:
    worker.signal(signal.SIGTERM)


def stop_the_group(worker: Process) -> None:
    """As systemd and honcho do: every process of the worker is signalled."""
    os.killpg(worker.pid, signal.SIGTERM)


def stop_by_control(worker: Process) -> None:
    Celery(broker=worker.env["REDIS_URL"]).control.shutdown(destination=[f"{worker.name}@{socket.gethostname()}"])


STOPS = [stop_by_signal, stop_the_group, stop_by_control]


@pytest.mark.parametrize("stop", [STOPS[0], *(pytest.param(each, marks=pytest.mark.thorough) for each in STOPS[1:])])
def test_a_stopping_worker_hands_over_at_the_end_of_the_step(
    patient: Fleet, model: ScriptedModel, gate: str, pool: str, stop: Callable[[Process], None]
) -> None:
    """It waits for the step and records it, and another worker goes on at once, while the first one still waits for
    another turn's step; nothing is asked of the model twice."""
    first = patient.worker(pool)
    turn, longer = (
        patient.turn(f"PART a | HOLD {number}-{gate} | CALL nothing {{}}\nDELAY 300 | SAY done") for number in range(2)
    )
    for number in range(2):
        model.wait_held(f"{number}-{gate}")
    patient.another_worker(pool)
    before = {turn.owner, longer.owner}
    stop(first)
    wait_until(lambda: "draining: 1 " in first.output() or "draining: 2 " in first.output())
    assert turn.status == "running"
    model.release(f"0-{gate}")
    wait_until(lambda: turn.owner not in before, SOON)
    assert longer.owner in before
    model.release(f"1-{gate}")
    for each in (turn, longer):
        assert each.answer() == "done "
        assert each.owner not in before
        assert patient.failures(each) == 0
    assert len(model.requests()) == 4
    first.wait_ended()
    assert "WorkerLostError" not in first.output()


def test_at_the_drain_deadline_the_step_is_cut_off(
    patient: Fleet, model: ScriptedModel, pool: str, mcp_server: McpServer
) -> None:
    """No other worker is there: the turn waits for one. Of the call in flight nobody knows whether it was made."""
    mcp_server.reset()
    group = patient.toolgroup(mcp_server)
    patient.stop()
    first = patient.another_worker(pool, DRAIN_SECONDS="1")
    turn = patient.turn('CALL slow {"seconds": 600, "text": "x"}', toolgroups=[group])
    wait_until(lambda: mcp_server.calls())
    stop_by_signal(first)
    first.wait_ended()
    assert turn.status == "queued"
    patient.another_worker(pool)
    assert "unknown" in turn.answer()
    assert len(mcp_server.calls()) == 1
    assert patient.failures(turn) == 0


@pytest.mark.thorough
def test_a_cold_shutdown_hands_over_at_once(patient: Fleet, model: ScriptedModel, gate: str, pool: str) -> None:
    """SIGQUIT does not wait for the step, nor for the drain deadline, and the turn is not cancelled."""
    first = patient.worker(pool)
    turn = patient.turn(f"PART a | HOLD {gate} | SAY done")
    model.wait_held(gate)
    patient.another_worker(pool)
    before = turn.owner
    first.signal(signal.SIGQUIT)
    wait_until(lambda: turn.owner != before, SOON)
    model.release(gate)
    assert turn.answer() == "a done "
    assert patient.failures(turn) == 0
    first.wait_ended()


@pytest.mark.parametrize("pool", ["prefork"], indirect=True)
def test_a_child_that_is_told_to_exit_hands_its_turn_over_first(
    patient: Fleet, model: ScriptedModel, gate: str, pool: str
) -> None:
    """Busy or idle, told once or twice: it never dies in mid-turn, and the worker starts another one for it."""
    worker = patient.worker(pool)
    turn = patient.turn(f"PART a | HOLD {gate} | CALL nothing {{}}\nSAY done")
    model.wait_held(gate)
    busy = turn.owner
    idle = set(worker.children()) - {busy}
    for child in (*idle, busy, busy):
        os.kill(child, signal.SIGTERM)
    wait_until(lambda: not idle & set(worker.children()) and len(worker.children()) == 2)
    assert turn.status == "running"
    assert turn.owner == busy
    model.release(gate)
    assert turn.answer() == "done "
    assert turn.owner != busy
    assert patient.failures(turn) == 0
    wait_until(lambda: not psutil.pid_exists(busy))
    assert len(model.requests()) == 2


def test_revoke_terminate_cancels_the_one_turn(patient: Fleet, model: ScriptedModel, gate: str, pool: str) -> None:
    """Whatever the signal asked for: no process ends, its other turns go on, and so does the session."""
    worker = patient.worker(pool)
    it, other = (patient.turn(f'CALL nothing {{"a": 1}}\nPART a | HOLD {gate} | SAY done') for _ in range(2))
    model.wait_held(gate, 2)
    children = set(worker.children())
    patient.celery.control.revoke(patient.task(it), terminate=True, signal="SIGKILL")
    assert it.error()["code"] == "cancelled"
    assert it.status == "cancelled"
    steps = [step["step_type"] for step in httpx.get(it.url, timeout=60).json()["steps"]]
    assert steps == ["inference", "tool_execution"]
    wait_until(lambda: model.held(gate) == 1)
    assert patient.turn("SAY next", it.session).answer() == "next "
    model.release(gate)
    assert other.answer() == "a done "
    assert children <= set(worker.children())


@pytest.mark.thorough
@pytest.mark.parametrize("pool", ["prefork"], indirect=True)
def test_a_task_that_is_revoked_before_it_starts_cancels_its_turn(
    patient: Fleet, model: ScriptedModel, gate: str, pool: str
) -> None:
    """Its message still is in the queue: the worker that gets it drops it, and ends the turn."""
    patient.worker(pool)
    running = [patient.turn(f"HOLD {gate} | SAY done") for _ in range(3)]
    model.wait_held(gate, 3, timeout=60)
    waiting = [patient.turn("SAY never") for _ in range(2)]
    wait_until(lambda: patient.redis.llen(QUEUE) == 2)
    tasks = [json.loads(message)["headers"]["id"] for message in patient.redis.lrange(QUEUE, 0, -1)]
    for task, terminate in zip(tasks, (False, True), strict=True):
        wait_until(partial(patient.celery.control.revoke, task, terminate=terminate, reply=True, timeout=5))
    assert {turn.status for turn in waiting} == {"queued"}
    model.release(gate)
    assert [turn.error()["code"] for turn in waiting] == ["cancelled", "cancelled"]
    assert [turn.answer() for turn in running] == ["done "] * 3


@pytest.mark.thorough
@pytest.mark.parametrize("pool", ["prefork"], indirect=True)
def test_flower_terminates_one_turn(patient: Fleet, model: ScriptedModel, gate: str, pool: str) -> None:
    """Its button asks for the same; then it shows the task as revoked, as it does for a turn cancelled elsewhere."""
    patient.worker(pool)
    command = ["celery", "-A", "tasks", "flower", "--address=127.0.0.1", f"--port={(port := free_port())}"]
    env = {**patient.env, "FLOWER_UNAUTHENTICATED_API": "true"}
    with Process("flower", command, env, patient.logs / "flower.log", "Connected to"):
        api = f"http://127.0.0.1:{port}/api/task"
        turns = [patient.turn(f"PART a | HOLD {gate} | SAY done") for _ in range(2)]
        model.wait_held(gate, 2)
        tasks = [patient.task(turn) for turn in turns]
        answer = httpx.post(f"{api}/revoke/{tasks[0]}?terminate=true", timeout=60)
        assert answer.is_success, answer.text
        httpx.post(f"{turns[1].url}/cancel", timeout=60)
        assert [turn.error()["code"] for turn in turns] == ["cancelled", "cancelled"]
        wait_until(lambda: {state(f"{api}/info/{task}") for task in tasks} == {"REVOKED"})


def state(info: str) -> str:
    """Of a task, as Flower's API knows it."""
    answer = httpx.get(info, timeout=60)
    return str(answer.json()["state"]) if answer.is_success else "unknown"


def waits_for_messages(fleet: Fleet, worker: Process) -> bool:
    """Whether one of the worker's connections to Redis is blocked in BRPOP."""
    if not worker.running():
        return False
    ours = {connection.laddr.port for connection in psutil.Process(worker.pid).net_connections("tcp")}
    blocked = [client["addr"] for client in fleet.redis.client_list() if client["cmd"] == "brpop"]
    return any(int(address.rpartition(":")[2]) in ours for address in blocked)


def is_alone(pid: int, worker: Process) -> bool:
    process = psutil.Process(pid)
    return process.ppid() == worker.pid and "tasks.alone" in process.cmdline()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pool", ["turn-pool"], indirect=True)
def test_a_turn_that_crashes_its_worker_each_time_takes_nobody_with_it(
    hasty: Fleet, model: ScriptedModel, gate: str, pool: str
) -> None:
    """Its last try is in a process of its own, and so is that of each turn that was beside it; theirs complete."""
    worker = hasty.another_worker(pool)
    evil = hasty.turn(f"PART a | HOLD evil-{gate} | SAY never")
    innocent = [hasty.turn(f"PART b | HOLD {gate} | SAY {number}") for number in range(2)]
    for _ in range(2):
        model.wait_held(f"evil-{gate}", timeout=60)
        model.wait_held(gate, 2)
        assert evil.owner == worker.pid
        worker.kill_all()
        wait_until(lambda: model.held(gate) + model.held(f"evil-{gate}") == 0)
        worker.start()
        worker.wait_ready()
    later = hasty.turn(f"PART c | HOLD {gate} | SAY later")
    model.wait_held(gate, 1)
    model.release(gate)
    model.wait_held(f"evil-{gate}", timeout=ALONE_SECONDS)
    alone = evil.owner
    assert is_alone(alone, worker)
    os.kill(alone, signal.SIGKILL)
    error = evil.error()
    assert error["code"] == "worker_lost"
    assert "3 times" in error["message"]
    assert "MAX_WORKER_LOSSES" in error["message"]
    assert later.answer() == "c later "
    assert later.owner == worker.pid
    assert [turn.answer() for turn in innocent] == [f"b {number} " for number in range(2)]
    owners = {turn.owner for turn in innocent}
    assert len(owners) == 2
    assert worker.pid not in owners
    assert hasty.turn("SAY next", evil.session).answer() == "next "
    wait_until(lambda: not worker.children())


@pytest.mark.thorough
def test_with_one_loss_allowed_the_first_one_fails_the_turn(
    strict: Fleet, model: ScriptedModel, gate: str, pool: str
) -> None:
    """MAX_WORKER_LOSSES=1: the first try is in the pool, and nothing is tried again."""
    worker = strict.another_worker(pool)
    turn = strict.turn(f"PART a | HOLD {gate} | SAY never")
    model.wait_held(gate)
    assert turn.owner in {worker.pid, *worker.children()}
    os.kill(turn.owner, signal.SIGKILL)
    error = turn.error()
    assert error["code"] == "worker_lost"
    assert "once (MAX_WORKER_LOSSES)" in error["message"]
    assert len(model.requests()) == 1


@pytest.mark.parametrize("pool", ["turn-pool"], indirect=True)
@pytest.mark.timeout(600)
@pytest.mark.thorough
class TestAProcessOfItsOwn:
    """For a turn that has lost two workers."""

    @pytest.fixture
    def suspected(self, hasty: Fleet, model: ScriptedModel, gate: str, pool: str) -> tuple[Process, Turn]:
        """(A worker, a turn that runs in a process of its own there, in mid-step)."""
        hasty.stop()
        turn = hasty.turn(f"PART a | HOLD {gate} | CALL nothing {{}}\nSAY done")
        hasty.execute("UPDATE turns SET failures = 2 WHERE turn_id = :turn", turn=turn.id)
        worker = hasty.another_worker(pool, DRAIN_SECONDS="1")
        model.wait_held(gate, timeout=ALONE_SECONDS)
        assert is_alone(turn.owner, worker)
        return worker, turn

    def test_its_turn_can_be_cancelled(self, hasty: Fleet, suspected: tuple[Process, Turn]) -> None:
        """By POST …/cancel or by revoking its task, which waits in the worker."""
        worker, turn = suspected
        hasty.celery.control.revoke(hasty.task(turn), terminate=True)
        assert turn.error()["code"] == "cancelled"
        wait_until(lambda: not worker.children())
        assert "its own process" in worker.output()

    def test_it_hands_over_when_its_worker_stops(
        self, hasty: Fleet, suspected: tuple[Process, Turn], gate: str, model: ScriptedModel, pool: str
    ) -> None:
        """Nothing is left behind, and no attempt is lost."""
        worker, turn = suspected
        stop_by_signal(worker)
        worker.wait_ended()
        assert not psutil.pid_exists(turn.owner)
        assert turn.status == "queued"
        assert hasty.failures(turn) == 2
        model.release(gate)
        hasty.another_worker(pool)
        assert turn.answer() == "done "

    def test_it_hands_over_when_its_worker_is_killed(
        self, hasty: Fleet, suspected: tuple[Process, Turn], gate: str, model: ScriptedModel, pool: str
    ) -> None:
        """The same, though nobody tells it."""
        worker, turn = suspected
        alone = turn.owner
        worker.signal(signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(alone))
        assert turn.status == "queued"
        assert hasty.failures(turn) == 2
        model.release(gate)
        hasty.another_worker(pool)
        assert turn.answer() == "done "
