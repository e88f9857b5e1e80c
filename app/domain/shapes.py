"""llama-stack 0.3.5's shapes of what we keep: the same for an event and for the answer to a GET."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from app.domain import attachments


def iso(time: datetime | None) -> str | None:
    """A time as pydantic writes it: `2026-11-23T06:40:58.553378Z`."""
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def turn_path(agent_id: str | None, session_id: str, turn_id: str) -> str:
    """Where a turn of an agent is found."""
    return f"/v1/agents/{agent_id}/session/{session_id}/turn/{turn_id}"


def turn(
    *,
    turn_id: str,
    session_id: str,
    input_messages: list[dict[str, Any]],
    steps: list[dict[str, Any]],
    output_message: dict[str, Any],
    started_at: datetime,
    completed_at: datetime | None,
) -> dict[str, Any]:
    """`Turn`, all parts given as JSON values."""
    return {
        "turn_id": turn_id,
        "session_id": session_id,
        "input_messages": input_messages,
        "steps": steps,
        "output_message": output_message,
        "output_attachments": attachments.made_in(steps),
        "started_at": iso(started_at),
        "completed_at": iso(completed_at),
    }


NO_MESSAGE: dict[str, Any] = {"role": "assistant", "content": "", "stop_reason": "end_of_turn", "tool_calls": []}
"""`output_message` of a turn that has none yet, or never got one: SDKs require the field."""
