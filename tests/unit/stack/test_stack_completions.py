"""What clients of completions are told of an error, and what the log is."""

from __future__ import annotations

import pytest

from app.domain.errors import CompletionError
from app.stack.chunks import ModelError
from app.stack.completions import completion_error


def test_an_error_that_nobody_expects_is_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    """With its traceback; the client learns that there was one."""
    told = completion_error(KeyError("a secret"), {})
    assert isinstance(told, CompletionError)
    assert (told.status, "secret" in str(told)) == (500, False)
    assert "KeyError: 'a secret'" in caplog.text


def test_the_model_servers_own_error_is_told_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is no trouble of ours."""
    told = completion_error(ModelError("overloaded", 500), {})
    assert str(told) == "overloaded"
    assert [
        record.message for record in caplog.records if record.name != "asyncio"
    ] == []  # of what other tests have left
