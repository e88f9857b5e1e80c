"""The demos and the examples run to their ends on `caravan up`, with its small model: whatever that calls and says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demos.running import EXAMPLES, PROGRAMS, Run, run_demo, run_example
from tests.support.caravan_up import up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = "--max-tokens=96"
QUICK = {"document_turn"}
"""What `make test` runs, too."""


@pytest.fixture(scope="module")
def url(documents: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="caravan-demos-") as directory:
        Path(directory).chmod(0o755)  # for Postgres's account
        with up(Path(directory) / "data", "--no-flower", env={"FETCH_ALLOWED": documents.split("//")[1]}) as running:
            yield running.url


def programs(folder: Path, shared: str, quick: set[str]) -> list[object]:
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != shared)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in names]


@pytest.mark.parametrize("name", programs(PROGRAMS, "common", set()))
def test_demo(name: str, url: str, documents: str, seed_sdk: None) -> None:
    check(run_demo(name, url, documents, SHORT, env={}))


@pytest.mark.parametrize("name", programs(EXAMPLES, "talk", QUICK))
def test_example(name: str, url: str, tmp_path: Path) -> None:
    check(run_example(name, url, SHORT, env={}, folder=tmp_path))


def check(run: Run) -> None:
    """Each turn has completed, with something said or called in each of its inferences."""
    print(run.output)
    assert run.turns
    assert {turn["status"] for turn in run.turns} == {"completed"}
    for step in run.steps:
        answer = step.get("model_response")
        assert answer is None or answer["content"] or answer["tool_calls"]
