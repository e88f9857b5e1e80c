"""The system under chaos: 2 web processes, 3 workers of both pools, servers of its own; a keeper restarts the dead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.local.postgres import Postgres
from app.local.valkey import Valkey
from tests.acceptance.fire.system import System
from tests.conftest import create_database
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL, Process
from tests.support.proxy import TcpProxy
from tests.support.scripted_model import ScriptedModel

POOLS = {"a": TURN_POOL, "b": TURN_POOL, "c": ("-c", "4")}
"""Worker `a` speaks to Redis through a proxy as far as events go."""

SHORT = {
    "LEASE_SECONDS": "2",
    "HEARTBEAT_SECONDS": "0.5",
    "UPKEEP_SECONDS": "0.5",
    "SILENCE_SECONDS": "1",
    "DRAIN_SECONDS": "2",
    "WEB_GRACE_SECONDS": "1",
    "PING_SECONDS": "2",
    # Chaos kills at random: what is asked for is that nothing is lost, not that three in a row end a turn.
    "MAX_WORKER_LOSSES": "20",
}
KEEP_SECONDS = 0.2


@dataclass
class Fleet:
    """All that runs; `stopped` processes are left alone by the keeper."""

    system: System
    postgres: Postgres
    valkey: Valkey
    model: ScriptedModel
    mcp: McpServer
    events: TcpProxy
    restarts: int = 0

    @property
    def processes(self) -> list[Process]:
        return [*self.system.webs, *self.system.workers.values()]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restarts whatever has died, as compose or Kubernetes would."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(KEEP_SECONDS):
                for process in self.processes:
                    if not process.running():
                        process.start()
                        self.restarts += 1

        keeper = threading.Thread(target=keep, name="keeper", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            stop.set()
            keeper.join()


@contextmanager
def running_fleet(directory: Path) -> Iterator[Fleet]:
    """Everything up, below a directory that all may enter."""
    with ExitStack() as opened:
        postgres = opened.enter_context(Postgres(directory / "postgres", fsync=True))
        valkey = opened.enter_context(Valkey(directory / "valkey"))
        model, mcp = opened.enter_context(ScriptedModel()), opened.enter_context(McpServer())
        events = opened.enter_context(TcpProxy("127.0.0.1", valkey.port))
        env = {
            **SHORT,
            "DATABASE_URL": migrated(postgres),
            "REDIS_URL": valkey.url,
            "INFERENCE_URL": model.url,
            "INFERENCE_MODEL": "scripted",
            "XDG_DATA_HOME": str(directory / "data"),
        }
        proxied = {"REDIS_URL": f"redis://127.0.0.1:{events.port}/0", "CELERY_BROKER_URL": valkey.url}
        system = System(env, directory, {"a": proxied}, pools=POOLS)
        opened.callback(system.stop)
        system.start_webs(2)
        system.start_workers(*POOLS)
        yield Fleet(system, postgres, valkey, model, mcp, events)


def migrated(postgres: Postgres) -> str:
    from app.store import migrate

    url = create_database(postgres.url, "chaos")
    migrate.upgrade(url)
    return url
