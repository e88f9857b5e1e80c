"""A turn's status, and the transitions between statuses, as data.

A turn is made of legs: the first runs from its creation, each later one from a resume. `queued` and `running` alternate
while workers come and go; a leg ends in `awaiting_input` or in one of the three ends.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from app.domain.errors import InvalidRequest


class TurnStatus(StrEnum):
    QUEUED = "queued"
    """Waits for a worker. In: created, resumed, handed over or taken from a lost worker. Out: claimed, or ended."""
    RUNNING = "running"
    """A worker owns it. In: claimed. Out: awaits input, ended by its owner, or queued again if its worker is lost."""
    AWAITING_INPUT = "awaiting_input"
    """Waits for a client's tool responses. In: from running. Out: resumed (queued), cancelled or failed."""
    COMPLETED = "completed"
    """End: the model's answer is stored."""
    FAILED = "failed"
    """End: the error is stored."""
    CANCELLED = "cancelled"
    """End: someone asked for it, or a newer turn superseded it."""


TRANSITIONS: dict[TurnStatus, frozenset[TurnStatus]] = {
    TurnStatus.QUEUED: frozenset({TurnStatus.RUNNING, TurnStatus.CANCELLED, TurnStatus.FAILED}),
    TurnStatus.RUNNING: frozenset(
        {
            TurnStatus.COMPLETED,
            TurnStatus.FAILED,
            TurnStatus.CANCELLED,
            TurnStatus.AWAITING_INPUT,
            TurnStatus.QUEUED,
        }
    ),
    TurnStatus.AWAITING_INPUT: frozenset({TurnStatus.QUEUED, TurnStatus.CANCELLED, TurnStatus.FAILED}),
    TurnStatus.COMPLETED: frozenset(),
    TurnStatus.FAILED: frozenset(),
    TurnStatus.CANCELLED: frozenset(),
}


class TurnKind(StrEnum):
    AGENT = "agent"
    """Of a session of a Llama Stack agent."""
    RESPONSE = "response"
    """OpenAI's: alone, or of a conversation."""


class MultitaskStrategy(StrEnum):
    """What a new turn does when its session has one that is queued or running."""

    ENQUEUE = "enqueue"
    """It waits for its turn."""
    REJECT = "reject"
    """It is refused, and nothing is stored."""
    INTERRUPT = "interrupt"
    """The running one is cancelled, with its recorded steps kept."""


def isolated_from(max_losses: int) -> int:
    """The failures from which on a turn is tried in a process of its own: its last try, and never its first."""
    return max(1, max_losses - 1)


ENDED = frozenset(status for status, following in TRANSITIONS.items() if not following)
UNFINISHED = frozenset(TurnStatus) - ENDED


def match_responses(asked: Sequence[dict[str, Any]], given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """ToolResponses in the order of the ToolCalls that await them. Raises InvalidRequest: not one for each call."""
    call_ids = [call["call_id"] for call in asked]
    by_id = {response["call_id"]: response for response in given}
    missing, unasked = set(call_ids) - by_id.keys(), by_id.keys() - set(call_ids)
    if missing or unasked:
        problem = (
            f"missing: {', '.join(sorted(missing))}" if missing else f"not asked for: {', '.join(sorted(unasked))}"
        )
        raise InvalidRequest(f"tool_responses: must answer each call of the turn by its call_id; {problem}")
    return [by_id[call_id] for call_id in call_ids]
