"""The hot statements use their indexes: no sequential scan over what grows.

Plans are made with `enable_seqscan` off, so that a sequential scan means that no index would do, however few rows the
other tests have left.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from app.domain.errors import TurnFailure
from app.domain.turns import TurnStatus
from app.store import Store, admission, agents, claims, conversations, prune, responses, tool_requests, turns, workers
from tests.integration.store.asking import Asking
from tests.integration.store.seeds import OWNER, Seeds, inference_step, next_event, no_redis

ROWS = 3000
UNDER_WAY = re.compile(r"ix_turns_(queued|unfinished|worker|deadline|unwanted|active)\b")
"""Indexes of the turns that are under way; which of them is cheapest depends on what was there before."""
GROWING = {
    "turns", "event_segments", "journal", "tool_calls", "sessions", "agents", "idempotency_keys", "session_items",
    "tool_requests",
}  # fmt: skip


@pytest.fixture(scope="module")
def crowded(store: Store) -> Iterator[Seeds]:
    """Thousands of ended turns with a segment and a step each, in sessions of ten; one turn of each other status."""
    seeds = Seeds(store)
    session_id = seeds.session()
    with store.engine.begin() as connection:
        for statement in (
            """INSERT INTO sessions (session_id, agent_id, owner, name, next_number)
               SELECT gen_random_uuid(), agent_id, owner, 'bulk', 11 FROM sessions, generate_series(1, :rows / 10)
               WHERE session_id = :session""",
            """INSERT INTO turns
                 (turn_id, session_id, owner, number, status, request, tool_responses, queued_at, last_n)
               SELECT gen_random_uuid(), session_id, owner, number, 'completed', '{}', '{}', now(), 1
               FROM sessions, generate_series(1, 10) number WHERE name = 'bulk'""",
            """INSERT INTO event_segments SELECT turn_id, 1, n, '' FROM turns, generate_series(1, 2) n
               WHERE last_n = 1 AND fence = 0""",
            """INSERT INTO journal SELECT turn_id, 0, gen_random_uuid(), '{}' FROM turns
               WHERE last_n = 1 AND fence = 0""",
            "INSERT INTO tool_calls SELECT turn_id, 0, 0, 1 FROM turns WHERE last_n = 1 AND fence = 0",
        ):
            connection.execute(text(statement), {"rows": ROWS, "session": session_id})
    analyze(store)
    yield seeds
    with store.engine.begin() as connection:
        connection.execute(text("DELETE FROM sessions WHERE name = 'bulk'"))


def analyze(store: Store) -> None:
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def plans(store: Store, query: Callable[[Connection], Any]) -> list[str]:
    """The plan of each statement that `query` sends, rolled back."""
    found: list[str] = []
    with store.engine.connect() as connection:
        asking = False
        connection.execute(text("SET LOCAL enable_seqscan = off"))

        def explain(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: Any) -> None:
            nonlocal asking
            if asking:
                return
            asking = True
            with conn.connection.dbapi_connection.cursor() as own:
                own.execute("EXPLAIN " + statement, parameters)
                found.append("\n".join(row[0] for row in own.fetchall()))
            asking = False

        event.listen(connection, "before_cursor_execute", explain)
        query(connection)
        connection.rollback()
    return found


def scanned(plan: str) -> set[str]:
    """The growing tables that a plan reads from end to end."""
    scans = {line.split("Seq Scan on ")[1].split()[0] for line in plan.splitlines() if "Seq Scan on " in line}
    return scans & GROWING


def assert_indexed(store: Store, query: Callable[[Connection], Any]) -> list[str]:
    found = plans(store, query)
    assert found
    for plan in found:
        assert not scanned(plan), plan
    return found


def test_a_claim_reads_by_index(crowded: Seeds) -> None:
    """The turn by its id, the earlier ones of its session by theirs, and what goes with them."""
    turn_id, worker_id = crowded.turn(), crowded.worker()
    analyze(crowded.store)
    found = assert_indexed(crowded.store, lambda connection: claims.claim(connection, turn_id, worker_id, 60))
    assert "Index Scan" in found[0]


def test_a_second_claim_with_history_reads_by_index(crowded: Seeds) -> None:
    """Journal, ledger and earlier turns too."""
    session_id = crowded.session()
    crowded.complete(crowded.claimed(crowded.turn(session_id)))
    turn_id = crowded.turn(session_id)
    crowded.lose_worker(crowded.claimed(turn_id))
    worker_id = crowded.worker()
    analyze(crowded.store)
    found = assert_indexed(crowded.store, lambda connection: claims.claim(connection, turn_id, worker_id, 60))
    assert len(found) == 5


def test_recording_reads_by_index(crowded: Seeds) -> None:
    """The fenced update finds the turn by its id."""
    claim = crowded.claimed()
    analyze(crowded.store)
    assert_indexed(crowded.store, lambda connection: claims.record(connection, claim, [next_event(claim)]))


def test_accepting_reads_by_index(crowded: Seeds) -> None:
    """Key, session, the session's unfinished turns, the counts for the caps, the retried turn."""
    session_id = crowded.session()
    crowded.await_input(crowded.claimed(crowded.turn(session_id)))
    crowded.complete(crowded.claimed(crowded.turn(session_id)))
    crowded.turn(session_id)
    asked = replace(crowded.submission(session_id, documents=["new"]), idempotency_key=uuid.uuid4().hex, is_retry=True)
    analyze(crowded.store)
    found = assert_indexed(crowded.store, lambda connection: admission.accept(connection, asked, no_redis))
    assert any(UNDER_WAY.search(plan) for plan in found), found


def test_resuming_cancelling_and_pruning_read_by_index(crowded: Seeds) -> None:
    """Whatever the number of ended turns."""
    session_id = crowded.session()
    awaiting = crowded.await_input(crowded.claimed(crowded.turn(session_id))).turn_id
    answer = [{"call_id": "c1", "tool_name": "ask", "content": "yes"}]
    asked = crowded.resumption(awaiting, session_id, answer, uuid.uuid4().hex)
    failure = TurnFailure("cancelled", "Cancelled.")
    analyze(crowded.store)
    queries: list[Callable[[Connection], Any]] = [
        lambda connection: turns.cancel(connection, awaiting, failure, no_redis),
        lambda connection: admission.resume(connection, asked),
        lambda connection: admission.forget_keys(connection, 10),
        lambda connection: prune.prune_sessions(connection, 86_400, session_id),
        lambda connection: turns.session_turns(connection, session_id),
        lambda connection: agents.purge_deleted(connection, 0, 10),
    ]
    for query in queries:
        assert_indexed(crowded.store, query)


def test_upkeep_reads_tool_requests_by_index(crowded: Seeds) -> None:
    """As many are there as wait and run; each process asks every few seconds."""
    queries: list[Callable[[Connection], Any]] = [
        partial(tool_requests.to_ring, backing_off=True),
        lambda connection: tool_requests.forget_abandoned(connection, 300),
    ]
    for query in queries:
        assert_indexed(crowded.store, query)


def test_conversations_read_by_index(crowded: Seeds) -> None:
    session_id, item = str(uuid.uuid4()), {"id": "msg_1"}
    crowded.store.transact(conversations.create, OWNER, session_id, {}, [item])
    queries: list[Callable[[Connection], Any]] = [
        lambda connection: conversations.update_metadata(connection, OWNER, session_id, {}),
        lambda connection: conversations.list_items(connection, OWNER, session_id, "msg_1", 20, descending=True),
        lambda connection: conversations.delete_item(connection, OWNER, session_id, "msg_1"),
        lambda connection: conversations.items_of(connection, session_id),
        lambda connection: conversations.add_items(connection, OWNER, session_id, [{"id": "msg_2"}]),
        lambda connection: conversations.mark_deleted(connection, OWNER, session_id),
    ]
    for query in queries:
        assert_indexed(crowded.store, query)


def test_responses_read_by_index(crowded: Seeds) -> None:
    """Accepted (alone, in a conversation, as a retry, behind another), claimed, read, listed and deleted."""
    asking = Asking(crowded)
    talk = asking.conversation()
    first = asking.ended("one")
    retried, last = asking.ask("retried"), asking.ask("two", previous=first)
    talking, worker_id = asking.ask(talk=talk), crowded.worker()
    analyze(crowded.store)
    key = uuid.uuid4().hex
    accepted = [
        asking.submission("new", idempotency_key=key),
        asking.submission("new", talk),
        asking.submission("new", previous=first),
        asking.submission("retried", is_retry=True),
        asking.submission("new", talk, is_retry=True, idempotency_key=key),
    ]
    queries: list[Callable[[Connection], Any]] = [
        lambda connection: responses.get_response(connection, OWNER, first),
        lambda connection: responses.read_response(connection, OWNER, first),
        lambda connection: responses.input_items(connection, OWNER, last),
        lambda connection: responses.mark_response_deleted(connection, OWNER, last),
        lambda connection: responses.segment_end_before(connection, first, 5),
        lambda connection: responses.items_begun(connection, first),
        lambda connection: claims.claim(connection, last, worker_id, 60),
        lambda connection: claims.claim(connection, talking, worker_id, 60),
    ]
    queries += [partial(admission.accept_response, asked=asked) for asked in accepted]
    for query in queries:
        assert_indexed(crowded.store, query)
    found = plans(crowded.store, queries[-2])
    assert any("ix_turns_response" in plan for plan in found), found  # of the hash, or of the owner where he has few
    assert retried
    for after in (None, first):
        listing = partial(responses.list_responses, owner=OWNER, after=after, limit=20, model=None, descending=True)
        assert_indexed(crowded.store, listing)


def test_a_turn_takes_as_many_statements_in_a_long_session_as_in_a_short_one(crowded: Seeds) -> None:
    """Accept, claim, record, end and read, with two and with a thousand earlier turns."""
    short, long = (statements_of_a_turn(crowded, long_session(crowded, earlier)) for earlier in (2, 1000))
    assert short == long
    assert max(short.values()) <= 8, short


def long_session(seeds: Seeds, earlier: int) -> str:
    """A session with so many completed turns of one step each."""
    session_id = seeds.session()
    with seeds.store.engine.begin() as connection:
        for statement in (
            """INSERT INTO turns (turn_id, session_id, owner, number, status, request, tool_responses, queued_at, fence)
               SELECT gen_random_uuid(), session_id, owner, number, 'completed', '{"messages": []}', '{}', now(), 1
               FROM sessions, generate_series(1, :earlier) number WHERE session_id = :session""",
            """INSERT INTO journal SELECT turn_id, 0, gen_random_uuid(), '{"step_type": "inference"}' FROM turns
               WHERE session_id = :session""",
            "UPDATE sessions SET next_number = :earlier + 1 WHERE session_id = :session",
        ):
            connection.execute(text(statement), {"earlier": earlier, "session": session_id})
    return session_id


def statements_of_a_turn(seeds: Seeds, session_id: str) -> dict[str, int]:
    """How many statements each transaction of a plain turn sends."""
    counts: Counter[str] = Counter()
    asked, worker_id, what = seeds.submission(session_id), seeds.worker(), "accept"

    def count(*_: Any) -> None:
        counts[what] += 1

    event.listen(seeds.store.engine, "before_cursor_execute", count)
    try:
        seeds.submit(asked)
        what = "claim"
        claim = seeds.claimed(asked.turn_id, worker_id)
        what = "record"
        claim = seeds.record(claim, [next_event(claim)], step=inference_step(claim.turn_id))
        what = "end"
        seeds.complete(claim)
        what = "read"
        assert seeds.row(asked.turn_id).status == TurnStatus.COMPLETED
    finally:
        event.remove(seeds.store.engine, "before_cursor_execute", count)
    assert len(claim.past) >= 2
    return dict(counts)


@pytest.mark.parametrize(
    "query",
    [
        lambda connection: workers.to_ring(connection, backing_off=True),
        lambda connection: workers.overdue(connection, 300),
        workers.orphans,
    ],
    ids=["to_ring", "overdue", "orphans"],
)
def test_upkeep_reads_by_partial_indexes(crowded: Seeds, query: Callable[[Connection], Any]) -> None:
    """Each process asks every few seconds: the cost is that of the turns that are under way."""
    crowded.turn()
    crowded.kill(crowded.claimed().worker_id)
    crowded.await_input(crowded.claimed())
    analyze(crowded.store)
    found = assert_indexed(crowded.store, query)
    assert UNDER_WAY.search(found[0]), found[0]


def test_followers_read_by_index(crowded: Seeds) -> None:
    """Standings by turn id, segments by turn and position."""
    claim = crowded.claimed()
    claim = crowded.record(claim, [next_event(claim)])
    analyze(crowded.store)
    [plan] = assert_indexed(crowded.store, lambda connection: turns.standings(connection, [claim.turn_id]))
    assert "pk_turns" in plan
    [plan] = assert_indexed(
        crowded.store, lambda connection: turns.segments_after(connection, claim.turn_id, claim.last._replace(n=0), 8)
    )
    assert "pk_event_segments" in plan
    assert "Sort" not in plan


def test_ringing_the_next_turn_reads_by_index(crowded: Seeds) -> None:
    """The session's unfinished turns are in an index of their own."""
    session_id = crowded.session()
    crowded.turn(session_id)
    analyze(crowded.store)
    assert_indexed(crowded.store, lambda connection: turns.next_in_session(connection, session_id, 1))
