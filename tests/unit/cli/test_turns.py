"""`caravan turns follow` does what docs/api.md tells every client to do when a stream is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.cli import turns
from app.cli.errors import CommandError

Event = tuple[str, dict[str, Any]]


def test_a_stream_that_is_cut_is_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last event, also after a server that is not there for a moment; nothing comes twice."""
    asked: list[str] = []

    def joined(url: str, api_key: str | None, last_id: str) -> Iterator[Event]:
        asked.append(last_id)
        if len(asked) == 1:
            yield "1-1", {"n": 1}
            raise httpx.RemoteProtocolError("peer closed connection")
        if len(asked) == 2:
            raise httpx.ConnectError("refused")
        yield "1-2", {"n": 2}

    monkeypatch.setattr(turns, "_joined", joined)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert list(turns._events("http://here", None)) == [{"n": 1}, {"n": 2}]
    assert asked == ["", "1-1", "1-1"]


def test_a_server_that_was_never_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gave a wrong URL does not wait."""

    def joined(url: str, api_key: str | None, last_id: str) -> Iterator[Event]:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(turns, "_joined", joined)
    with pytest.raises(CommandError, match="no answer from http://here: refused"):
        list(turns._events("http://here", None))
