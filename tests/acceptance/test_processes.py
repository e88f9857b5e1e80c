"""What the processes say when something is missing: one line that names it and the fix."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.nodes import ROOT

WEB = ["uvicorn", "app:main", "--port", "0"]
PREFORK_WORKER = ["celery", "-A", "tasks", "worker", "--autoscale=2,1"]
TURN_POOL_WORKER = ["celery", "-A", "tasks", "worker", "-P", "custom", "--autoscale=2,1"]
FLOWER = ["celery", "-A", "tasks", "flower"]


def outcome(command: list[str], **settings: str) -> tuple[int, list[str]]:
    """(exit status, lines) of a process started with nothing but the given settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    custom = {"CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TurnPool"} if "custom" in command else {}
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**kept, **custom, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ended.returncode, [line for line in ended.stderr.splitlines() if line.startswith("caravan: ")]


@pytest.mark.parametrize("command", [WEB, PREFORK_WORKER, FLOWER], ids=["web", "worker", "flower"])
def test_a_missing_setting_is_one_line(command: list[str]) -> None:
    """It names the setting and where to give it."""
    assert outcome(command) == (2, ["caravan: DATABASE_URL is not set: give it in the environment or in .env"])


def test_a_wrong_setting_is_one_line() -> None:
    """All that is wrong is named at once."""
    status, [line] = outcome(WEB, DATABASE_URL="mysql://x", INFERENCE_URL="localhost", INFERENCE_MODEL="m")
    assert status == 2
    assert "DATABASE_URL must be a postgresql:// URL" in line
    assert "INFERENCE_URL must start with http:// or https://" in line


@pytest.mark.parametrize(
    "command", [WEB, PREFORK_WORKER, TURN_POOL_WORKER], ids=["web", "prefork worker", "turn pool worker"]
)
def test_a_missing_postgres_is_one_line(command: list[str], redis_url: str) -> None:
    """No traceback: what was tried, and which setting names it."""
    status, [line] = outcome(
        command, DATABASE_URL="postgresql://nobody@127.0.0.1:1/x", REDIS_URL=redis_url, INFERENCE_MODEL="m"
    )
    assert status == 1
    assert line.startswith("caravan: Postgres is not available (DATABASE_URL): ")


@pytest.mark.parametrize("command", [WEB, PREFORK_WORKER], ids=["web", "worker"])
def test_a_database_without_the_schema_is_one_line(command: list[str], empty_database: str, redis_url: str) -> None:
    """It names the command that mends it."""
    status, [line] = outcome(command, DATABASE_URL=empty_database, REDIS_URL=redis_url, INFERENCE_MODEL="m")
    assert status == 1
    assert line.startswith("caravan: the database has no schema, this version needs ")
    assert line.endswith(": run `caravan migrate`")
