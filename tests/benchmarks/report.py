"""Samples to tables: medians over the rounds, and what each is to the monolith's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median, quantiles

from tests.benchmarks.loads import Load, Sample
from tests.benchmarks.readings import Memory, Peaks

Table = list[list[str]]


@dataclass(frozen=True)
class Standing:
    """What is read from a system beside its loads. CPU in ms per second; memory and threads at rest and at the end."""

    start_seconds: list[float]
    idle_cpu: dict[str, float]
    memory_at_start: dict[str, Memory]
    memory_at_end: dict[str, Memory]


@dataclass(frozen=True)
class Report:
    """`systems`: names, the monolith's first."""

    systems: Sequence[str]
    samples: Sequence[Sample]
    standings: dict[str, Standing]

    def loads(self) -> list[Load]:
        return list(dict.fromkeys(sample.load for sample in self.samples))

    def of(self, system: str, load: Load) -> list[Sample]:
        return [sample for sample in self.samples if (sample.system, sample.load) == (system, load)]

    def failures(self) -> list[str]:
        return [
            f"{sample.system}, {sample.load.name}: {len(sample.result.failures)} of {sample.load.turns} turns, such as "
            f"{sample.result.failures[0]}"
            for sample in self.samples
            if sample.result.failures
        ]

    def tables(self) -> Iterable[tuple[str, Table]]:
        """Title and rows, the head first."""
        fast = [load for load in self.loads() if not load.is_slow and load.chunks >= 100]
        yield "Throughput and latency", [self._head("100 chunks a turn, no delay"), *chain(*map(self._speed, fast))]
        yield "CPU", [self._head("CPU time, all processes of a system"), *chain(*map(self._cpu, fast)), *self._slope()]
        yield "CPU by process", self._by_role(fast)
        slow = [load for load in self.loads() if load.is_slow]
        yield "Slow turns", [self._head(_chunks_said(slow[0])), *chain(*(self._slow(slow[0], load) for load in slow))]
        yield "Memory", self._memory(slow[-1])
        yield "Noise", [["Cores that others kept busy", *self.systems], *map(self._others, self.loads())]
        yield "Start", [self._head("From no process but the data servers"), *self._start()]

    def _head(self, title: str) -> list[str]:
        return [title, *self.systems, *(f"{name} / {self.systems[0]}" for name in self.systems[1:])]

    def _row(self, title: str, form: str, value: Callable[[str], float | None]) -> list[str]:
        values = [value(name) for name in self.systems]
        base = values[0]
        ratios = [f"{other / base:.2f}" if other is not None and base else "" for other in values[1:]]
        return [title, *("" if one is None else format(one, form) for one in values), *ratios]

    def _median_row(self, title: str, form: str, load: Load, read: Callable[[Sample], float]) -> list[str]:
        """The ratio is the median of the rounds' ratios: what ran close in time had about the same neighbours."""
        row = self._row(title, form, self._median(load, read))
        ratios = [self._paired(load, read, system) for system in self.systems[1:]]
        return [*row[: 1 + len(self.systems)], *("" if one is None else f"{one:.2f}" for one in ratios)]

    def _paired(self, load: Load, read: Callable[[Sample], float], system: str) -> float | None:
        pairs = zip(self.of(self.systems[0], load), self.of(system, load), strict=False)
        ratios = [read(other) / read(base) for base, other in pairs if read(base)]
        return median(ratios) if ratios else None

    def _median(self, load: Load, read: Callable[[Sample], float]) -> Callable[[str], float | None]:
        def value(system: str) -> float | None:
            found = [read(sample) for sample in self.of(system, load)]
            return median(found) if found else None

        return value

    def _percentile(self, load: Load, percent: int) -> Callable[[str], float | None]:
        """In milliseconds, over the turns of all rounds."""

        def value(system: str) -> float | None:
            seconds = [one for sample in self.of(system, load) for one in sample.result.first_progress]
            return 1000 * quantiles(seconds, n=100, method="inclusive")[percent - 1] if len(seconds) > 1 else None

        return value

    def _speed(self, load: Load) -> Table:
        return [
            self._median_row(f"{load.name}: events/s", ",.0f", load, lambda sample: sample.events_per_second),
            self._median_row(f"{load.name}: turns/s", ".1f", load, lambda sample: sample.turns_per_second),
            self._row(f"{load.name}: first chunk, p50, ms", ",.0f", self._percentile(load, 50)),
            self._row(f"{load.name}: first chunk, p99, ms", ",.0f", self._percentile(load, 99)),
        ]

    def _cpu(self, load: Load) -> Table:
        return [self._median_row(f"{load.name}: per turn, ms", ".1f", load, lambda sample: sample.cpu_ms_per_turn())]

    def _cost(self, load: Load, roles: Sequence[str] | None = None) -> Callable[[str], float | None]:
        """CPU time per turn, in milliseconds."""
        return self._median(load, lambda sample: sample.cpu_ms_per_turn(roles))

    def _slope(self) -> Table:
        """A turn's cost as a fixed part and a part per chunk, from two lengths of turns at the same concurrency."""
        short = next(load for load in self.loads() if load.chunks < 100 and not load.is_slow)
        whole = next(load for load in self.loads() if load.concurrency == short.concurrency and load != short)

        def per_chunk(system: str) -> float | None:
            long, brief = self._cost(whole)(system), self._cost(short)(system)
            return None if long is None or brief is None else (long - brief) / (whole.chunks - short.chunks)

        def fixed(system: str) -> float | None:
            long, chunk = self._cost(whole)(system), per_chunk(system)
            return None if long is None or chunk is None else long - whole.chunks * chunk

        return [
            self._row(f"{whole.name}: per chunk, ms", ".3f", per_chunk),
            self._row(f"{whole.name}: per turn beside its chunks, ms", ".1f", fixed),
        ]

    def _by_role(self, loads: Sequence[Load]) -> Table:
        rows = [["ms per turn", *(load.name for load in loads), "idle, ms/s"]]
        for system in self.systems:
            for role, resting in self.standings[system].idle_cpu.items():
                costs = [self._cost(load, [role])(system) for load in loads]
                shown = ["" if cost is None else f"{cost:.1f}" for cost in costs]
                rows.append([f"{system}: {role}", *shown, f"{resting:.1f}"])
        return rows

    def _slow(self, alone: Load, load: Load) -> Table:
        elapsed = self._median(load, lambda sample: sample.result.elapsed)
        one = self._median(alone, lambda sample: sample.result.elapsed)

        def to_one(system: str) -> float | None:
            many, single = elapsed(system), one(system)
            return None if many is None or single is None else many / single

        title = f"{load.name}: seconds until all ended"
        rows = [self._median_row(title, ".2f", load, lambda sample: sample.result.elapsed)]
        if load == alone:
            return rows
        return [
            *rows,
            self._row(f"{load.name}: to one alone", ".2f", to_one),
            self._row(f"{load.name}: first chunk, p50, ms", ",.0f", self._percentile(load, 50)),
            self._row(f"{load.name}: first chunk, p99, ms", ",.0f", self._percentile(load, 99)),
            self._row(f"{load.name}: most threads, all processes", ".0f", lambda system: self._threads(system, load)),
        ]

    def _threads(self, system: str, load: Load) -> float | None:
        peaks = self._peaks(system, load)
        return sum(peaks.threads.values()) if peaks else None

    def _peaks(self, system: str, load: Load) -> Peaks | None:
        found = [sample.peaks for sample in self.of(system, load) if sample.peaks and sample.peaks.memory]
        return max(found, key=lambda peaks: sum(used.pss for used in peaks.memory.values())) if found else None

    def _memory(self, most: Load) -> Table:
        at_most = f"most during {most.name}"
        rows = [["MB, PSS (RSS)", "after the start", "at the end", at_most, "most threads then"]]
        for system in self.systems:
            standing, peaks = self.standings[system], self._peaks(system, most) or Peaks()
            columns = [standing.memory_at_start, standing.memory_at_end, peaks.memory]
            for role in standing.memory_at_start:
                shown = [_shown(memory.get(role)) for memory in columns]
                rows.append([f"{system}: {role}", *shown, str(peaks.threads.get(role, ""))])
            totals = [sum(memory.values(), Memory(0, 0)) if memory else None for memory in columns]
            rows.append([f"**{system}**", *map(_shown, totals), str(sum(peaks.threads.values()) or "")])
        return rows

    def _others(self, load: Load) -> list[str]:
        return self._row(load.name, ".2f", self._median(load, lambda sample: sample.others))[: 1 + len(self.systems)]

    def _start(self) -> Table:
        return [
            self._row(
                "seconds until a first turn has ended",
                ".1f",
                lambda system: median(self.standings[system].start_seconds),
            )
        ]


def markdown(table: Table) -> str:
    head, *rows = table
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join((cells[0].ljust(widths[0]), *aligned))} |"

    rule = "|".join((":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])))
    return "\n".join((line(head), f"|{rule}|", *map(line, rows)))


def sample_line(sample: Sample) -> str:
    """One sample for the raw output."""
    result = sample.result
    costs = " ".join(f"{role}={1000 * seconds / sample.load.turns:.1f}" for role, seconds in sample.cpu.items())
    return (
        f"{sample.system:<15} {sample.load.name:<16} {result.elapsed:6.2f} s {sample.events_per_second:8,.0f} events/s "
        f"{sample.turns_per_second:6.1f} turns/s, {result.events / sample.load.turns:.2f} events a turn, ms a turn: "
        f"{costs}; cores used by model {sample.model_cpu / result.elapsed:.2f}, client "
        f"{result.own_cpu / result.elapsed:.2f}, others {sample.others:.2f}; failures {len(result.failures)}"
    )


def _chunks_said(load: Load) -> str:
    return f"{load.chunks} chunks a turn, one every {load.every_ms} ms"


def _shown(used: Memory | None) -> str:
    return f"{used.pss:.0f} ({used.rss:.0f})" if used else ""
