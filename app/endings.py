"""Ends a turn that nobody owns, whoever asks: a deleted agent, a newer turn, a limit that ran out."""

from __future__ import annotations

from collections.abc import Sequence

from app.dispatch import Doorbell
from app.domain.errors import TurnFailure
from app.events.log import SyncLog
from app.store import Store, turns
from app.store.turns import Ended


class Endings:
    """Synchronous, for use in the store's threads."""

    def __init__(self, store: Store, log: SyncLog, doorbell: Doorbell) -> None:
        self.store = store
        self.log = log
        self.doorbell = doorbell

    def end(self, turn_id: str, failure: TurnFailure) -> bool:
        """Ends a queued or awaiting turn; asks the owner of a running one to cancel it. False: it is running, or over.

        Raises Unavailable.
        """
        ended = self.store.transact(turns.end, turn_id, failure, self.log.raise_fence)
        if ended is None:
            self.store.transact(turns.request_cancel, turn_id)
            return False
        self.announce([ended])
        return True

    def announce(self, ended: Sequence[Ended]) -> None:
        """After the commit: publishes terminal events, and rings the next turn of each session."""
        for one in ended:
            self.log.publish_end(one.turn_id, one.events)
            if one.following is not None:
                self.doorbell.ring(one.following)
