"""A response as clients see it: one function, for the answer to a GET and for events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from app.domain.responses import steps
from app.domain.turns import TurnStatus

PREFIX = "resp_"
CONVERSATION_PREFIX = "conv_"

_ECHOED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "previous_response_id",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "truncation",
    "user",
)


def response_id(turn_id: str) -> str:
    return PREFIX + turn_id


def response(
    *,
    turn_id: str,
    request: Mapping[str, Any],
    status: str,
    created_at: datetime,
    completed_at: datetime | None = None,
    journal: Sequence[Mapping[str, Any]] = (),
    error: Mapping[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """`Response`: of the current openai SDK and of llama_stack 0.3.5 at once. `journal`: steps as they are stored."""
    conversation = request.get("conversation")
    return {
        "id": response_id(turn_id),
        "object": "response",
        "created_at": int(created_at.timestamp()),
        "completed_at": int(completed_at.timestamp()) if completed_at and status == "completed" else None,
        "status": status,
        "background": bool(request.get("background")),
        "error": {"code": error["code"], "message": error["message"]} if error else None,
        "incomplete_details": {"reason": reason} if reason else None,
        "output": steps.output(journal),
        "usage": steps.usage(journal),
        "parallel_tool_calls": request.get("parallel_tool_calls", True),
        "conversation": {"id": conversation} if conversation else None,
        "store": request.get("store", True),
        **{name: request.get(name) for name in _ECHOED},
    }


def status_of(status: TurnStatus, request: Mapping[str, Any], started: bool, output: Mapping[str, Any] | None) -> str:
    """OpenAI's word for how a turn stands. `output`: `{"status", "reason"}` once it has ended well."""
    if status == TurnStatus.QUEUED:
        return "in_progress" if started or not request.get("background") else "queued"
    if status == TurnStatus.RUNNING:
        return "in_progress"
    if status == TurnStatus.COMPLETED:
        return str((output or {}).get("status", "completed"))
    return status.value
