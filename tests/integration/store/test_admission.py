"""What is sent twice is stored once; caps and strategies are told before anything is stored."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from app.domain.errors import Conflict, InvalidRequest, KeyReused, NotFound, TooManyTurns
from app.domain.events import START
from app.domain.turns import MultitaskStrategy, TurnStatus
from app.store import admission, agents, claims, turns
from app.store.admission import Accepted, Caps, Submission
from tests.integration.store.seeds import NO_CAPS, OWNER, Json, Seeds, unhurried
from tests.support import wait_until

ANSWER: Json = {"call_id": "c1", "tool_name": "ask", "content": "yes"}


def key() -> str:
    return uuid.uuid4().hex


def numbers(seeds: Seeds, session_id: str) -> list[int]:
    return [row.number for row in seeds.store.transact(turns.session_turns, session_id)]


def again(seeds: Seeds, session_id: str, **changes: Any) -> Accepted:
    """The same request with a new turn id."""
    return seeds.submit(seeds.submission(session_id), **changes)


def test_the_same_key_gives_the_same_turn(seeds: Seeds) -> None:
    """It is stored once; another principal's key of the same text is another key."""
    session_id, mine = seeds.session(), key()
    first = again(seeds, session_id, idempotency_key=mine)
    second = again(seeds, session_id, idempotency_key=mine)
    assert (first.is_new, second.is_new) == (True, False)
    assert (second.turn_id, second.after) == (first.turn_id, START)
    assert numbers(seeds, session_id) == [1]
    assert again(seeds, session_id, idempotency_key=key()).turn_id != first.turn_id


def test_requests_with_one_key_at_once_make_one_turn(seeds: Seeds) -> None:
    """Whoever comes second waits for the first one's commit."""
    session_id, mine = seeds.session(), key()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: again(seeds, session_id, idempotency_key=mine), range(8)))
    assert len({one.turn_id for one in made}) == 1
    assert sum(one.is_new for one in made) == 1
    assert numbers(seeds, session_id) == [1]


def test_a_key_with_another_request_is_refused(seeds: Seeds) -> None:
    """422, and nothing is stored."""
    session_id, mine = seeds.session(), key()
    again(seeds, session_id, idempotency_key=mine)
    with pytest.raises(KeyReused):
        seeds.submit(seeds.submission(session_id, documents=["another"]), idempotency_key=mine)
    assert numbers(seeds, session_id) == [1]


def test_a_request_that_failed_leaves_its_key_free(seeds: Seeds) -> None:
    """Its transaction is rolled back with the key."""
    session_id, mine = seeds.session(), key()
    with pytest.raises(NotFound):
        seeds.submit(seeds.submission(session_id), idempotency_key=mine, agent_id=str(uuid.uuid4()))
    assert again(seeds, session_id, idempotency_key=mine).is_new


def test_a_key_is_kept_for_a_day(seeds: Seeds) -> None:
    """Then it is forgotten by upkeep, and even before upkeep came it counts no more."""
    session_id, old, older = seeds.session(), key(), key()
    for one in (old, older):
        again(seeds, session_id, idempotency_key=one)
        seeds.scalar(
            "UPDATE idempotency_keys SET created_at = now() - interval '25 h' WHERE key = :key RETURNING 1", key=one
        )
    assert again(seeds, session_id, idempotency_key=old).is_new
    seeds.store.transact(admission.forget_keys, 100)
    left = "SELECT count(*) FROM idempotency_keys WHERE key = :key"
    assert [seeds.scalar(left, key=one) for one in (old, older)] == [1, 0]


def test_a_key_goes_with_its_session(seeds: Seeds) -> None:
    """A deleted session's turn is not found by its key; the row goes with the turn."""
    agent_id, mine = seeds.agent(), key()
    session_id = seeds.session(agent_id)
    made = again(seeds, session_id, idempotency_key=mine)
    seeds.store.transact(agents.mark_session_deleted, OWNER, agent_id, session_id)
    with pytest.raises(NotFound):
        again(seeds, session_id, idempotency_key=mine)
    seeds.cancel(made.turn_id)
    seeds.store.transact(agents.purge_deleted, 0, 100)
    assert seeds.scalar("SELECT count(*) FROM idempotency_keys WHERE key = :key", key=mine) == 0


def test_a_resume_with_the_same_key_is_made_once(seeds: Seeds) -> None:
    """The second one follows the same leg; without a key it is a conflict."""
    session_id, mine = seeds.session(), key()
    awaiting = seeds.await_input(seeds.claimed(seeds.turn(session_id)))
    first = seeds.resume(awaiting.turn_id, session_id, [ANSWER], mine)
    second = seeds.resume(awaiting.turn_id, session_id, [ANSWER], mine)
    assert (first.after, first.is_new) == (awaiting.last, True)
    assert (second.after, second.is_new) == (awaiting.last, False)
    with pytest.raises(Conflict):
        seeds.resume(awaiting.turn_id, session_id, [ANSWER])
    with pytest.raises(KeyReused):
        seeds.resume(awaiting.turn_id, session_id, [{**ANSWER, "content": "no"}], mine)


def test_a_resume_answers_each_call(seeds: Seeds) -> None:
    """Missing and unasked call ids are named, and the turn awaits input as before."""
    session_id = seeds.session()
    awaiting = seeds.await_input(seeds.claimed(seeds.turn(session_id)))
    for responses, problem in (([], "missing: c1"), ([ANSWER, {**ANSWER, "call_id": "c2"}], "not asked for: c2")):
        with pytest.raises(InvalidRequest, match=problem):
            seeds.resume(awaiting.turn_id, session_id, responses)
    assert seeds.row(awaiting.turn_id).status == TurnStatus.AWAITING_INPUT


def test_a_turn_that_is_being_cancelled_cannot_be_resumed(seeds: Seeds) -> None:
    """It came to await input just as its cancellation was asked for."""
    session_id = seeds.session()
    claim = seeds.claimed(seeds.turn(session_id))
    seeds.cancel(claim.turn_id)
    seeds.await_input(claim)
    with pytest.raises(Conflict, match="being cancelled"):
        seeds.resume(claim.turn_id, session_id, [ANSWER])


def test_a_retry_is_the_sessions_newest_turn_if_it_was_the_same(seeds: Seeds) -> None:
    """A request that says so, without a key; another request or one that is no retry is a new turn."""
    session_id = seeds.session()
    first = again(seeds, session_id)
    retry = again(seeds, session_id, is_retry=True)
    assert (retry.turn_id, retry.is_new) == (first.turn_id, False)
    assert again(seeds, session_id).is_new
    assert seeds.submit(seeds.submission(session_id, documents=["another"]), is_retry=True).is_new
    assert numbers(seeds, session_id) == [1, 2, 3]


@pytest.mark.parametrize("leg_ends", [Seeds.complete, Seeds.await_input])
def test_a_retry_is_none_of_a_turn_that_was_answered(
    seeds: Seeds, leg_ends: Callable[[Seeds, claims.Claim], claims.Claim]
) -> None:
    """People say "yes" twice: the first try of the second one was refused, and an SDK sends it again. That is a new
    turn, unless the answer to the first one came so lately that it may have been lost."""
    session_id = seeds.session()
    first = again(seeds, session_id).turn_id
    seeds.age(first, "created_at", admission.RETRY_SECONDS - 60)
    leg_ends(seeds, seeds.claimed(first))
    assert again(seeds, session_id, is_retry=True).turn_id == first
    seeds.age(first, "completed_at", admission.ANSWERED_SECONDS)
    assert again(seeds, session_id, is_retry=True).is_new
    assert numbers(seeds, session_id) == [1, 2]


def test_a_retry_is_none_of_a_turn_that_no_sdk_waits_for_any_more(seeds: Seeds) -> None:
    """Though it goes on still."""
    session_id = seeds.session()
    seeds.age(again(seeds, session_id).turn_id, "created_at", admission.RETRY_SECONDS)
    assert again(seeds, session_id, is_retry=True).is_new


def test_reject_refuses_while_a_turn_is_queued_or_running(seeds: Seeds) -> None:
    """Nothing is stored; one that awaits input is superseded, as by any new turn."""
    session_id = seeds.session()
    first = seeds.turn(session_id)
    with pytest.raises(Conflict, match=first):
        again(seeds, session_id, strategy=MultitaskStrategy.REJECT)
    claim = seeds.claimed(first)
    with pytest.raises(Conflict, match=first):
        again(seeds, session_id, strategy=MultitaskStrategy.REJECT)
    seeds.await_input(claim)
    accepted = again(seeds, session_id, strategy=MultitaskStrategy.REJECT)
    assert [one.turn_id for one in accepted.ended] == [first]
    assert numbers(seeds, session_id) == [1, 2]


class Resuming:
    """A resume of a session's turn that is not committed yet, and whoever waits for it."""

    def __init__(self, seeds: Seeds) -> None:
        self.seeds = seeds
        self.session_id = seeds.session()
        self.turn_id = seeds.await_input(seeds.claimed(seeds.turn(self.session_id))).turn_id

    def beside(self, **changes: Any) -> Accepted:
        """A new turn that finds it still awaiting input, and then resumed. Raises what its acceptance raises."""
        asked = self.seeds.resumption(self.turn_id, self.session_id, [ANSWER])
        with ThreadPoolExecutor(1) as thread, unhurried(self.seeds.store) as resuming:
            admission.resume(resuming, asked)
            posting = thread.submit(again, self.seeds, self.session_id, **changes)
            wait_until(lambda: self.seeds.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0)
            resuming.commit()
            return posting.result(60)


def test_an_accepted_resume_is_not_superseded(seeds: Seeds) -> None:
    """The new turn came when the other one awaited input still, and waits for it now: it was resumed first."""
    resuming = Resuming(seeds)
    accepted = resuming.beside()
    assert accepted.ended == []
    assert seeds.row(resuming.turn_id).status == TurnStatus.QUEUED
    assert seeds.claim(accepted.turn_id) is None
    assert seeds.claim(resuming.turn_id) is not None


def test_a_turn_that_is_resumed_at_this_moment_counts_as_one(seeds: Seeds) -> None:
    """For `reject`, for the session's cap, and for `interrupt`, which ends it with the right reason."""
    with pytest.raises(Conflict, match="queued"):
        Resuming(seeds).beside(strategy=MultitaskStrategy.REJECT)
    with pytest.raises(TooManyTurns, match="MAX_TURNS_PER_SESSION"):
        Resuming(seeds).beside(caps=Caps(1, 1_000_000, 1_000_000))
    resuming = Resuming(seeds)
    accepted = resuming.beside(strategy=MultitaskStrategy.INTERRUPT)
    assert [one.turn_id for one in accepted.ended] == [resuming.turn_id]
    assert (seeds.row(resuming.turn_id).error or {})["message"] == admission.INTERRUPTED.message


def test_interrupt_asks_the_running_turns_worker(seeds: Seeds) -> None:
    """It ends by its owner; turns queued behind it keep their place before the new one."""
    session_id = seeds.session()
    running = seeds.claimed(seeds.turn(session_id))
    behind = seeds.turn(session_id)
    accepted = again(seeds, session_id, strategy=MultitaskStrategy.INTERRUPT)
    assert (accepted.interrupted, accepted.ended) == (running.turn_id, [])
    assert seeds.column(running.turn_id, "cancel_requested_at") is not None
    assert seeds.row(behind).status == TurnStatus.QUEUED


def test_interrupt_ends_the_turn_whose_turn_it_is_though_no_worker_has_it_yet(seeds: Seeds) -> None:
    """Or it would run before the one that was to interrupt it."""
    session_id = seeds.session()
    first = seeds.turn(session_id)
    accepted = again(seeds, session_id, strategy=MultitaskStrategy.INTERRUPT)
    assert [(one.turn_id, one.status) for one in accepted.ended] == [(first, TurnStatus.CANCELLED)]
    assert accepted.interrupted is None
    assert seeds.claim(accepted.turn_id) is not None


def test_a_full_session_takes_no_more(seeds: Seeds) -> None:
    """Queued and running turns count, not those that await input or have ended."""
    session_id, caps = seeds.session(), Caps(2, 1_000_000, 1_000_000)
    awaiting = seeds.await_input(seeds.claimed(again(seeds, session_id, caps=caps).turn_id))
    claim = seeds.claimed(again(seeds, session_id, caps=caps).turn_id)
    again(seeds, session_id, caps=caps)
    with pytest.raises(TooManyTurns, match="MAX_TURNS_PER_SESSION"):
        again(seeds, session_id, caps=caps)
    seeds.complete(claim)
    assert again(seeds, session_id, caps=caps).is_new
    assert seeds.row(awaiting.turn_id).status == TurnStatus.CANCELLED


@pytest.mark.parametrize(
    ("caps", "setting"),
    [
        (lambda active: Caps(1_000_000, active, 1_000_000), "MAX_TURNS_PER_PRINCIPAL"),
        (lambda active: Caps(1_000_000, 1_000_000, active), "(MAX_TURNS)"),
    ],
    ids=["principal", "all"],
)
def test_caps_are_exact_under_concurrent_requests(seeds: Seeds, caps: Callable[[int], Caps], setting: str) -> None:
    """Of twelve at once, in sessions of their own, just those for whom there is room get in."""
    sessions = [seeds.session() for _ in range(12)]
    active = seeds.scalar("SELECT count(*) FROM turns WHERE status IN ('queued', 'running')")
    asked = [seeds.submission(session_id) for session_id in sessions]

    def submit(one: Submission) -> str:
        try:
            return seeds.submit(one, caps=caps(active + 5)).turn_id
        except TooManyTurns as refused:
            return f"refused: {refused}"

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(submit, asked))
    made = [answer for answer in answers if not answer.startswith("refused")]
    assert len(made) == 5
    assert all(setting in answer for answer in answers if answer not in made)
    for turn_id in made:
        assert seeds.cancel(turn_id) == TurnStatus.CANCELLED


@pytest.mark.parametrize("setting", ["MAX_TURNS_PER_PRINCIPAL", r"\(MAX_TURNS\)"], ids=["principal", "all"])
def test_a_resume_needs_room_like_a_new_turn(seeds: Seeds, setting: str) -> None:
    """The turn was not counted while it awaited input; refused, it awaits it still."""
    session_id = seeds.session()
    awaiting = seeds.await_input(seeds.claimed(seeds.turn(session_id))).turn_id
    active, many = seeds.scalar("SELECT count(*) FROM turns WHERE status IN ('queued', 'running')"), 1_000_000
    caps = Caps(many, active, many) if "PRINCIPAL" in setting else Caps(many, many, active)
    with pytest.raises(TooManyTurns, match=setting):
        seeds.resume(awaiting, session_id, [ANSWER], caps=caps)
    assert seeds.row(awaiting).status == TurnStatus.AWAITING_INPUT
    room = Caps(many, active + 1, active + 1)
    assert seeds.resume(awaiting, session_id, [ANSWER], caps=room).is_new
    assert seeds.cancel(awaiting) == TurnStatus.CANCELLED


def test_nothing_is_stored_of_a_refused_turn(seeds: Seeds) -> None:
    """Neither a number nor its key is used up."""
    session_id, mine = seeds.session(), key()
    with pytest.raises(TooManyTurns):
        again(seeds, session_id, caps=Caps(1_000_000, 0, 1_000_000), idempotency_key=mine)
    assert again(seeds, session_id, caps=NO_CAPS, idempotency_key=mine).is_new
    assert numbers(seeds, session_id) == [1]
