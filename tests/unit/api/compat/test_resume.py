"""When a resume of a turn that has ended is the session's next turn."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from app.api.compat.resume import as_messages, goes_on
from app.domain.events import EventId
from app.domain.turns import TurnStatus
from app.store.agents import SessionRow
from app.store.turns import TurnRow

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SESSION = SessionRow("s", "a", "name", 4, NOW)
ASKED = {"step_type": "inference", "model_response": {"tool_calls": [{"call_id": "asked"}]}}
TURN = TurnRow(
    turn_id="t",
    session_id="s",
    number=3,
    status=TurnStatus.COMPLETED,
    request={},
    steps=[ASKED, {"step_type": "tool_execution"}, {"step_type": "inference", "model_response": {"tool_calls": None}}],
    output_message=None,
    error=None,
    fence=1,
    last=EventId(1, 1),
    worker=None,
    created_at=NOW,
    started_at=NOW,
    completed_at=NOW,
)
FOUND = {"call_id": "found", "tool_name": "boil", "content": "100", "metadata": None}


def test_responses_to_calls_that_the_client_found_go_on() -> None:
    """`ReActAgent` of 0.1 and 0.2."""
    assert goes_on(SESSION, TURN, [FOUND], repeated=False)
    assert as_messages([FOUND]) == [{"role": "tool", "call_id": "found", "content": "100"}]


@pytest.mark.parametrize("status", [status for status in TurnStatus if status is not TurnStatus.COMPLETED])
def test_only_a_complete_turn_goes_on(status: TurnStatus) -> None:
    """One that awaits input is resumed, others are a conflict."""
    assert not goes_on(SESSION, replace(TURN, status=status), [FOUND], repeated=True)


def test_a_resume_sent_twice_does_not() -> None:
    """Its calls are the turn's own, so it is a conflict as ever."""
    assert not goes_on(SESSION, TURN, [{**FOUND, "call_id": "asked"}], repeated=True)
    assert not goes_on(SESSION, TURN, [FOUND, {**FOUND, "call_id": "asked"}], repeated=True)


def test_only_the_last_turn_goes_on_and_only_with_responses() -> None:
    """Responses behind a later turn would answer nothing; the later one may be what a first try made."""
    later = replace(SESSION, next_number=5)
    assert not goes_on(later, TURN, [FOUND], repeated=False)
    assert goes_on(later, TURN, [FOUND], repeated=True)
    assert not goes_on(SESSION, TURN, [], repeated=False)
