"""What an error of the store tells."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from app.store import Store


def test_an_error_does_not_show_what_was_to_be_stored(store: Store) -> None:
    """It stands in logs, and may become a tool's response."""
    wrong = text("SELECT * FROM nowhere WHERE said = :said")
    with pytest.raises(ProgrammingError, match="nowhere") as raised:
        store.transact(lambda connection: connection.execute(wrong, {"said": "between us"}))
    assert "between us" not in str(raised.value)
