"""What is run on each system, and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Self

import psutil

from tests.benchmarks.client import Job, Result
from tests.benchmarks.readings import Peaks, Watch, cpu_seconds
from tests.benchmarks.systems import System, turn_body
from tests.support import ROOT


@dataclass(frozen=True)
class Load:
    """`turns` turns of `chunks` chunks, `every_ms` apart (0: all at once), `concurrency` of them at a time."""

    name: str
    concurrency: int
    turns: int
    chunks: int = 100
    every_ms: int = 0

    @property
    def is_slow(self) -> bool:
        return self.every_ms > 0

    def script(self) -> str:
        return f"CHUNKS {self.chunks} {self.every_ms}"


FULL = (
    Load("1 stream", 1, 30),
    Load("16 streams", 16, 192),
    Load("64 streams", 64, 320),
    Load("16 short streams", 16, 192, chunks=10),
    Load("1 slow turn", 1, 1, chunks=50, every_ms=20),
    Load("64 slow turns", 64, 64, chunks=50, every_ms=20),
    Load("500 slow turns", 500, 500, chunks=50, every_ms=20),
)
QUICK = (
    Load("1 stream", 1, 4),
    Load("16 streams", 16, 32),
    Load("64 streams", 64, 64),
    Load("16 short streams", 16, 16, chunks=10),
    Load("1 slow turn", 1, 1, chunks=10, every_ms=20),
    Load("64 slow turns", 64, 64, chunks=10, every_ms=20),
)
LOOK_SECONDS = 0.5
QUIET_CORES = 0.2
AT_ONCE_SECONDS = 15.0
WARM_UP = Load("warm-up", 8, 16)


@dataclass(frozen=True)
class Sample:
    """One load on one system. `cpu`: seconds by role; `model_cpu`: the scripted model's. `others`: how many cores were
    busy with what is no part of the benchmark."""

    system: str
    load: Load
    result: Result
    cpu: dict[str, float]
    model_cpu: float
    others: float
    peaks: Peaks | None

    @property
    def turns_per_second(self) -> float:
        return self.load.turns / self.result.elapsed

    @property
    def events_per_second(self) -> float:
        return self.result.events / self.result.elapsed

    def cpu_ms_per_turn(self, roles: Sequence[str] | None = None) -> float:
        return 1000 * sum(self.cpu[role] for role in roles or self.cpu) / self.load.turns


class Client:
    """The load client's process: `with Client() as client: client.run(job)`."""

    def __enter__(self) -> Self:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.client"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.communicate()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def run(self, job: Job) -> Result:
        assert self._popen.stdin
        assert self._popen.stdout
        self._popen.stdin.write(json.dumps(asdict(job)) + "\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError("the load client ended: see its standard error")
        return Result(**json.loads(line))


@dataclass(frozen=True)
class Bench:
    """Runs loads: the client and the model server are the same for all systems."""

    client: Client
    model_pid: int
    patience: Patience

    def run(self, system: System, load: Load) -> Sample:
        job = Job(system.port, system.new_turn_paths(load.turns), turn_body(load.script()), load.concurrency)
        self.patience.wait()
        pids = system.pids()
        watch = Watch(pids) if load.is_slow else None
        before, busy = self._cpu(pids), busy_seconds()
        with watch or nullcontext():
            result = self.client.run(job)
        busy = busy_seconds() - busy
        used = {name: seconds - before[name] for name, seconds in self._cpu(pids).items()}
        others = max(0.0, busy - sum(used.values())) / result.elapsed
        cpu = {role: used[role] for role in pids}
        return Sample(system.name, load, result, cpu, used["model"], others, watch.peaks if watch else None)

    def _cpu(self, pids: dict[str, int]) -> dict[str, float]:
        watched = {**pids, "model": self.model_pid, "client": self.client.pid, "runner": os.getpid()}
        return {name: cpu_seconds(pid) if name != "runner" else time.process_time() for name, pid in watched.items()}


def idle_cpu(system: System, seconds: float) -> dict[str, float]:
    """CPU by role while nobody asks anything, in ms per second."""
    pids = system.pids()
    before = {role: cpu_seconds(pid) for role, pid in pids.items()}
    time.sleep(seconds)
    return {role: 1000 * (cpu_seconds(pid) - before[role]) / seconds for role, pid in pids.items()}


class Patience:
    """Waits for the machine to be free of others' work, so many seconds in all and at most `AT_ONCE_SECONDS` at once.

    A benchmark beside other work favours the system that has more processes to compete with.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self) -> None:
        left = min(self._left, AT_ONCE_SECONDS)
        while left > 0:
            began = busy_seconds()
            time.sleep(LOOK_SECONDS)
            left -= LOOK_SECONDS
            self._left -= LOOK_SECONDS
            if (busy_seconds() - began) / LOOK_SECONDS < QUIET_CORES:
                return


def busy_seconds() -> float:
    """CPU time of the whole machine so far, all cores together."""
    spent = psutil.cpu_times()
    return float(sum(spent[:8]) - spent.idle - spent.iowait)
