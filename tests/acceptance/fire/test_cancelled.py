"""Cancelling while things are down: guarantee 7."""

from __future__ import annotations

import signal
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx

from app.local.valkey import Valkey
from tests.acceptance.fire.system import Session, Stream, System, check_stream, signal_group
from tests.support import PATIENCE_SECONDS, wait_until
from tests.support.scripted_model import ScriptedModel


def cancel(session: Session, turn_id: str) -> str:
    answer = httpx.post(f"{session.url}/turn/{turn_id}/cancel", timeout=60)
    assert answer.status_code in (200, 202), answer.text
    return str(answer.json()["status"])


def cancelled(session: Session, turn_id: str) -> None:
    """At once, or soon after, if its worker is slow to answer."""
    if cancel(session, turn_id) == "running":
        wait_until(lambda: session.status(turn_id) != "running")
    assert session.status(turn_id) == "cancelled"


def check_cancelled(session: Session, stream: Stream) -> None:
    """The stream ends with it, the stored turn says it, asking again changes nothing, and the session goes on."""
    heard = stream.ended()
    check_stream(heard)
    assert heard[-1].payload["error"]["code"] == "cancelled"
    assert session.status(stream.turn_id) == "cancelled"
    assert cancel(session, stream.turn_id) == "cancelled"
    assert session.post("SAY next").ended()[-1].kind == "turn_complete"


def test_a_turn_is_cancelled_on_another_web_process_while_redis_is_down(
    system: System, model: ScriptedModel, fire_valkey: Valkey
) -> None:
    """Its worker learns it with its next renewal; the model's stream is closed."""
    gate = uuid.uuid4().hex
    session = system.session()
    stream = session.accepted(f"PART a | HOLD {gate} | SAY b")
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    fire_valkey.kill()
    try:
        other = system.elsewhere(session)
        cancel(other, stream.turn_id)
        wait_until(lambda: other.status(stream.turn_id) == "cancelled", PATIENCE_SECONDS)
        wait_until(lambda: model.open_streams() == 0, PATIENCE_SECONDS)
    finally:
        fire_valkey.start()
    check_cancelled(session, stream)


def test_cancels_are_heard_after_the_subscriptions_were_cut(
    system: System, model: ScriptedModel, fire_valkey: Valkey
) -> None:
    """Every worker listens again by itself, and says in its log that it did not (open-webui#28909)."""
    logs = {name: worker.output().count("cancellations come with the lease") for name, worker in system.workers.items()}
    fire_valkey.ask("CLIENT KILL TYPE pubsub")
    for name, worker in system.workers.items():
        told = logs[name]
        wait_until(
            lambda w=worker, n=told: w.output().count("cancellations come with the lease") > n,  # type: ignore[misc]
            PATIENCE_SECONDS,
        )
    gate = uuid.uuid4().hex
    session = system.session()
    stream = session.accepted(f"PART a | HOLD {gate} | SAY b")
    model.wait_held(gate, timeout=PATIENCE_SECONDS)
    cancelled(session, stream.turn_id)
    check_cancelled(session, stream)


def test_a_cancelled_turn_whose_worker_dies_ends_cancelled(system: System, model: ScriptedModel) -> None:
    """The request outlives the worker, which was stopped and could not hear it: the turn is not tried again. And one
    whose worker died before the request, and is between two attempts, is cancelled all the same."""
    gates = [uuid.uuid4().hex for _ in range(2)]
    sessions = [system.session(number) for number in range(2)]
    streams = [session.accepted(f"PART a | HOLD {gate} | SAY b") for session, gate in zip(sessions, gates, strict=True)]
    for gate in gates:
        model.wait_held(gate, timeout=PATIENCE_SECONDS)
    for worker in system.workers.values():
        signal_group(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        cancelling = thread.submit(cancel, sessions[0], streams[0].turn_id)
        asked = "SELECT 1 FROM turns WHERE turn_id = :turn_id AND cancel_requested_at IS NOT NULL"
        wait_until(lambda: system.rows(asked, turn_id=streams[0].turn_id), PATIENCE_SECONDS)
        for worker in system.workers.values():
            worker.kill_all()
        cancel(sessions[1], streams[1].turn_id)
        assert cancelling.result(PATIENCE_SECONDS) in ("running", "cancelled")
    for session, stream in zip(sessions, streams, strict=True):
        wait_until(lambda s=session, t=stream.turn_id: s.status(t) == "cancelled", PATIENCE_SECONDS)  # type: ignore[misc]
        assert stream.fences[0] == 1
    system.start_workers("a", "b")
    for session, stream in zip(sessions, streams, strict=True):
        check_cancelled(session, stream)
