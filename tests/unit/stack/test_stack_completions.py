"""What clients of completions are told of an error, and what the log is."""

from __future__ import annotations

import pytest

from app.domain.errors import TOLD_CHARACTERS, CompletionError
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


@pytest.mark.parametrize("error", [ModelError("x" * 10_000), ConnectionError("x" * 10_000)])
def test_of_a_long_error_the_beginning_is_told(error: Exception) -> None:
    """The model server's, or that of a provider of one's own."""
    assert str(completion_error(error, {})) == "x" * TOLD_CHARACTERS + "… (cut off)"
