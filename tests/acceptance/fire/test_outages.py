"""Redis is flushed, killed, hung or cut off in mid-turn: no turn is lost, and no event while the worker lives."""

from __future__ import annotations

import os
import signal
import time
import uuid

import pytest

from app.local.valkey import Valkey
from tests.acceptance.fire.system import (
    System,
    blocks,
    check_turn,
    requests_of,
)
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.mcp_server import McpServer
from tests.support.scripted_model import ScriptedModel

STREAMING = "CHUNKS 100 20"


def time_to_first_event(system: System) -> float:
    """Seconds from now to the first event of a turn that is posted now."""
    posted = time.monotonic()
    stream = system.session().post("SAY again")
    stream.wait_for(1)
    stream.ended()
    return stream.heard[0].at - posted


def test_a_flushed_redis_loses_no_event(system: System, fire_valkey: Valkey, model: ScriptedModel) -> None:
    """Three flushes while chunks stream: the open stream has every chunk, once, and equals the replay."""
    session = system.session()
    stream = session.accepted(STREAMING)
    for heard in (20, 45, 70):
        stream.wait_for(heard)
        fire_valkey.flush()
    turn = check_turn(session, stream)
    assert turn["output_message"]["content"] == "".join(f"w{number} " for number in range(100))
    assert stream.fences == [1]
    assert len(requests_of(model, STREAMING)) == 1


def test_a_redis_restarted_empty_loses_nothing(system: System, fire_valkey: Valkey, model: ScriptedModel) -> None:
    """Three outages in a row: the running turn streams on, and workers consume again by themselves (celery#10205)."""
    for outage in range(3):
        session, gate = system.session(), uuid.uuid4().hex
        script = f"PARTS 20 20 | HOLD {gate} | CHUNKS 20 20"
        stream = session.accepted(script)
        stream.wait_for(10)
        fire_valkey.kill()
        queued = system.session().accepted("SAY queued in the outage")
        model.wait_held(gate, timeout=PATIENCE_SECONDS)
        fire_valkey.start()
        print(f"outage {outage}: the next turn's first event after {time_to_first_event(system):.2f} s")
        model.release(gate)
        check_turn(session, stream)
        assert stream.fences == [1]
        assert len(requests_of(model, script)) == 1
        assert queued.ended()[-1].kind == "turn_complete"


@pytest.mark.parametrize("pool", ["prefork"], indirect=True)
def test_a_redis_that_hangs_loses_nothing(system: System, fire_valkey: Valkey, model: ScriptedModel) -> None:
    """10 s without an answer, connections open all the while: turns go on, those posted meanwhile are accepted soon,
    and run. (In both pools it is the worker's main process that consumes, so one is enough here.)"""
    session, gate = system.session(), uuid.uuid4().hex
    stream = session.accepted(f"PARTS 20 20 | HOLD {gate} | CHUNKS 20 20")
    stream.wait_for(10)
    sessions = [system.session() for _ in range(5)]
    assert fire_valkey.pid
    os.kill(fire_valkey.pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        posted = [each.post("SAY posted meanwhile") for each in sessions]
        wait_until(lambda: all(each.turn_id for each in posted), PATIENCE_SECONDS)
        print(f"hang: 5 turns accepted after {time.monotonic() - stopped_at:.2f} s")
        model.wait_held(gate, timeout=PATIENCE_SECONDS)
        model.release(gate)
        wait_until(lambda: time.monotonic() > stopped_at + 10, 60)
    finally:
        os.kill(fire_valkey.pid, signal.SIGCONT)
    print(f"hang: the next turn's first event after {time_to_first_event(system):.2f} s")
    assert check_turn(session, stream)["output_message"]["content"].endswith("w19 ")
    assert stream.fences == [1]
    assert [each.ended()[-1].kind for each in posted] == ["turn_complete"] * 5


def test_broker_connections_that_are_cut_are_made_again(system: System, fire_valkey: Valkey) -> None:
    """CLIENT KILL of every connection, several times over."""
    for cut in range(3):
        fire_valkey.ask("CLIENT KILL TYPE normal")
        fire_valkey.ask("CLIENT KILL TYPE pubsub")
        print(f"cut {cut}: the next turn's first event after {time_to_first_event(system):.2f} s")


def test_a_worker_and_redis_lost_at_once_cost_deltas(
    system: System, fire_valkey: Valkey, model: ScriptedModel, mcp: McpServer
) -> None:
    """While Redis stays down, workers with room take the turn of the killed one, and one that is posted, without a
    message, and streams go on from Postgres. Replay lacks the deltas of the step that was under way, and nothing else;
    the numbers of events leap."""
    session, gate, key = system.session(toolgroups=[system.toolgroup(mcp)]), uuid.uuid4().hex, uuid.uuid4().hex
    script = f'CALL count {{"key": "{key}"}} | PARTS 5 | HOLD {gate} | SAY done'
    system.stop_consuming("b")
    stream = session.accepted(script)
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    wait_until(lambda: b'"w4 "' in b"".join(blocks(stream.heard[-1:])), PATIENCE_SECONDS)
    fire_valkey.kill()
    killed_at = time.monotonic()
    system.workers["a"].kill_all()
    recorded = max(place for place, kind in enumerate(stream.kinds) if kind == "step_complete")
    under_way = stream.heard[recorded + 1 :]
    posted = system.session().accepted("SAY posted")
    model.release(gate)
    try:
        ended = [each.ended()[-1] for each in (stream, posted)]
        print(f"without Redis: the turns ended after {[round(each.at - killed_at, 2) for each in ended]} s")
    finally:
        fire_valkey.start()
    assert [each.kind for each in ended] == ["turn_complete"] * 2
    turn = check_turn(session, stream, lost_from_replay=under_way)
    assert turn["output_message"]["content"] == "w0 w1 w2 w3 w4 done "
    assert stream.fences == [1, 3]
    assert stream.heard[-1].id.n > 1_000_000
    assert mcp.counts() == {key: 1}
    assert len(requests_of(model, script)) == 3
