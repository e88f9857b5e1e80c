"""A worker stands still for longer than its lease, and goes on: guarantee 3."""

from __future__ import annotations

import signal
import time
import uuid
from typing import Any

import httpx

from tests.acceptance.fire.system import (
    Session,
    System,
    blocks,
    check_stream,
    check_turn,
    requests_of,
    signal_group,
)
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.scripted_model import ScriptedModel


def test_a_stopped_worker_that_goes_on_changes_nothing(system: System, model: ScriptedModel) -> None:
    """SIGSTOP beyond the lease, with three turns running. One is taken by another worker, one fails because its time
    is over, one is cancelled because its session is deleted. The worker that wakes up, with the rest of each answer
    in its sockets, records nothing, and no reader gets anything from it; it registers anew and works again."""
    system.stop_consuming("b")
    gate = uuid.uuid4().hex
    scripts = {name: f"PARTS 5 | HOLD {gate} | SAY {name}" for name in ("taken", "overdue", "deleted")}
    sessions = {name: system.session(number % 2) for number, name in enumerate(scripts)}
    streams = {name: sessions[name].accepted(script) for name, script in scripts.items()}
    model.wait_held(gate, 3, timeout=PATIENCE_SECONDS)
    for stream in streams.values():
        stream.wait_for(6)
    worker = system.workers["a"]
    processes = {sessions[name].owner(stream.turn_id) for name, stream in streams.items()}

    signal_group(worker, signal.SIGSTOP)
    stopped_at = time.monotonic()
    overdue = "UPDATE turns SET deadline_at = clock_timestamp() WHERE turn_id = :turn_id"
    system.execute(overdue, turn_id=streams["overdue"].turn_id)
    assert httpx.delete(sessions["deleted"].url, timeout=60).status_code in (200, 204)
    system.consume("b")
    model.release(gate)
    turn = check_turn(sessions["taken"], streams["taken"])
    print(f"taken: the next attempt's first event after {streams['taken'].wait_attempt(2) - stopped_at:.2f} s")
    check_ended(streams["overdue"].ended(), "turn_timeout")
    check_ended(streams["deleted"].ended(), "cancelled")
    records = [system.records(stream.turn_id) for stream in streams.values()]
    replays = replayed(sessions, streams)

    system.stop_consuming("b")
    signal_group(worker, signal.SIGCONT)
    wait_until(lambda: worker.output().count("drops its turns and registers anew") >= len(processes), PATIENCE_SECONDS)
    for turn_id in [stream.turn_id for stream in streams.values()]:
        wait_until(lambda lost=f"{turn_id}] attempt 1: lost": lost in worker.output(), PATIENCE_SECONDS)  # type: ignore[misc]
    again = system.session()
    stream = again.post("SAY again")
    stream.ended()
    assert again.owner(stream.turn_id) in [worker.pid, *worker.children()]
    assert [system.records(stream.turn_id) for stream in streams.values()] == records
    assert replayed(sessions, streams) == replays
    assert turn["output_message"]["content"] == "w0 w1 w2 w3 w4 taken "
    assert [len(requests_of(model, script)) for script in scripts.values()] == [2, 1, 1]


def check_ended(heard: list[Any], code: str) -> None:
    check_stream(heard)
    assert heard[-1].payload["error"]["code"] == code


def replayed(sessions: dict[str, Session], streams: dict[str, Any]) -> list[list[bytes]]:
    """What is replayed of the turns that are not deleted; it equals what was heard."""
    names = ("taken", "overdue")
    replays = [blocks(sessions[name].replay(streams[name].turn_id)) for name in names]
    assert replays == [blocks(streams[name].heard) for name in names]
    return replays
