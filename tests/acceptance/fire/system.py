"""A system of real processes that tests may kill, stop and starve, and clients that watch it through HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from app.dispatch import QUEUE
from app.domain.events import EventId
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.mcp_server import McpServer
from tests.support.nodes import Process, web_process, worker_process
from tests.support.scripted_model import ScriptedModel


@dataclass(frozen=True)
class Heard:
    """One event as a client got it: when (monotonic seconds), its id, its whole block of bytes."""

    at: float
    id: EventId
    block: bytes

    @property
    def payload(self) -> dict[str, Any]:
        data = json.loads(self.block.partition(b"data: ")[2])
        payload: dict[str, Any] = data["event"]["payload"] if "event" in data else {"event_type": "error", **data}
        return payload

    @property
    def kind(self) -> str:
        return str(self.payload["event_type"])


class Stream(threading.Thread):
    """A client that reads one stream to its end, in a thread; `heard` grows meanwhile."""

    def __init__(self, method: str, url: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(daemon=True)
        self._request: dict[str, Any] = {"method": method, "url": url, "json": body}
        self.heard: list[Heard] = []
        self.turn_id = ""
        self.problem: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream(**self._request, timeout=PATIENCE_SECONDS) as answer:
                answer.raise_for_status()
                self.turn_id = answer.headers.get("x-turn-id", "")
                self._read(answer)
        except Exception as problem:
            self.problem = problem

    def _read(self, answer: httpx.Response) -> None:
        rest = b""
        for data in answer.iter_bytes():
            *blocks, rest = (rest + data).replace(b": ping\n", b"").split(b"\n\n")
            for block in blocks:
                identifier = block.partition(b"\n")[0].removeprefix(b"id: ").decode()
                self.heard.append(Heard(time.monotonic(), EventId.parse(identifier), block))

    def wait_for(self, count: int, timeout: float = PATIENCE_SECONDS) -> None:
        """Until so many events were heard."""
        wait_until(lambda: len(self.heard) >= count or not self.is_alive(), timeout)
        assert len(self.heard) >= count, (self.problem, self.kinds)

    def wait_attempt(self, fence: int, timeout: float = PATIENCE_SECONDS) -> float:
        """When (monotonic seconds) the first event came of this attempt or a later one. With short settings 5 s are
        promised, on a quiet machine: what holds of the time on any is in test_defaults.py."""
        wait_until(lambda: any(each.id.fence >= fence for each in list(self.heard)), timeout)
        return next(each.at for each in self.heard if each.id.fence >= fence)

    def ended(self, timeout: float = PATIENCE_SECONDS) -> list[Heard]:
        """All events, once the stream has ended, orderly."""
        self.join(timeout)
        assert not self.is_alive(), f"the stream has not ended: {self.kinds}"
        if self.problem:
            raise self.problem
        return self.heard

    @property
    def kinds(self) -> list[str]:
        return [each.kind for each in self.heard]

    @property
    def fences(self) -> list[int]:
        """Each attempt that was heard of, in order."""
        return list(dict.fromkeys(each.id.fence for each in self.heard))


@dataclass(frozen=True)
class Session:
    """A session of an agent of its own, on one web process."""

    url: str

    def post(self, script: str, **more: Any) -> Stream:
        """Creates a turn; its stream, which has not begun yet perhaps."""
        body = {"messages": [{"role": "user", "content": script}], "stream": True, **more}
        return Stream("POST", f"{self.url}/turn", body)

    def accepted(self, script: str, **more: Any) -> Stream:
        """As `post`, once the turn's id is known."""
        stream = self.post(script, **more)
        wait_until(lambda: stream.turn_id or not stream.is_alive(), PATIENCE_SECONDS)
        assert stream.turn_id, stream.problem
        return stream

    def turn(self, turn_id: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/turn/{turn_id}", timeout=60)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def status(self, turn_id: str) -> str:
        return str(httpx.get(f"{self.url}/turn/{turn_id}", timeout=60).headers["x-turn-status"])

    def owner(self, turn_id: str) -> int:
        """The process id of the worker process that runs the turn, or ran it last."""
        return int(httpx.get(f"{self.url}/turn/{turn_id}", timeout=60).headers["x-caravan-worker"].rpartition(":")[2])

    def replay(self, turn_id: str) -> list[Heard]:
        return Stream("GET", f"{self.url}/turn/{turn_id}/events").ended()

    def history(self) -> list[tuple[str, Any]]:
        """What the next turn tells the model: (role, content) of each message but the system's and its own."""
        said = self.post("HISTORY").ended()[-1].payload["turn"]["output_message"]["content"]
        return [(message["role"], message["content"]) for message in json.loads(said)[1:-1]]


@dataclass
class System:
    """Web processes and workers, these by name, with the settings `env`; a worker may have others of its own."""

    env: Mapping[str, str]
    logs: Path
    env_of_worker: dict[str, Mapping[str, str]] = field(default_factory=dict)
    pool: Sequence[str] = ()
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of workers whose pool is not `pool`."""
    urls: list[str] = field(default_factory=list)
    webs: list[Process] = field(default_factory=list)
    workers: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        url = make_url(self.env["DATABASE_URL"]).set(drivername="postgresql+psycopg2")
        self.engine = create_engine(url, pool_pre_ping=True)

    def start_webs(self, count: int) -> None:
        for number in range(1, count + 1):
            url, web = web_process(self.env, self.logs / f"web-{number}.log")
            web.start()
            self.urls.append(url)
            self.webs.append(web)
        for web in self.webs:
            web.wait_ready()

    def start_workers(self, *names: str) -> None:
        """Starts those that do not run, and returns when all are ready."""
        for name in names:
            if name not in self.workers or not self.workers[name].running():
                pool = self.pools.get(name, self.pool)
                log = self.logs / f"{pool[0].strip('-')}-{name}.log"
                env = {**self.env, **self.env_of_worker.get(name, {})}
                self.workers[name] = worker_process(pool, env, log, name=name)
                self.workers[name].start()
        for name in names:
            self.workers[name].wait_ready()

    def stop_workers(self) -> None:
        for worker in self.workers.values():
            worker.kill_all()
        self.workers.clear()

    def stop(self) -> None:
        self.stop_workers()
        for web in self.webs:
            web.stop()
        self.engine.dispose()

    def session(self, web: int = 0, **config: Any) -> Session:
        """A new agent with a new session, used through this web process."""
        base = f"{self.urls[web]}/v1/agents"
        fields = {"model": "scripted", "instructions": "You are helpful", **config}
        agent = httpx.post(base, json={"agent_config": fields}, timeout=60).json()["agent_id"]
        made = httpx.post(f"{base}/{agent}/session", json={"session_name": "fire"}, timeout=60).json()
        return Session(f"{base}/{agent}/session/{made['session_id']}")

    def elsewhere(self, session: Session, web: int = 1) -> Session:
        """The same session, seen through another web process."""
        return Session(self.urls[web] + session.url[session.url.index("/v1/") :])

    def toolgroup(self, server: McpServer) -> str:
        """Registers an MCP server's tools; the toolgroup's id."""
        group = f"mcp::{uuid.uuid4().hex[:8]}"
        body = {
            "provider_id": "model-context-protocol",
            "toolgroup_id": group,
            "mcp_endpoint": {"uri": server.url},
        }
        httpx.post(f"{self.urls[0]}/v1/toolgroups", json=body, timeout=60).raise_for_status()
        return group

    def shield(self, model: str) -> str:
        """Registers a Llama Guard with this model; the shield's id."""
        shield = f"guard-{uuid.uuid4().hex[:8]}"
        body = {"shield_id": shield, "provider_id": "llama-guard", "provider_shield_id": model}
        httpx.post(f"{self.urls[0]}/v1/shields", json=body, timeout=60).raise_for_status()
        return shield

    def stop_consuming(self, name: str) -> None:
        """`celery control cancel_consumer`: this worker takes no more doorbells."""
        self._control("cancel_consumer", name)

    def consume(self, name: str) -> None:
        self._control("add_consumer", name)

    def revoke(self, task: str) -> None:
        """`celery control revoke` with `--terminate`, of all workers."""
        for name in self.workers:
            self._control("revoke", name, task, terminate=True)

    def _control(self, command: str, name: str, argument: str = QUEUE, **options: object) -> None:
        """Asks until the worker answers: one that has just started or lost its connection does not hear everything."""
        celery, destination = Celery(broker=self.env["REDIS_URL"]), [f"{name}@{socket.gethostname()}"]

        def answered() -> Any:
            with celery.connection_for_write() as connection:  # a new one: those of a pool may have been cut
                ask = getattr(celery.control, command)
                return ask(argument, destination=destination, reply=True, timeout=1, connection=connection, **options)

        wait_until(answered, PATIENCE_SECONDS)

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(text(query), values)]

    def execute(self, statement: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def records(self, turn_id: str) -> list[list[dict[str, Any]]]:
        """All that Postgres has of a turn."""
        return [
            self.rows(f"SELECT * FROM {table} WHERE turn_id = :turn_id ORDER BY {order}", turn_id=turn_id)
            for table, order in (
                ("turns", "1"),
                ("journal", "ordinal"),
                ("tool_calls", "ordinal, index"),
                ("event_segments", "last_fence, last_n"),
            )
        ]


def signal_group(process: Process, number: signal.Signals) -> None:
    """Signals a worker and all its children at once."""
    os.killpg(process.pid, number)


def check_stream(heard: Sequence[Heard]) -> None:
    """Event ids grow, in attempt and in number, so none comes twice; the last event ends the leg, and only it does."""
    ids = [each.id for each in heard]
    assert all(a.fence <= b.fence and a.n < b.n for a, b in pairwise(ids)), ids
    ends = ("turn_complete", "turn_awaiting_input", "error")
    assert [each.kind in ends for each in heard] == [*[False] * (len(heard) - 1), True], [each.kind for each in heard]


def _ids(heard: Iterable[Heard]) -> str:
    return " ".join(f"{each.id}" for each in heard)


def blocks(heard: Iterable[Heard]) -> list[bytes]:
    return [each.block for each in heard]


def steps_completed(heard: Iterable[Heard]) -> list[str]:
    return [each.payload["step_details"]["step_id"] for each in heard if each.kind == "step_complete"]


def check_turn(session: Session, stream: Stream, *, lost_from_replay: Sequence[Heard] = ()) -> dict[str, Any]:
    """The stream is sound, and equals the replay, but for what may be lost from it; the stored turn is the one that it
    ended with; each of its steps is there once, was completed once, and no other was. Gives the turn."""
    heard = stream.ended()
    check_stream(heard)
    lost = {each.id for each in lost_from_replay}
    replay, kept = session.replay(stream.turn_id), [each for each in heard if each.id not in lost]
    assert blocks(replay) == blocks(kept), f"replayed {_ids(replay)}, heard {_ids(kept)}"
    turn = session.turn(stream.turn_id)
    assert heard[-1].payload["turn"] == turn
    steps = [step["step_id"] for step in turn["steps"]]
    assert len(set(steps)) == len(steps)
    assert steps_completed(heard) == steps
    return turn


def requests_of(model: ScriptedModel, script: str) -> list[dict[str, Any]]:
    """The requests that a turn with this script made."""
    return [request for request in model.requests() if _script(request["body"]["messages"]) == script]


def _script(messages: list[dict[str, Any]]) -> Any:
    content = [message["content"] for message in messages if message["role"] == "user"][-1]
    return content if isinstance(content, str) else content[0]["text"]
