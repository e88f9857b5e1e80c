"""What growth costs: the hot transactions on a small and on a large database, as ratios of one run.

    python -m tests.benchmarks.growth --turns 1000000

Seeds by SQL, in sessions of ten turns, each turn with two steps, a ledger entry, a key and two segments.
Fails if a plan of the large database reads a growing table from end to end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.engine import make_url

from app.domain.events import EventId
from app.domain.turns import TurnStatus
from app.local.postgres import Postgres
from app.store import Store, admission, agents, claims, migrate, turns, workers
from tests.conftest import create_database
from tests.integration.store.seeds import OWNER, Seeds, inference_step, next_event, no_redis

REPEATS = 200
SMALL = 1000
GROWING = {"turns", "event_segments", "journal", "tool_calls", "sessions", "idempotency_keys"}

SEED = (
    """INSERT INTO sessions (session_id, agent_id, owner, name, next_number)
       SELECT gen_random_uuid(), :agent, :owner, 'bulk', 11 FROM generate_series(1, :turns / 10)""",
    """INSERT INTO turns (turn_id, session_id, owner, number, status, request, tool_responses, queued_at, completed_at,
                          fence, last_fence, last_n)
       SELECT gen_random_uuid(), session_id, owner, number, 'completed', '{"messages": []}', '{}', now(), now(),
              1, 1, 20
       FROM sessions, generate_series(1, 10) number WHERE name = 'bulk'""",
    """INSERT INTO journal SELECT turn_id, ordinal, gen_random_uuid(), '{"step_type": "inference"}' FROM turns,
       generate_series(0, 1) ordinal""",
    "INSERT INTO tool_calls SELECT turn_id, 0, 0, 1 FROM turns",
    "INSERT INTO event_segments SELECT turn_id, 1, 10 * n, '' FROM turns, generate_series(1, 2) n",
    """INSERT INTO idempotency_keys SELECT owner, turn_id::text, '', turn_id FROM turns""",
)


class Ground:
    """A seeded database, and the transactions that are timed on it."""

    def __init__(self, store: Store, count: int) -> None:
        self.seeds = Seeds(store)
        self.store = store
        agent_id = self.seeds.agent()
        with store.engine.begin() as connection:
            for statement in SEED:
                connection.execute(text(statement), {"turns": count, "agent": agent_id, "owner": OWNER})
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
        self.worker_id = self.seeds.worker(3600)
        self.plans: dict[str, set[str]] = {}

    def once(self) -> dict[str, float]:
        """Milliseconds of each transaction of a turn's life, in a new session."""
        session_id = self.seeds.session()
        asked = replace(self.seeds.submission(session_id), idempotency_key=uuid.uuid4().hex)
        took: dict[str, float] = {}

        def timed(what: str, query: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            answer = self.store.transact(query, *arguments, **more)
            took[what] = (time.perf_counter() - started) * 1000
            return answer

        timed("accept", admission.accept, asked, no_redis)
        claim = timed("claim", claims.claim, asked.turn_id, self.worker_id, 600.0)
        claim = timed("record", claims.record, claim, [next_event(claim)], step=inference_step(asked.turn_id))
        timed("standings", turns.standings, [asked.turn_id])
        timed("segments", turns.segments_after, asked.turn_id, EventId(0, 0), 100)
        timed("ring", workers.to_ring, backing_off=True)
        timed("overdue", workers.overdue, 300.0)
        timed("orphans", workers.orphans)
        timed("read session", turns.session_turns, session_id)
        timed("end", claims.record, claim, [next_event(claim)], end=claims.LegEnd(TurnStatus.COMPLETED))
        timed("forget keys", admission.forget_keys, 100)
        timed("purge deleted", agents.purge_deleted, 30.0, 100)
        return took

    @contextmanager
    def scans_seen(self) -> Iterator[set[str]]:
        """The growing tables that a plan reads from end to end."""
        seen: set[str] = set()

        def explain(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if not statement.lstrip().upper().startswith(("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")):
                return
            with connection.connection.dbapi_connection.cursor() as own:  # type: ignore[union-attr]
                own.execute("EXPLAIN " + statement, parameters)
                lines = [row[0] for row in own.fetchall()]
            seen.update(line.split("Seq Scan on ")[1].split()[0] for line in lines if "Seq Scan on " in line)

        event.listen(self.store.engine, "before_cursor_execute", explain)
        try:
            yield seen
        finally:
            event.remove(self.store.engine, "before_cursor_execute", explain)

    def medians(self) -> dict[str, float]:
        rounds = [self.once() for _ in range(REPEATS)]
        return {what: statistics.median(each[what] for each in rounds) for what in rounds[0]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description="What growth costs.")
    parser.add_argument("--turns", type=int, default=1_000_000, help="ended turns in the large database")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="caravan-growth-") as directory:
        Path(directory).chmod(0o755)
        with Postgres(Path(directory) / "postgres", fsync=False) as postgres:
            grounds = [Ground(store_of(postgres, f"growth_{count}"), count) for count in (SMALL, chosen.turns)]
            small, large = (ground.medians() for ground in grounds)
            with grounds[1].scans_seen() as scans:
                grounds[1].once()
            for ground in grounds:
                ground.store.close()
    print(f"{'transaction':<16}{SMALL:>12} turns{chosen.turns:>14} turns   ratio")
    for what, took in small.items():
        print(f"{what:<16}{took:>12.2f} ms   {large[what]:>14.2f} ms   {large[what] / took:>6.2f}")
    scanned = scans & GROWING
    print(f"read from end to end: {', '.join(sorted(scanned)) or 'nothing that grows'}")
    return 1 if scanned else 0


def store_of(postgres: Postgres, name: str) -> Store:
    url = create_database(postgres.url, name)
    migrate.upgrade(url)
    opened = make_url(url).set(drivername="postgresql+psycopg2")
    return Store(opened, pool_size=2, name="growth", transaction_seconds=3600)


if __name__ == "__main__":
    sys.exit(main())
