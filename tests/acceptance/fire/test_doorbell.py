"""The doorbell is lost, doubled, late, out of order: guarantee 2."""

from __future__ import annotations

import signal
import uuid

import pytest
import redis

from tests.acceptance.fire.system import (
    System,
    check_turn,
    requests_of,
)
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.scripted_model import ScriptedModel

TURNS = 5


def test_messages_may_be_lost_doubled_late_and_out_of_order(system: System, model: ScriptedModel) -> None:
    """One is lost, the others come 20 times in the wrong order, and again while their turns run and when they have
    ended, as a broker does whose visibility timeout is shorter than a turn (celery#5935, celery#6229): every turn runs
    once, in one attempt."""
    queue = redis.Redis.from_url(system.env["REDIS_URL"])
    for name in system.workers:
        system.stop_consuming(name)
    name = uuid.uuid4().hex
    scripts = [f"PART {number} | HOLD {name} | SAY {number}" for number in range(TURNS)]
    sessions = [system.session(number % 2) for number in range(TURNS)]
    streams = [session.accepted(script) for session, script in zip(sessions, scripts, strict=True)]
    second = sessions[0].accepted("SAY second")
    wait_until(lambda: queue.llen("caravan.turns") >= TURNS + 1, PATIENCE_SECONDS)
    messages = queue.lrange("caravan.turns", 0, -1)
    lost = next(message for message in messages if streams[-1].turn_id.encode() in message)
    kept = [message for message in reversed(messages) if message != lost]
    with queue.pipeline(transaction=True) as pipe:
        pipe.delete("caravan.turns")
        pipe.lpush("caravan.turns", *(20 * kept))
        pipe.execute()

    for worker in system.workers:
        system.consume(worker)
    # Two workers of three children have room for one more; the turn whose message is lost is rung again after 4 s.
    model.wait_held(name, TURNS, timeout=PATIENCE_SECONDS)
    queue.lpush("caravan.turns", *messages)
    wait_until(lambda: not queue.llen("caravan.turns"), PATIENCE_SECONDS)
    model.release(name)
    turns = [check_turn(session, stream) for session, stream in zip(sessions, streams, strict=True)]
    records = [system.records(stream.turn_id) for stream in streams]
    queue.lpush("caravan.turns", *messages)
    assert check_turn(sessions[0], second)["output_message"]["content"] == "second "
    wait_until(lambda: not queue.llen("caravan.turns"), PATIENCE_SECONDS)
    assert system.session().post("SAY last").ended()[-1].kind == "turn_complete"

    assert [turn["output_message"]["content"] for turn in turns] == [f"{number} {number} " for number in range(TURNS)]
    assert [stream.fences for stream in (*streams, second)] == [[1]] * (TURNS + 1)
    assert [len(requests_of(model, script)) for script in scripts] == [1] * TURNS
    assert [system.records(stream.turn_id) for stream in streams] == records


@pytest.mark.parametrize("pool", ["turn-pool"], indirect=True)
def test_a_worker_rung_twice_for_a_turn_hands_it_over(system: System, model: ScriptedModel) -> None:
    """A second message that reaches the very worker that runs the turn does not make it forget the turn when it is
    asked to stop."""
    queue = redis.Redis.from_url(system.env["REDIS_URL"])
    for worker in system.workers:
        system.stop_consuming(worker)
    session, gate = system.session(), uuid.uuid4().hex
    stream = session.accepted(f"PART a | HOLD {gate} | SAY b")
    wait_until(lambda: queue.llen("caravan.turns"), PATIENCE_SECONDS)
    message = queue.lrange("caravan.turns", 0, -1)[0]
    system.consume("a")
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    queue.lpush("caravan.turns", message)
    wait_until(lambda: "not claimable" in system.workers["a"].output(), PATIENCE_SECONDS)
    system.consume("b")
    system.workers["a"].signal(signal.SIGTERM)
    stream.wait_attempt(2)
    assert (
        system.rows("SELECT failures FROM turns WHERE turn_id = :turn_id", turn_id=stream.turn_id)[0]["failures"] == 0
    )
    model.release(gate)
    assert check_turn(session, stream)["output_message"]["content"] == "a b "
    assert system.workers["a"].wait_ended() == 0
