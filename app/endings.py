"""Ends a turn for whoever does not own it: a caller, a deleted agent, a newer turn, a limit that ran out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from app.dispatch import Doorbell
from app.domain.errors import TurnFailure
from app.domain.turns import TurnStatus
from app.events.log import SyncLog
from app.settings import Settings
from app.store import Store, turns
from app.store.turns import Ended

CANCELLED = TurnFailure("cancelled", "Cancelled.")


class Endings:
    """Synchronous, for use in the store's threads."""

    def __init__(self, store: Store, log: SyncLog, doorbell: Doorbell) -> None:
        self.store = store
        self.log = log
        self.doorbell = doorbell

    def cancel(self, turn_id: str, failure: TurnFailure = CANCELLED) -> TurnStatus | None:
        """Ends a queued or awaiting turn; asks the owner of a running one to cancel it.

        Gives the turn's status now, None if it is gone: `running` if its owner was asked. Raises Unavailable.
        """
        status, ended = self.store.transact(turns.cancel, turn_id, failure, self.log.raise_fence)
        if ended is not None:
            self.announce([ended])
        elif status == TurnStatus.RUNNING:
            self.log.ask_to_cancel(turn_id)
        return status

    def announce(self, ended: Sequence[Ended]) -> None:
        """After the commit: publishes terminal events, and rings the next turn of each session."""
        for one in ended:
            self.log.publish_end(one.turn_id, one.events)
            if one.following is not None:
                self.doorbell.ring(one.following)


@contextmanager
def open_endings(settings: Settings, name: str) -> Iterator[Endings]:
    """For whoever ends a turn once in a while, with connections of its own."""
    with (
        closing(Store(settings.sqlalchemy_url, pool_size=1, name=name)) as store,
        closing(SyncLog(settings.redis_url.get_secret_value())) as log,
        closing(Doorbell()) as doorbell,
    ):
        yield Endings(store, log, doorbell)
