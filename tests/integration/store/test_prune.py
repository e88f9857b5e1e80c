"""Old sessions go as a whole; what somebody uses, or may still use, stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sqlalchemy.engine import make_url

from app.domain.errors import NotFound
from app.store import prune
from tests.integration.store.seeds import Seeds
from tests.support.nodes import ROOT

DAY = 86_400


def sessions(seeds: Seeds) -> set[str]:
    found = seeds.scalar("SELECT string_agg(session_id::text, ',') FROM sessions")
    return set(found.split(",")) if found else set()


def aged(seeds: Seeds, session_id: str, days: float) -> str:
    """The session and its turns are so old."""
    for table, column in (("sessions", "created_at"), ("turns", "completed_at"), ("turns", "created_at")):
        seeds.scalar(
            f"UPDATE {table} SET {column} = {column} - make_interval(secs => :s) WHERE session_id = :id RETURNING 1",
            s=days * DAY,
            id=session_id,
        )
    return session_id


def finished_turn(seeds: Seeds, session_id: str) -> str:
    claim = seeds.claimed(seeds.turn(session_id))
    seeds.complete(claim)
    seeds.scalar("UPDATE turns SET completed_at = now() WHERE turn_id = :id RETURNING 1", id=claim.turn_id)
    return claim.turn_id


def prune_all(seeds: Seeds, older_than_seconds: float) -> int:
    deleted, after = seeds.store.transact(prune.prune_sessions, older_than_seconds, None)
    while after is not None:
        more, after = seeds.store.transact(prune.prune_sessions, older_than_seconds, after)
        deleted += more
    return deleted


def test_sessions_idle_for_long_go_with_all_that_they_hold(seeds: Seeds) -> None:
    """By the end of the last turn: a session that had a turn yesterday keeps its first one of last year."""
    used, idle, empty, fresh = (seeds.session() for _ in range(4))
    finished_turn(seeds, used)
    idle_turn = finished_turn(seeds, idle)
    for session_id in (used, idle, empty):
        aged(seeds, session_id, 40)
    finished_turn(seeds, used)
    assert seeds.store.transact(prune.idle_sessions, 30 * DAY) == 2
    assert prune_all(seeds, 30 * DAY) == 2
    left = sessions(seeds)
    assert {used, fresh} <= left
    assert not {idle, empty} & left
    with pytest.raises(NotFound):
        seeds.row(idle_turn)
    assert seeds.events(idle_turn) == []


def test_unfinished_turns_keep_their_session(seeds: Seeds) -> None:
    """Queued, running or awaiting input, however old; also behind a later one that was cancelled."""
    queued, running, awaiting = kept = [seeds.session() for _ in range(3)]
    seeds.turn(queued)
    seeds.claimed(seeds.turn(running))
    seeds.await_input(seeds.claimed(seeds.turn(awaiting)))
    seeds.cancel(seeds.turn(running))
    for session_id in kept:
        aged(seeds, session_id, 400)
    prune_all(seeds, DAY)
    assert set(kept) <= sessions(seeds)


def test_the_command(seeds: Seeds, store_url: str) -> None:
    """`caravan prune --older-than`: counts, deletes, and says what is wrong with an age."""
    old = aged(seeds, seeds.session(), 500)

    def caravan(*options: str) -> tuple[int, str]:
        url = make_url(store_url).set(drivername="postgresql").render_as_string(hide_password=False)
        env = {**os.environ, "DATABASE_URL": url, "INFERENCE_MODEL": "m"}
        program = "from app.cli import main; main()"
        command = [sys.executable, "-c", program, "prune", *options]
        ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
        return ran.returncode, ran.stdout + ran.stderr

    assert caravan("--older-than", "400d", "--dry-run") == (0, "1 sessions have been idle for 400d\n")
    assert old in sessions(seeds)
    assert caravan("--older-than", "400d") == (0, "1 sessions that were idle for 400d are deleted\n")
    assert old not in sessions(seeds)
    status, said = caravan("--older-than", "soon")
    assert (status, "such as 90d" in said) == (1, True)
    status, said = caravan("--older-than", "99999999999999999999d", "--dry-run")
    assert (status, "at most 365000d" in said, "Traceback" in said) == (1, True, False)
