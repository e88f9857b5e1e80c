"""What a person sees of a turn's events, where the turn did not simply run through."""

from __future__ import annotations

from typing import Any

import pytest

from app.cli.errors import CommandError
from app.cli.transcript import Transcript


def event(kind: str, **payload: Any) -> dict[str, Any]:
    return {"event": {"payload": {"event_type": kind, **payload}}}


STEP = event("step_start", step_type="inference", step_id="1")


def said(text: str) -> dict[str, Any]:
    return event("step_progress", step_type="inference", step_id="1", delta={"type": "text", "text": text})


def test_a_step_that_is_made_again_begins_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The text of the attempt that was lost is told from the one that counts."""
    transcript = Transcript()
    done = event("step_complete", step_details={"step_type": "inference"})
    for each in (STEP, said("one tw"), STEP, said("one two"), done, STEP, said("three")):
        transcript.show(each)
    transcript.end_line()
    again = "  [the worker was lost or stopped: the step is made again]"
    assert capsys.readouterr().out.splitlines() == ["one tw", again, "one two", "three"]


def test_a_cancelled_turn_did_not_fail() -> None:
    """Every other error is told with its code."""
    with pytest.raises(CommandError, match=r"^the turn was cancelled$"):
        Transcript().show({"error": {"code": "cancelled", "message": "Cancelled."}})
    with pytest.raises(CommandError, match=r"^the turn failed: 400: no \(model_error\)$"):
        Transcript().show({"error": {"code": "model_error", "message": "400: no"}})
