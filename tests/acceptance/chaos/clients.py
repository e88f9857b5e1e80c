"""Clients that behave as a careful program does: a key for each request, and back to the stream after each cut."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from app.domain.events import EventId
from tests.acceptance.fire.system import Heard

LEG_ENDS = ("turn_complete", "turn_awaiting_input", "error")
HUNG_SECONDS = 180.0
"""A turn that nothing is heard of for so long, while the chaos is small, hangs."""

RETRY_SECONDS = 0.2
BUSY = (429, 503)


@dataclass
class Record:
    """One turn as its client saw it."""

    kind: str
    key: str
    path: str
    says: str
    """What the turn ends with if all goes well."""
    turn_id: str = ""
    heard: list[Heard] = field(default_factory=list)
    cuts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def leg_over(self) -> bool:
        return bool(self.heard) and self.heard[-1].kind in LEG_ENDS

    @property
    def last_id(self) -> str:
        return str(self.heard[-1].id) if self.heard else ""


class Client(threading.Thread):
    """Makes one turn after the other in a session of its own, until it is told to stop."""

    def __init__(self, urls: Sequence[str], agent: dict[str, Any], seed: int) -> None:
        super().__init__(daemon=True, name=f"client {seed}")
        self._urls = urls
        self._agent = agent
        self._random = random.Random(seed)
        self.stop_asked = threading.Event()
        self._http = httpx.Client(timeout=httpx.Timeout(30.0, connect=5.0))
        self.session = ""
        self.refused: Counter[str] = Counter()
        """Answers that ask for another try, by status, and by what they say of it."""
        self.records: list[Record] = []

    def run(self) -> None:
        try:
            self.session = self._open()
            while not self.stop_asked.is_set():
                record = self._plan()
                self.records.append(record)
                self._run_turn(record)
        except Exception as problem:
            self._new_problem(f"the client failed: {problem!r}")

    def _new_problem(self, problem: str) -> None:
        if not self.records:
            self.records.append(Record("none", "", "", ""))
        self.records[-1].problems.append(problem)

    def _open(self) -> str:
        agent = self._persistently("/v1/agents", {"agent_config": self._agent})["agent_id"]
        made = self._persistently(f"/v1/agents/{agent}/session", {"session_name": "chaos"})
        return f"/v1/agents/{agent}/session/{made['session_id']}"

    def _persistently(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._until(lambda: self._post(path, body), f"POST {path}")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        answer = self._http.post(self._url(path), json=body)
        if self._is_refused(answer):
            return None
        answer.raise_for_status()
        made: dict[str, Any] = answer.json()
        return made

    def _is_refused(self, answer: httpx.Response) -> bool:
        if answer.status_code not in BUSY:
            return False
        when = "" if "retry-after" in answer.headers else " without Retry-After"
        self.refused[f"{answer.status_code}{when}: {answer.read().decode()}"] += 1
        return True

    def _url(self, path: str) -> str:
        return self._random.choice(self._urls) + path

    def _until[T](self, attempt: Callable[[], T | None], what: str) -> T:
        """Tries again after each refusal or cut. Raises TimeoutError."""
        deadline = time.monotonic() + HUNG_SECONDS
        while time.monotonic() < deadline:
            try:
                result = attempt()
                if result is not None:
                    return result
            except httpx.TransportError:
                pass
            time.sleep(RETRY_SECONDS)
        raise TimeoutError(f"{what}: not within {HUNG_SECONDS} s")

    def _plan(self) -> Record:
        kind = self._random.choice(["plain", "server tools", "server tools", "client tools"])
        says = {"plain": "", "server tools": "done ", "client tools": "asked "}[kind]
        return Record(kind, uuid.uuid4().hex, f"{self.session}/turn", says)

    def _script(self, record: Record) -> str:
        pause = self._random.randint(10, 40)
        words = f"PARTS {self._random.randint(5, 15)} {pause}"
        if record.kind == "plain":
            count = self._random.randint(10, 40)
            record.says = "".join(f"w{n} " for n in range(count))
            return f"CHUNKS {count} {pause}"
        if record.kind == "client tools":
            return f'{words} | CALL ask {{"key": "{record.key}"}} | SAY asked'
        order = f'CALL order {{"key": "{record.key}", "seconds": {self._random.uniform(0, 0.8):.2f}}}'
        put = f'CALL put {{"key": "put-{record.key}", "seconds": {self._random.uniform(0, 0.8):.2f}}}'
        return f"{words} | {order} & {put} | {words} | {put.replace('put-', 'again-')} | SAY done"

    def _run_turn(self, record: Record) -> None:
        body = {"messages": [{"role": "user", "content": self._script(record)}], "stream": True}
        self._leg(record, record.path, body, record.key)
        while record.heard[-1].kind == "turn_awaiting_input":
            turn = record.heard[-1].payload["turn"]
            call = turn["output_message"]["tool_calls"][0]
            response = {"call_id": call["call_id"], "tool_name": call["tool_name"], "content": record.key}
            resume = {"tool_responses": [response], "stream": True}
            self._leg(record, f"{record.path}/{record.turn_id}/resume", resume, f"resume-{record.key}")

    def _leg(self, record: Record, path: str, body: dict[str, Any], key: str) -> None:
        """Submits until a stream begins, then follows until the leg is over."""
        before = len(record.heard)
        self._until(lambda: self._submit(record, path, body, key), f"{record.kind} {path}")
        while not (len(record.heard) > before and record.leg_over):
            record.cuts += 1
            self._until(lambda: self._follow(record), f"follow {record.turn_id} after {record.last_id}")

    def _submit(self, record: Record, path: str, body: dict[str, Any], key: str) -> bool | None:
        headers = {"Idempotency-Key": key}
        with self._http.stream("POST", self._url(path), json=body, headers=headers) as answer:
            if self._is_refused(answer):
                return None
            if answer.status_code != httpx.codes.OK:
                raise AssertionError(f"POST {path}: {answer.status_code} {answer.read()!r}")
            record.turn_id = answer.headers["x-turn-id"]
            self._read(record, answer)
            return True

    def _follow(self, record: Record) -> bool | None:
        """True once something new was heard."""
        path = f"{record.path}/{record.turn_id}/events"
        known = len(record.heard)
        with self._http.stream("GET", self._url(path), headers={"Last-Event-ID": record.last_id}) as answer:
            if self._is_refused(answer):
                return None
            if answer.status_code != httpx.codes.OK:
                raise AssertionError(f"GET {path}: {answer.status_code} {answer.read()!r}")
            self._read(record, answer)
        return True if len(record.heard) > known else None

    def _read(self, record: Record, answer: httpx.Response) -> None:
        """To the end of the stream or to its cut. An orderly end without an end of the leg is a broken promise."""
        rest = b""
        try:
            for data in answer.iter_bytes():
                *blocks, rest = (rest + data).replace(b": ping\n", b"").split(b"\n\n")
                for block in blocks:
                    identifier = block.partition(b"\n")[0].removeprefix(b"id: ").decode()
                    record.heard.append(Heard(time.monotonic(), EventId.parse(identifier), block))
        except httpx.TransportError:
            return
        if not record.leg_over:
            record.problems.append(f"a stream ended in order behind {record.last_id or 'nothing'}: {answer.url}")
