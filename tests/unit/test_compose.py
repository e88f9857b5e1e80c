"""compose.yaml against the Procfile, the settings, and its own promises. No Docker runs here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("caravan")}

# What other programs read: the pool's class by Celery, the login by Flower.
OF_OTHERS = {"CELERY_CUSTOM_WORKER_POOL", "FLOWER_BASIC_AUTH"}
WHERE_TO_LISTEN = re.compile(r"--(host|port|address)(=.*)?$")
CLOSING_SECONDS = 30


def _procfile() -> dict[str, list[str]]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return {name: shlex.split(command) for name, _, command in (line.partition(": ") for line in lines)}


def _without_address(command: list[str]) -> list[str]:
    kept, skip = [], False
    for word in command:
        found = WHERE_TO_LISTEN.match(word)
        if not skip and not found:
            kept.append(word)
        skip = bool(found and not found[2])
    return kept


@pytest.mark.parametrize("name", ["web", "worker", "embeddings", "flower"])
def test_the_procfile_and_compose_start_the_same(name: str) -> None:
    """Command and environment are the same, save for where a server listens."""
    words = _procfile()[name]
    count = next(i for i, word in enumerate(words) if "=" not in word)
    given = dict(word.split("=", 1) for word in words[:count])
    assert _without_address(words[count:]) == _without_address(SERVICES[name]["command"])
    assert given.items() <= SERVICES[name]["environment"].items()


def test_the_procfile_has_nothing_that_compose_has_not() -> None:
    assert _procfile().keys() <= SERVICES.keys()


@pytest.mark.parametrize("name", OURS)
def test_each_variable_is_a_setting(name: str) -> None:
    """A name with a slip in it would be ignored in silence."""
    settings = {field.upper() for field in Settings.model_fields}
    assert set(OURS[name]["environment"]) <= settings | OF_OTHERS


def test_the_example_environment_has_each_variable_that_compose_requires() -> None:
    required = set(re.findall(r"\$\{([A-Z_]+):\?", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / "docs" / "compose.env.example").read_text()
    assert required <= set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
    assert required == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "FLOWER_BASIC_AUTH", "INFERENCE_MODEL", "API_KEYS"}


@pytest.mark.parametrize("name", SERVICES)
def test_only_the_loopback_is_published(name: str) -> None:
    for port in SERVICES[name].get("ports", ()):
        assert port.startswith("127.0.0.1:"), port
    assert "network_mode" not in SERVICES[name]


def test_the_servers_are_not_published() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"web", "flower"}


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"migrate"}))
def test_each_service_that_stays_tells_its_health(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["web", "worker"])
def test_what_needs_the_schema_waits_for_it(name: str) -> None:
    assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert SERVICES["migrate"]["restart"] == "no"


def test_a_worker_has_the_time_to_hand_its_turns_over() -> None:
    """Docker kills at the end of the grace period."""
    grace = float(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_seconds"].default + CLOSING_SECONDS


def test_redis_evicts_nothing() -> None:
    assert "\nmaxmemory-policy noeviction\n" in SERVICES["redis"]["command"][-1]


def test_the_images_run_as_a_user_of_their_own() -> None:
    stages = (ROOT / ".container" / "Dockerfile").read_text().split("\nFROM ")
    (embeddings,) = [stage for stage in stages if " AS embeddings\n" in stage]
    assert "\nUSER caravan\n" in embeddings
    assert "\nUSER caravan\n" in stages[-1]
