"""What docs/compatibility.md says of the SDKs that `make test` runs is so. `make compat` runs all of them."""

from __future__ import annotations

import pytest

from tests.compat.running import System, run_sdks
from tests.compat.sdks import SDKS, install
from tests.compat.table import differences, read_results

QUICK = [sdk for sdk in SDKS if sdk.quick]


@pytest.mark.timeout(600)  # it may have to fetch them
def test_sdks_work_as_the_table_says(system: System) -> None:
    """Neither does a check fail that is committed as working, nor one work that is committed as failing."""
    install(QUICK)
    found = differences(run_sdks(QUICK, system), read_results())
    assert not found, "\n".join(["see `make compat` in CONTRIBUTING.md:", *found])
