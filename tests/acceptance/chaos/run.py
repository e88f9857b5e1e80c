"""One run: clients and chaos together, then everything is looked at."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.acceptance.chaos.clients import HUNG_SECONDS, Client, Record
from tests.acceptance.chaos.failures import Chaos
from tests.acceptance.chaos.fleet import Fleet, running_fleet
from tests.acceptance.fire.system import Heard, Session, Stream
from tests.support import wait_until
from tests.support.nodes import READY_SECONDS

ASK = {
    "name": "ask",
    "description": "Asks the client",
    "input_schema": {"type": "object", "properties": {"key": {"type": "string"}}},
}
ENDED = ("completed", "failed", "cancelled")
Broken = Callable[[str], object]
UNKNOWN = "outcome of this tool call is unknown"


@dataclass
class Report:
    """What came of a run. `problems` is empty if every promise was kept."""

    seed: int
    turns: Counter[str] = field(default_factory=Counter)
    failures: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    cuts: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    lost: int = 0
    doubled: int = 0
    hung: int = 0
    lost_deltas: int = 0
    unknown_outcomes: int = 0
    recoveries: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        lines = [f"chaos, seed {self.seed}", ""]
        lines += [f"  {count:5d}  {kind}" for kind, count in self.failures.items()]
        lines += [f"  {self.restarts:5d}  processes restarted by the keeper", ""]
        lines += [f"  {count:5d}  turns {status}" for status, count in sorted(self.turns.items())]
        lines += [
            f"  {self.attempts:5d}  attempts at them",
            f"  {self.cuts:5d}  streams cut and joined again",
            f"  {self.refused.total():5d}  requests refused (503, 429) and sent again",
            f"  {self.lost:5d}  lost",
            f"  {self.doubled:5d}  doubled",
            f"  {self.hung:5d}  hung",
            f"  {self.lost_deltas:5d}  deltas of unfinished steps that replay lacks (worker and Redis lost at once)",
            f"  {self.unknown_outcomes:5d}  tool calls whose outcome is unknown",
        ]
        if self.recoveries:
            p50, most = statistics.median(self.recoveries), max(self.recoveries)
            count = len(self.recoveries)
            lines.append(f"  recovery after a kill, s: p50 {p50:.1f}, max {most:.1f} ({count} turns)")
        return "\n".join([*lines, *(f"  BROKEN: {problem}" for problem in self.problems)])


def run(directory: Path, *, seed: int, rounds: int, clients: int) -> Report:
    """So many rounds of each kind of failure, with so many clients at once."""

    def happens(chaos: Chaos) -> None:
        for _ in range(rounds):
            chaos.round()

    # The keeper's thread lives until the end: what it has started dies with it.
    with running_fleet(directory) as fleet, fleet.kept():
        return run_on(fleet, happens, seed=seed, clients=clients)


def run_on(fleet: Fleet, happens: Callable[[Chaos], None], *, seed: int, clients: int) -> Report:
    """Clients make turns while something happens; then everything that they made is looked at."""
    report, chaos = Report(seed), Chaos(fleet, random.Random(seed))
    made = _clients(fleet, seed, clients)
    stop_clients = _started(made)
    try:
        happens(chaos)
    finally:
        stop_clients.set()
    deadline = time.monotonic() + HUNG_SECONDS + 30
    for client in made:
        client.join(max(0.1, deadline - time.monotonic()))
    chaos.wait_drained()
    for process in fleet.processes:
        wait_until(lambda it=process: it.running() and it.ready_prompt in it.output(), READY_SECONDS)  # type: ignore[misc]
    report.failures = dict(chaos.done)
    report.restarts = fleet.restarts
    report.hung = sum(client.is_alive() for client in made)
    report.problems += [f"{client.name} hangs" for client in made if client.is_alive()]
    report.refused = sum((client.refused for client in made), Counter())
    report.problems += [answer for answer in report.refused if "without Retry-After" in answer]
    records = [record for client in made for record in client.records]
    report.recoveries = _recoveries(chaos, records)
    for record in records:
        _check_client(record, report)
    _check_all(fleet, made, records, report)
    return report


def _clients(fleet: Fleet, seed: int, count: int) -> list[Client]:
    group = fleet.system.toolgroup(fleet.mcp)
    agent = {"model": "scripted", "instructions": "x", "toolgroups": [group], "client_tools": [ASK]}
    return [Client(fleet.system.urls, agent, seed + number) for number in range(count)]


def _started(clients: Sequence[Client]) -> threading.Event:
    """Set it, and they end after their turns."""
    stop = threading.Event()
    for client in clients:
        client.stop_asked = stop
        client.start()
    return stop


def _recoveries(chaos: Chaos, records: Sequence[Record]) -> list[float]:
    """From each kill to the first event of a later attempt, for each turn that ran there and was heard of."""
    heard = {record.turn_id: record.heard for record in records}
    found = []
    for at, turns in chaos.kills:
        for turn_id, fence in turns.items():
            later = [each.at for each in heard.get(turn_id, ()) if each.id.fence > fence]
            if later:
                found.append(max(0.0, later[0] - at))
    return found


def _check_client(record: Record, report: Report) -> None:
    """What a client can see by itself: a chain of ids, each once."""
    report.problems += [f"{record.kind} {record.turn_id}: {problem}" for problem in record.problems]
    report.cuts += record.cuts
    ids = [each.id for each in record.heard]
    if not all(a.fence <= b.fence and a.n < b.n for a, b in pairwise(ids)):
        report.problems.append(f"turn {record.turn_id}: ids do not grow: {[str(one) for one in ids]}")


def _check_all(fleet: Fleet, clients: Sequence[Client], records: Sequence[Record], report: Report) -> None:
    sessions = [client.session.rpartition("/")[2] for client in clients]
    query = "SELECT turn_id::text AS turn_id, status, fence, error FROM turns WHERE session_id::text = ANY(:sessions)"
    rows = fleet.system.rows(query, sessions=sessions)
    known = {row["turn_id"]: row for row in rows}
    report.turns = Counter(row["status"] for row in rows)
    report.attempts = sum(row["fence"] for row in rows)
    mine = [record for record in records if record.turn_id]
    report.lost = sum(record.turn_id not in known for record in mine)
    report.doubled = len(known) - len({record.turn_id for record in mine})
    if report.lost or report.doubled:
        report.problems.append(f"{report.lost} turns lost, {report.doubled} more turns than requests")
    counts = fleet.mcp.counts()
    for record in mine:
        row = known.get(record.turn_id)
        if row is not None:
            _check_turn(fleet, record, row["status"], row["error"], counts, report)


def _check_turn(
    fleet: Fleet, record: Record, status: str, error: dict[str, str] | None, counts: dict[str, int], report: Report
) -> None:
    """Ended, told so, stored once, replayed as it was heard, with each effect at most once."""

    def broken(what: str) -> None:
        report.problems.append(f"{record.kind} {record.turn_id}: {what}")

    if status not in ENDED:
        broken(f"is {status}")
        return
    if status != "completed":
        broken(f"{status}: {error}")
        return
    session = Session(fleet.system.urls[0] + record.path.removesuffix("/turn"))
    turn = session.turn(record.turn_id)
    if turn["output_message"]["content"] != record.says:
        broken(f"says {turn['output_message']['content']!r}, not {record.says!r}")
    if not record.heard or record.heard[-1].kind != "turn_complete" or record.heard[-1].payload["turn"] != turn:
        broken("the stored turn is not the one that its stream ended with")
    steps = [step["step_id"] for step in turn["steps"]]
    completed = [each.payload["step_details"]["step_id"] for each in record.heard if each.kind == "step_complete"]
    if not (steps == completed and len(set(steps)) == len(steps)):
        broken(f"its steps are {steps}, those completed in its stream {completed}")
    _check_replay(_replay(session, record.turn_id), record, report, broken)
    if record.kind == "server tools":
        report.unknown_outcomes += _check_effects(turn, record, counts, broken)


def _replay(session: Session, turn_id: str) -> list[Heard]:
    return Stream("GET", f"{session.url}/turn/{turn_id}/events").ended()


def _check_replay(replay: list[Heard], record: Record, report: Report, broken: Broken) -> None:
    """Equal but for the deltas of unfinished steps that a worker and Redis took with them."""
    again = {each.id: each.block for each in replay}
    heard = {each.id: each for each in record.heard}
    if [one for one in again if one not in heard]:
        broken(f"never heard live: {[str(one) for one in again if one not in heard]}")
    if [one for one in again if one in heard and heard[one].block != again[one]]:
        broken("an event is not the same in its replay")
    missing = [each for identifier, each in heard.items() if identifier not in again]
    if [each for each in missing if each.kind not in ("step_start", "step_progress")]:
        broken(f"missing from the replay: {[str(each.id) for each in missing]}")
    report.lost_deltas += len(missing)


def _check_effects(turn: dict[str, Any], record: Record, counts: dict[str, int], broken: Broken) -> int:
    """`order` has its effect once if its result is known, at most once if not; `put` at least once.

    Gives how many outcomes are unknown.
    """
    tool_steps = [step for step in turn["steps"] if step["step_type"] == "tool_execution"]
    responses = [str(response) for step in tool_steps for response in step["tool_responses"]]
    unknown = sum(UNKNOWN in response for response in responses)
    ordered = counts.get(record.key, 0)
    if ordered > 1 or (ordered == 0 and not unknown):
        broken(f"ordered {ordered} times, {unknown} outcomes unknown")
    if len(responses) != 3:
        broken(f"has {len(responses)} tool responses, not 3")
    for key in (f"put-{record.key}", f"again-{record.key}"):
        if counts.get(key, 0) < 1:
            broken(f"{key} was never put")
    return unknown
