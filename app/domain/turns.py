"""A turn's status, and the transitions between statuses, as data.

A turn is made of legs: the first runs from its creation, each later one from a resume. `queued` and `running` alternate
while workers come and go; a leg ends in `awaiting_input` or in one of the three ends.
"""

from enum import StrEnum


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

ENDED = frozenset(status for status, following in TRANSITIONS.items() if not following)
UNFINISHED = frozenset(TurnStatus) - ENDED
