"""Sandboxes for the tests of this folder, made by each kind of user that a worker may be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.sandboxed import USERS, Jailer


@pytest.fixture(scope="package", params=USERS)
def jailer(request: pytest.FixtureRequest) -> Iterator[Jailer]:
    made = Jailer(request.param)
    try:
        yield made
    finally:
        made.stop()
