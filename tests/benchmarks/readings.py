"""What a system's processes use, read from the kernel: CPU time, memory, threads; each with its descendants."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

SAMPLE_SECONDS = 0.25
MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class Memory:
    """Megabytes. `pss` shares what is shared out among those who share it, so that it can be added up."""

    rss: float
    pss: float

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.rss + other.rss, self.pss + other.pss)


def cpu_seconds(pid: int) -> float:
    """CPU time so far of a process and its descendants, those that have ended and were waited for included."""
    return sum(_over_tree(pid, lambda process: sum(process.cpu_times()[:4])))


def memory(pid: int) -> Memory:
    return sum(_over_tree(pid, _memory_of_one), Memory(0, 0))


def threads(pid: int) -> int:
    return sum(_over_tree(pid, lambda process: process.num_threads()))


def _memory_of_one(process: psutil.Process) -> Memory:
    used = process.memory_full_info()
    return Memory(used.rss / MEGABYTE, used.pss / MEGABYTE)


def _over_tree[T](pid: int, read: Callable[[psutil.Process], T]) -> Iterator[T]:
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield read(process)


@dataclass
class Peaks:
    """The most that was seen, by role."""

    memory: dict[str, Memory] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)

    def note(self, role: str, used: Memory, count: int) -> None:
        before = self.memory.get(role, Memory(0, 0))
        self.memory[role] = Memory(max(before.rss, used.rss), max(before.pss, used.pss))
        self.threads[role] = max(self.threads.get(role, 0), count)


class Watch:
    """Samples memory and threads while it is open: `with Watch(pids) as watch: …`, then `watch.peaks`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.peaks = Peaks()
        self._pids = dict(pids)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            for role, pid in self._pids.items():
                self.peaks.note(role, memory(pid), threads(pid))
