"""TLS and passwords to Postgres and Redis, checked against an authority, for every library that connects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import redis
from celery import Celery
from llama_stack_client import LlamaStackClient
from sqlalchemy.engine import make_url

from app.local.valkey import Valkey
from tests.acceptance.conftest import Agent
from tests.acceptance.test_processes import WEB, outcome
from tests.support.nodes import TURN_POOL, web_process, worker_node
from tests.support.tls import TlsFront, make_certificate


def test_a_turn_runs_over_tls_with_passwords(
    environment: dict[str, str], open_path: Path, model: object, migrated_database: Callable[[str], str]
) -> None:
    """`rediss://` with user and password for log and broker; `sslmode=verify-full` for all three Postgres drivers."""
    certificate = make_certificate(open_path)
    database = make_url(migrated_database("caravan_tls"))
    assert database.port is not None
    with (
        Valkey(open_path / "valkey") as valkey,
        TlsFront(valkey.port, certificate, postgres=False) as redis_front,
        TlsFront(database.port, certificate, postgres=True) as postgres_front,
    ):
        with redis.Redis(port=valkey.port) as plain:
            plain.acl_setuser(
                "caravan", enabled=True, passwords=["+p@ss/word"], keys="*", channels="*", commands=["+@all"]
            )
            plain.acl_setuser("default", enabled=False)
        authority = certificate[0]
        secure = database.set(host="localhost", port=postgres_front.port)
        secure = secure.update_query_dict({"sslmode": "verify-full", "sslrootcert": str(authority)})
        settings = environment | {
            "DATABASE_URL": secure.render_as_string(hide_password=False),
            "REDIS_URL": f"rediss://caravan:p%40ss%2Fword@localhost:{redis_front.port}/0?ssl_ca_certs={authority}",
        }
        url, web = web_process(settings, open_path / "web.log")
        worker = worker_node(TURN_POOL, settings, open_path / "worker.log", Celery())
        try:
            with web:
                assert worker.ready()
                with LlamaStackClient(base_url=url, max_retries=0) as client:
                    assert Agent(client).answer("SAY all is encrypted") == "all is encrypted "
                conversation = httpx.post(f"{url}/v1/conversations", json={}, timeout=60)
                assert conversation.status_code == 200, "asyncpg"
        finally:
            worker.teardown()
        assert redis_front.connections
        assert postgres_front.connections
        for log in ("web.log", "worker.log"):
            assert "p%40ss" not in (open_path / log).read_text()
            assert "p@ss" not in (open_path / log).read_text()


def test_a_certificate_of_nobody_is_refused(postgres_url: str, open_path: Path) -> None:
    """Without the authority nothing is sent, and the one line says why."""
    database = make_url(postgres_url)
    assert database.port is not None
    with TlsFront(database.port, make_certificate(open_path), postgres=True) as front:
        other = open_path / "other"
        other.mkdir()
        stranger, _ = make_certificate(other)
        secure = database.set(host="localhost", port=front.port)
        secure = secure.update_query_dict({"sslmode": "verify-full", "sslrootcert": str(stranger)})
        status, [line] = outcome(
            WEB, DATABASE_URL=secure.render_as_string(hide_password=False), INFERENCE_MODEL="scripted"
        )
    assert status == 1
    assert "certificate verify failed" in line
