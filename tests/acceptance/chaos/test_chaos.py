"""A short run of the chaos with a fixed seed; `make chaos` runs a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.chaos.run import run


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_is_lost(open_path: Path) -> None:
    """One failure of each kind under eight clients: every accepted turn ends once, and its stream equals its replay."""
    report = run(open_path, seed=3, rounds=1, clients=8)
    print(report.table())
    assert report.problems == []
    assert report.turns["completed"] >= 20
