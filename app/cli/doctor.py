"""`caravan doctor`: tries every server that the settings name, and says what to do about those that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from app.settings import Settings

TIMEOUT_SECONDS = 5
TRIAL_SECONDS = 60


@dataclass(frozen=True)
class Finding:
    """What one check found; `hint` says what to do about a failure."""

    ok: bool
    text: str
    hint: str = ""


def doctor() -> None:
    """Check the settings and every server that they name; status 1 if anything is wrong."""
    from app.settings import SettingsError, get_settings

    try:
        settings = get_settings()
    except SettingsError as error:
        _tell("settings", Finding(False, str(error), "`caravan settings --markdown` lists them all"))
        raise typer.Exit(1) from None
    _tell("settings", Finding(True, "valid"))
    findings = [_run(name, check, settings) for name, check in CHECKS.items()]
    if not all(findings):
        raise typer.Exit(1)


def _run(name: str, check: Callable[[Settings], Finding], settings: Settings) -> bool:
    try:
        finding = check(settings)
    except Exception as error:  # whatever a driver raises is the finding
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        finding = Finding(False, reason, HINTS[name])
    _tell(name, finding)
    return finding.ok


def _tell(name: str, finding: Finding) -> None:
    hint = f"  → {finding.hint}" if finding.hint else ""
    print(f"{'ok  ' if finding.ok else 'FAIL'}  {name:<9} {finding.text}{hint}", flush=True)


def _postgres(settings: Settings) -> Finding:
    from app.settings import SettingsError
    from app.store import Store, migrate

    store = Store(settings.sqlalchemy_url, pool_size=1, name="doctor")
    try:
        return Finding(True, f"reachable, revision {store.transact(migrate.check)}")
    except SettingsError as error:
        return Finding(False, f"reachable, but {error}")
    finally:
        store.close()


def _redis(settings: Settings) -> Finding:
    from redis import Redis
    from redis.exceptions import ResponseError

    with Redis.from_url(
        settings.redis_url.get_secret_value(), socket_connect_timeout=TIMEOUT_SECONDS, socket_timeout=TIMEOUT_SECONDS
    ) as redis:
        redis.ping()
        try:
            policy = redis.info("memory").get("maxmemory_policy", "unknown")
        except ResponseError:
            policy = "unknown"
    if policy == "unknown":
        return Finding(True, "reachable; its maxmemory-policy is hidden, see that it is noeviction")
    if policy != "noeviction":
        hint = "set maxmemory-policy to noeviction, lest events and messages vanish"
        return Finding(False, f"reachable, but its maxmemory-policy is {policy}", hint)
    return Finding(True, "reachable, maxmemory-policy noeviction")


def _broker(settings: Settings) -> Finding:
    from celery import Celery

    with Celery(broker=settings.broker_url).connection_for_write(connect_timeout=TIMEOUT_SECONDS) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=TIMEOUT_SECONDS)
        return Finding(True, f"reachable, {connection.transport.driver_type}")


def _workers(settings: Settings) -> Finding:
    from app.store import Store
    from app.store.workers import live_workers

    store = Store(settings.sqlalchemy_url, pool_size=1, name="doctor")
    try:
        workers = store.transact(live_workers)
    finally:
        store.close()
    if not workers:
        return Finding(False, "none is alive, so no turn is run", "start one: `celery -A tasks worker`")
    return Finding(True, ", ".join(f"{worker.name} ({worker.running} running)" for worker in workers))


def _model(settings: Settings) -> Finding:
    import httpx

    if settings.llama_stack_config:
        return Finding(True, f"models are those of {settings.llama_stack_config}; not checked")
    key = settings.inference_api_key.get_secret_value() if settings.inference_api_key else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{settings.inference_url}/models"
    answer = httpx.get(url, headers=headers, timeout=TIMEOUT_SECONDS)
    if answer.status_code != httpx.codes.OK:
        return Finding(False, f"{url} answered {answer.status_code}", HINTS["model"])
    listed = {str(model["id"]) for model in answer.json()["data"]}
    # Ollama lists `llama3.2:latest` for what it answers to as `llama3.2`.
    missing = [name for name in settings.inference_model if not {name, f"{name}:latest"} & listed]
    if missing:
        known = ", ".join(sorted(listed)) or "nothing"
        return Finding(False, f"does not list {', '.join(missing)}", f"INFERENCE_MODEL must name some of: {known}")
    return Finding(True, f"lists {', '.join(settings.inference_model)}")


def _embedding(settings: Settings) -> Finding:
    import httpx

    if settings.llama_stack_config:
        return Finding(True, f"models are those of {settings.llama_stack_config}; not checked")
    key = settings.embedding_api_key.get_secret_value() if settings.embedding_api_key else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{settings.embedding_url}/embeddings"
    body = {"model": settings.embedding_model, "input": ["Is every part there?"]}
    answer = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_SECONDS)
    if answer.status_code != httpx.codes.OK:
        return Finding(False, f"{url} answered {answer.status_code}: {answer.text[:200]}", HINTS["embedding"])
    dimension = len(answer.json()["data"][0]["embedding"])
    if dimension != settings.embedding_dimension:
        return Finding(False, f"its vectors have {dimension} numbers", f"set EMBEDDING_DIMENSION to {dimension}")
    return Finding(True, f"{settings.embedding_model}, {dimension} dimensions")


def _sandbox(settings: Settings) -> Finding:
    """Of this machine and user, which need not be the workers'. Nothing else depends on it, so none is no failure."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "tasks.tools"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False)  # noqa: S603
    if tried.returncode == 0:
        return Finding(True, tried.stdout.strip())
    return Finding(True, f"none here, so a worker's code interpreter would refuse: {tried.stderr.strip()}")


CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "postgres": _postgres,
    "redis": _redis,
    "broker": _broker,
    "workers": _workers,
    "model": _model,
    "sandbox": _sandbox,
    "embedding": _embedding,
}
HINTS = {
    "postgres": "is the server up, and DATABASE_URL right?",
    "redis": "is the server up, and REDIS_URL right?",
    "broker": "is the server up, and CELERY_BROKER_URL right?",
    "workers": "see postgres above",
    "sandbox": "see `The sandbox` in docs/operations.md",
    "model": "is the model server up, and INFERENCE_URL (with /v1) and INFERENCE_API_KEY right?",
    "embedding": "RAG needs it: start `caravan embeddings`, or name a server in EMBEDDING_URL (with /v1), "
    "EMBEDDING_API_KEY and EMBEDDING_MODEL",
}
