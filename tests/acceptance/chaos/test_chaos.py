"""A short run of the chaos, and a rolling restart; `make chaos` runs a long one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.chaos.failures import Chaos
from tests.acceptance.chaos.fleet import Fleet, running_fleet
from tests.acceptance.chaos.run import run_on
from tests.support import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def fleet(server_directory: Path) -> Iterator[Fleet]:
    directory = server_directory / "chaos"
    directory.mkdir()
    with running_fleet(directory) as running, running.kept():
        yield running


@pytest.mark.thorough
def test_a_rolling_restart_loses_nothing(fleet: Fleet) -> None:
    """Every web process and worker is told to stop and started again, in turn, while six clients go on: no turn is lost
    or fails, and whoever was cut joins again. A drain costs a turn none of its failures. Nobody is refused but by a web
    process that stops, on a connection that is open still, and told to try again: SDKs do so by themselves."""

    def happens(chaos: Chaos) -> None:
        before = chaos.completed()
        chaos.rolling_restart()
        wait_until(lambda: chaos.completed() - before >= 10, 120)

    report = run_on(fleet, happens, seed=1, clients=6)
    print(report.table())
    assert report.problems == []
    assert report.turns["completed"] == report.turns.total() >= 10
    assert fleet.system.rows("SELECT 1 FROM turns WHERE failures > 0") == []
    assert [answer for answer in report.refused if not (answer.startswith("503: ") and "stopping" in answer)] == []


def test_nothing_is_lost_in_chaos(fleet: Fleet) -> None:
    """One failure of each kind under eight clients: every accepted turn ends once, and its stream equals its replay."""

    def happens(chaos: Chaos) -> None:
        before = chaos.completed()
        chaos.round()
        for _ in range(8):
            if chaos.missing():
                chaos.round(chaos.missing())
        assert chaos.missing() == []
        wait_until(lambda: chaos.completed() - before >= 20, 120)

    report = run_on(fleet, happens, seed=3, clients=8)
    print(report.table())
    assert report.problems == []
    assert report.turns["completed"] >= 20
