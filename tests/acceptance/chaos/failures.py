"""What happens to the fleet: each function does one failure, and gives a word on it, or None if there was no chance."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil

from tests.acceptance.chaos.fleet import SHORT, Fleet
from tests.support import wait_until
from tests.support.nodes import Process

LEASE = float(SHORT["LEASE_SECONDS"])
CHANCE_SECONDS = 30.0
"""How long to wait for a turn that is just where the failure wants it."""

COMPLETED = "SELECT count(*) AS n FROM turns WHERE status = 'completed'"


@dataclass
class Chaos:
    """Does failures in a random order, every kind as often as any other; keeps what it did."""

    fleet: Fleet
    random: random.Random
    done: dict[str, int] = field(default_factory=dict)
    kills: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """When a process was killed, and the turns that it ran: id → attempt."""
    draining: list[tuple[Process, int]] = field(default_factory=list)

    def round(self, some: Iterable[str] = ()) -> None:
        """Each kind of failure once, or each of some."""
        kinds = list(some or FAILURES)
        self.random.shuffle(kinds)
        for kind in kinds:
            time.sleep(self.random.uniform(0.3, 1.5))
            if FAILURES[kind](self):
                self.done[kind] = self.done.get(kind, 0) + 1

    def rolling_restart(self) -> None:
        """One process after the other, each once its predecessor serves again."""
        for process in self.fleet.processes:
            self.drain(process)
            self.wait_drained()
            process.wait_ready()
            self.done["process restarted in turn (SIGTERM)"] = (
                self.done.get("process restarted in turn (SIGTERM)", 0) + 1
            )

    def missing(self) -> list[str]:
        """Kinds of failure that there was no chance for."""
        return [kind for kind in FAILURES if kind not in self.done]

    def completed(self) -> int:
        """Turns, of this run and of those before on the same fleet."""
        (row,) = self.fleet.system.rows(COMPLETED)
        return int(row["n"])

    # --- helpers ---

    def workers(self, *names: str) -> list[Process]:
        return [self.fleet.system.workers[name] for name in names if self.fleet.system.workers[name].running()]

    def children(self) -> list[int]:
        """The processes of the prefork worker, once there are some."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: any(worker.children() for worker in self.workers("c")), CHANCE_SECONDS)
        return [pid for worker in self.workers("c") for pid in worker.children()]

    def drain(self, process: Process) -> bool:
        pid = process.pid
        with contextlib.suppress(ProcessLookupError):  # one that was told to end before has just done so
            process.signal(signal.SIGTERM)
            self.draining.append((process, pid))
            return True
        return False

    def wait_drained(self) -> None:
        """Until those that were told to end have done so, and were started again."""
        for process, pid in self.draining:
            wait_until(lambda it=process, was=pid: it.running() and it.pid != was, 120)  # type: ignore[misc]

    def owned(self, pids: list[int]) -> dict[str, int]:
        """The running turns of these processes."""
        query = """SELECT turn_id::text AS turn_id, fence FROM turns JOIN workers USING (worker_id)
                   WHERE status = 'running' AND split_part(name, ':', 2)::int = ANY(:pids)"""
        return {row["turn_id"]: row["fence"] for row in self.fleet.system.rows(query, pids=pids)}

    def kill(self, pid: int) -> bool:
        """SIGKILL for one process, noting the turns that it ran."""
        turns = self.owned([pid])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.kills.append((time.monotonic(), turns))
        return True

    def some_turn(self, condition: str, also: Callable[[str], object] = bool) -> int | None:
        """The process that runs a turn of this kind, once there is one. `also`: what must hold for its id."""
        query = f"""SELECT split_part(name, ':', 2)::int AS pid, turn_id FROM turns JOIN workers USING (worker_id)
                    WHERE status = 'running' AND dead_at IS NULL AND {condition}"""
        found: list[int] = []

        def look() -> bool:
            found.extend(int(row["pid"]) for row in self.fleet.system.rows(query) if also(str(row["turn_id"])))
            return bool(found)

        try:
            wait_until(look, CHANCE_SECONDS, every=0.02)
        except TimeoutError:
            return None
        return found[0]


def kill_mid_chunk(chaos: Chaos) -> bool:
    """A process whose turn is streaming its first answer: no step is recorded, and in its tail is more than the
    beginnings of the turn and of the step."""

    def has_chunks(turn_id: str) -> bool:
        length = chaos.fleet.valkey.ask(f"XLEN caravan:{{{turn_id}}}:tail")
        return length.startswith(b":") and int(length[1:]) > 3

    pid = chaos.some_turn("NOT EXISTS (SELECT 1 FROM journal WHERE journal.turn_id = turns.turn_id)", has_chunks)
    return pid is not None and chaos.kill(pid)


def kill_mid_tool(chaos: Chaos) -> bool:
    """A process whose turn waits for a tool: noted as started, and without a result."""
    waits = """EXISTS (SELECT 1 FROM tool_calls c WHERE c.turn_id = turns.turn_id AND c.fence = turns.fence
                         AND c.result IS NULL)"""
    pid = chaos.some_turn(waits)
    return pid is not None and chaos.kill(pid)


def kill_between_commit_and_publish(chaos: Chaos) -> bool:
    """Worker `a`, when Postgres has a step of which Redis has not heard."""
    events = chaos.fleet.events
    events.stall_at(b"step_complete")
    try:
        events.wait_stalled(CHANCE_SECONDS)
        return any(chaos.kill(worker.pid) for worker in chaos.workers("a"))
    except TimeoutError:
        return False
    finally:
        events.cut()
        events.flow()


def kill_a_prefork_child(chaos: Chaos) -> bool:
    busy = chaos.some_turn(f"split_part(name, ':', 2)::int = ANY('{{{','.join(map(str, chaos.children()))}}}')")
    return busy is not None and chaos.kill(busy)


def kill_a_whole_worker(chaos: Chaos) -> bool:
    """The prefork worker with all its children."""
    for worker in chaos.workers("c"):
        turns = chaos.owned(worker.children())
        worker.kill_all()
        chaos.kills.append((time.monotonic(), turns))
        return True
    return False


def kill_a_web_process(chaos: Chaos) -> bool:
    web = chaos.random.choice(chaos.fleet.system.webs)
    if not web.running():
        return False
    web.kill_all()
    return True


def stop_a_worker_beyond_its_lease(chaos: Chaos) -> bool:
    """SIGSTOP, until others have taken its turns; then it goes on."""
    for worker in chaos.workers(chaos.random.choice("ab")):
        pid = worker.pid
        turns = chaos.owned([pid])
        with contextlib.suppress(ProcessLookupError):  # one that was told to end before has just done so
            os.kill(pid, signal.SIGSTOP)
            chaos.kills.append((time.monotonic(), turns))
            time.sleep(LEASE * 2)
            os.kill(pid, signal.SIGCONT)
            return True
    return False


def drain_a_worker(chaos: Chaos) -> bool:
    return any(chaos.drain(worker) for worker in chaos.workers(chaos.random.choice("abc")))


def drain_a_web_process(chaos: Chaos) -> bool:
    web = chaos.random.choice(chaos.fleet.system.webs)
    return web.running() and chaos.drain(web)


def flush_redis(chaos: Chaos) -> bool:
    chaos.fleet.valkey.flush()
    return True


def restart_redis_empty(chaos: Chaos) -> bool:
    chaos.fleet.valkey.kill()
    time.sleep(chaos.random.uniform(0, 1))
    chaos.fleet.valkey.start()
    return True


def cut_subscriptions(chaos: Chaos) -> bool:
    chaos.fleet.valkey.ask("CLIENT KILL TYPE pubsub")
    return True


def lose_all_doorbells(chaos: Chaos) -> bool:
    chaos.fleet.valkey.ask("DEL caravan.turns")
    return True


def hang_redis(chaos: Chaos) -> bool:
    """SIGSTOP for a moment."""
    process = psutil.Process(chaos.fleet.valkey.pid)
    process.suspend()
    time.sleep(chaos.random.uniform(0.5, 2))
    process.resume()
    return True


def restart_postgres(chaos: Chaos) -> bool:
    chaos.fleet.postgres.kill()
    time.sleep(chaos.random.uniform(0, 1))
    chaos.fleet.postgres.start()
    return True


def cut_postgres_connections(chaos: Chaos) -> bool:
    chaos.fleet.system.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'caravan%'"
    )
    return True


FAILURES: dict[str, Callable[[Chaos], bool]] = {
    "worker process killed in mid-chunk": kill_mid_chunk,
    "worker process killed in mid-tool": kill_mid_tool,
    "worker killed between commit and publish": kill_between_commit_and_publish,
    "prefork child killed": kill_a_prefork_child,
    "prefork worker killed whole": kill_a_whole_worker,
    "web process killed": kill_a_web_process,
    "worker stopped beyond its lease": stop_a_worker_beyond_its_lease,
    "worker drained (SIGTERM)": drain_a_worker,
    "web process drained (SIGTERM)": drain_a_web_process,
    "Redis flushed": flush_redis,
    "Redis killed, restarted empty": restart_redis_empty,
    "Redis subscriptions cut": cut_subscriptions,
    "doorbells lost": lose_all_doorbells,
    "Redis hung": hang_redis,
    "Postgres killed, restarted": restart_postgres,
    "Postgres connections cut": cut_postgres_connections,
}
