"""One running system for every SDK."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.compat.running import System, running_system


@pytest.fixture(scope="module")
def system(migrated_database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(migrated_database("caravan_compat"), tmp_path_factory.mktemp("compat")) as running:
        yield running
