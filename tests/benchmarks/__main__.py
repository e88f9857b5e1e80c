"""`python -m tests.benchmarks`: see `--help`, and docs/benchmarks.md for what came out."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

from tests.benchmarks.loads import FULL, QUICK, WARM_UP, Bench, Client, Load, Patience, Sample, idle_cpu
from tests.benchmarks.processes import on_cpus, versions_of_servers
from tests.benchmarks.readings import MEGABYTE, Memory, memory
from tests.benchmarks.report import Report, Standing, markdown, sample_line
from tests.benchmarks.systems import Caravan, CaravanPrefork, Monolith, System
from tests.support import ROOT
from tests.support.scripted_model import ScriptedModel

DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PACKAGES = (
    "llama-stack",
    "celery",
    "fastapi",
    "uvicorn",
    "uvloop",
    "redis",
    "sqlalchemy",
    "psycopg2-binary",
    "pydantic",
)
IDLE_SECONDS = 5.0


@dataclass
class Output:
    """Prints, and keeps what was printed for the document."""

    lines: list[str] = field(default_factory=list)

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    output = Output()
    output.say(f"$ {command_line()}")
    for line in machine():
        output.say(line)
    report = measure(options, output)
    for title, table in report.tables():
        output.say(f"\n{title}\n\n{markdown(table)}")
    document = options.output or (None if options.quick else DOCUMENT)
    if document:
        write(document, section(report, output))
    if report.failures():
        sys.exit("\n".join(["Turns failed:", *report.failures()]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="few turns, one round, one start: a smoke run under 60 s")
    add("--rounds", type=int, help="how often each load runs on each system (default 5; quick: 1)")
    add("--starts", type=int, help="how often each system starts (default 3; quick: 1)")
    add("--prefork", action="store_true", help="also Caravan with Celery's prefork pool of 2 processes")
    add("--log-level", default="INFO", help="of the processes of all systems (default INFO)")
    add("--server-cpus", type=cpus, default=(), metavar="0,1", help="cores for the systems (default: all)")
    add("--load-cpus", type=cpus, default=(), metavar="0,1", help="cores for client and model (default: all)")
    add("--patience", type=float, help="seconds to wait, in all, while others use the machine (default 300; quick: 0)")
    add("--output", type=Path, help=f"document to write (default docs/{DOCUMENT.name}; quick: none)")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.starts = options.starts or (1 if options.quick else 3)
    if options.patience is None:
        options.patience = 0.0 if options.quick else 300.0
    return options


def cpus(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def measure(options: argparse.Namespace, output: Output) -> Report:
    kinds: list[type[System]] = [Monolith, Caravan, *([CaravanPrefork] if options.prefork else [])]
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="caravan-bench-")))
        with on_cpus(options.load_cpus):
            model = opened.enter_context(ScriptedModel())
            client = opened.enter_context(Client())
        with on_cpus(options.server_cpus):
            systems = [
                opened.enter_context(kind(folder / kind.__name__, model.url, options.log_level)) for kind in kinds
            ]
            for _ in range(options.starts - 1):
                for system in systems:
                    system.restart()
        assert model.pid
        bench = Bench(client, model.pid, Patience(options.patience))
        at_start = [memory_by_role(system) for system in systems]
        idle = [idle_cpu(system, 1 if options.quick else IDLE_SECONDS) for system in systems]
        samples = run_rounds(bench, systems, QUICK if options.quick else FULL, options.rounds, output)
        standings = {
            system.name: Standing(system.start_seconds, resting, before, memory_by_role(system))
            for system, resting, before in zip(systems, idle, at_start, strict=True)
        }
    return Report([system.name for system in systems], samples, standings)


def run_rounds(
    bench: Bench, systems: Sequence[System], loads: Sequence[Load], rounds: int, output: Output
) -> list[Sample]:
    """Each load on one system after the other, and the other way round in every second round."""
    for system in systems:
        bench.run(system, WARM_UP)
    samples = []
    for number in range(rounds):
        output.say(f"\nround {number + 1} of {rounds}, load average {os.getloadavg()[0]:.2f}")
        for load in loads:
            for system in systems if number % 2 == 0 else reversed(systems):
                if load.is_slow and load.turns > system.most_slow_turns:
                    continue
                samples.append(bench.run(system, load))
                output.say(sample_line(samples[-1]))
    return samples


def memory_by_role(system: System) -> dict[str, Memory]:
    return {role: memory(pid) for role, pid in system.pids().items()}


def command_line() -> str:
    return " ".join(["python -m tests.benchmarks", *sys.argv[1:]])


def machine() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    total = psutil.virtual_memory().total / MEGABYTE / 1024
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = {name: version(name) for name in PACKAGES} | versions_of_servers()
    return [
        f"{time.strftime('%Y-%m-%d %H:%M %Z')}, revision {revision or 'unknown'}",
        f"{psutil.cpu_count()} cores of {model}, {total:.0f} GB, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {number}" for name, number in packages.items()),
    ]


def section(report: Report, output: Output) -> str:
    """The measured part of the document."""
    tables = "\n\n".join(f"### {title}\n\n{markdown(table)}" for title, table in report.tables())
    made = "\n".join(f"    {line}" for line in output.lines[:4])
    raw = "\n".join(output.lines)
    details = f"<details>\n<summary>Raw output</summary>\n\n```text\n{raw}\n```\n\n</details>"
    return f"{made}\n\n{tables}\n\n{details}"


def write(document: Path, measured: str) -> None:
    """Puts the measured part between its marks; what stands around them is written by hand and stays."""
    text = document.read_text() if document.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}")


if __name__ == "__main__":
    main()
