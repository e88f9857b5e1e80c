"""A turn's statuses and their transitions, as data."""

from __future__ import annotations

from app.domain.turns import ENDED, TRANSITIONS, UNFINISHED, TurnStatus


def reachable(start: TurnStatus) -> set[TurnStatus]:
    found, new = set[TurnStatus](), {start}
    while new:
        found |= new
        new = {following for status in new for following in TRANSITIONS[status]} - found
    return found


def test_every_status_has_its_transitions() -> None:
    """And each can be reached from queued, where a turn begins."""
    assert TRANSITIONS.keys() == set(TurnStatus)
    assert reachable(TurnStatus.QUEUED) == set(TurnStatus)


def test_an_end_is_final() -> None:
    """Three ends, and everything else is unfinished."""
    assert {TurnStatus.COMPLETED, TurnStatus.FAILED, TurnStatus.CANCELLED} == ENDED
    assert set(TurnStatus) == ENDED | UNFINISHED
    assert not ENDED & UNFINISHED
    assert all(not TRANSITIONS[status] for status in ENDED)


def test_an_unfinished_turn_can_always_end() -> None:
    """It can be cancelled and can fail, whatever it is doing; it completes only while it runs."""
    for status in UNFINISHED:
        assert {TurnStatus.CANCELLED, TurnStatus.FAILED} <= TRANSITIONS[status]
    assert [status for status in TurnStatus if TurnStatus.COMPLETED in TRANSITIONS[status]] == [TurnStatus.RUNNING]


def test_a_turn_runs_only_from_the_queue() -> None:
    """So that each attempt is a claim; it goes back there when its worker is lost, or when it is resumed."""
    assert [status for status in TurnStatus if TurnStatus.RUNNING in TRANSITIONS[status]] == [TurnStatus.QUEUED]
    back = {status for status in TurnStatus if TurnStatus.QUEUED in TRANSITIONS[status]}
    assert back == {TurnStatus.RUNNING, TurnStatus.AWAITING_INPUT}
