"""The load client: posts turns and reads their streams as bytes, in a process of its own.

It must cost little beside the servers, so it has no HTTP library: it counts `data:` lines, notes when the first
progress arrives, and sees whether the stream ended whole and with the turn completed. One job a line on standard
input, as JSON; one result a line on standard output.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import uvloop

EVENT = b"\ndata: "
PROGRESS = b'"step_progress"'
COMPLETE = b'"turn_complete"'
END_OF_BODY = b"0\r\n\r\n"
OVERLAP = max(map(len, (EVENT, PROGRESS, COMPLETE))) - 1
SAID_OF_A_FAILURE = 300
JOB_SECONDS = 300


@dataclass
class Job:
    """Post `body` to each path, so many at once. The server listens on this machine."""

    port: int
    paths: list[str]
    body: str
    concurrency: int


@dataclass
class Result:
    """Seconds and counts. `first_progress` and `whole_turn` have one entry per turn, counted from its connection."""

    elapsed: float = 0.0
    own_cpu: float = 0.0
    events: int = 0
    received_bytes: int = 0
    first_progress: list[float] = field(default_factory=list)
    whole_turn: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Turn(asyncio.Protocol):
    """One request on one connection, to its end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._began = time.perf_counter()
        self._rest = b""
        self._head = b""
        self.done = asyncio.get_running_loop().create_future()
        self.events = 0
        self.received = 0
        self.first_progress: float | None = None
        self.whole_turn = 0.0
        self.completed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]  # uvloop's transports are no asyncio.Transport

    def data_received(self, data: bytes) -> None:
        seen = self._rest + data
        if len(self._head) < SAID_OF_A_FAILURE:
            self._head = (self._head + data)[:SAID_OF_A_FAILURE]
        self.received += len(data)
        self.events += seen.count(EVENT) - self._rest.count(EVENT)
        if self.first_progress is None and PROGRESS in seen:
            self.first_progress = time.perf_counter() - self._began
        self.completed = self.completed or COMPLETE in seen
        self._rest = seen[-OVERLAP:]

    def connection_lost(self, _: Exception | None) -> None:
        self.whole_turn = time.perf_counter() - self._began
        if not self.done.done():
            self.done.set_result(None)

    def problem(self) -> str | None:
        """What is wrong with the stream, if anything is."""
        if not self._head.startswith(b"HTTP/1.1 200 "):
            return f"refused: {self._head!r}"
        if self.first_progress is None or not self.completed:
            return f"not completed after {self.events} events: {self._rest!r}"
        return None if self._rest.endswith(END_OF_BODY) else "cut off"


def request_bytes(job: Job, path: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{job.port}\r\nAccept: application/json\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(job.body.encode())}\r\n\r\n"
    )
    return (head + job.body).encode()


async def run(job: Job) -> Result:
    """Every path once; as soon as one turn ends, the next one begins."""
    result, paths = Result(), iter(job.paths)
    began, cpu = time.perf_counter(), time.process_time()
    try:
        async with asyncio.timeout(JOB_SECONDS):
            await asyncio.gather(*(_stream_after_stream(job, paths, result) for _ in range(job.concurrency)))
    except TimeoutError:
        result.failures.append(f"streams were still open after {JOB_SECONDS} s")
    result.elapsed, result.own_cpu = time.perf_counter() - began, time.process_time() - cpu
    return result


async def _stream_after_stream(job: Job, paths: Iterator[str], result: Result) -> None:
    loop = asyncio.get_running_loop()
    for path in paths:
        turn = Turn(request_bytes(job, path))
        try:
            await loop.create_connection(lambda turn=turn: turn, "127.0.0.1", job.port)  # type: ignore[misc]
        except OSError as error:
            result.failures.append(f"no connection: {error}")
            continue
        await turn.done
        _add(turn, result)


def _add(turn: Turn, result: Result) -> None:
    result.events += turn.events
    result.received_bytes += turn.received
    if problem := turn.problem():
        result.failures.append(problem)
        return
    assert turn.first_progress is not None
    result.first_progress.append(turn.first_progress)
    result.whole_turn.append(turn.whole_turn)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asdict(uvloop.run(run(Job(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
