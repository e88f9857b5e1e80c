"""Responses are accepted once, go on from others, are listed, deleted, claimed with all that came before them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from app.domain import events
from app.domain.errors import InvalidRequest, KeyReused, NotFound, OutcomeUnknown, TooManyTurns, TurnFailure
from app.domain.events import START, EventId, EventKind
from app.domain.responses.events import event, item_event
from app.domain.turns import TurnStatus
from app.store import Store, admission, agents, claims, conversations, responses, turns
from app.store.admission import Caps, ResponseSubmission
from app.store.claims import Claim, LegEnd
from tests.integration.store.asking import Asking
from tests.integration.store.seeds import OWNER, Seeds, next_event, next_events, no_redis, unhurried
from tests.support import wait_until
from tests.support.proxy import TcpProxy


@pytest.fixture
def asking(seeds: Seeds) -> Asking:
    return Asking(seeds)


def key() -> str:
    return uuid.uuid4().hex


def output(name: str) -> dict[str, Any]:
    return {"type": "message", "id": f"msg_{name}_{uuid.uuid4().hex}", "role": "assistant", "content": []}


# --- accepted once ----------------------------------------------------------------------------------------------------


def test_a_response_is_stored_with_its_first_events(asking: Asking) -> None:
    """Queued, in a session of its own, with what a client hears before any worker has it."""
    asked = asking.submission(sealed=b"secret")
    accepted = asking.submit(asked)
    assert (accepted.turn_id, accepted.is_new) == (asked.turn_id, True)
    row = asking.get(asked.turn_id)
    assert (row.status, row.request, row.last) == (TurnStatus.QUEUED, asked.request, asked.opening[-1].id)
    assert asking.seeds.events(asked.turn_id) == asked.opening
    assert bytes(asking.seeds.column(asked.turn_id, "sealed")) == b"secret"


def test_the_same_key_gives_the_same_response(asking: Asking) -> None:
    """With another request it is refused; a request that was refused leaves it free."""
    mine = key()
    with pytest.raises(InvalidRequest):
        asking.ask(previous=str(uuid.uuid4()), idempotency_key=mine)
    first = asking.submit(asking.submission(idempotency_key=mine))
    second = asking.submit(asking.submission(idempotency_key=mine))
    assert first.is_new
    assert (second.turn_id, second.is_new) == (first.turn_id, False)
    with pytest.raises(KeyReused):
        asking.ask("another", idempotency_key=mine)


def test_requests_with_one_key_at_once_make_one_response(asking: Asking) -> None:
    mine, talk = key(), asking.conversation()
    asked = [asking.submission(talk=talk, idempotency_key=mine) for _ in range(12)]
    with ThreadPoolExecutor(12) as threads:
        accepted = list(threads.map(asking.submit, asked))
    assert len({one.turn_id for one in accepted}) == 1
    assert sum(one.is_new for one in accepted) == 1


@pytest.mark.parametrize("in_conversation", [False, True])
def test_a_key_of_what_was_deleted(asking: Asking, in_conversation: bool) -> None:
    """The response that it led to is not found, as by its id."""
    mine, talk = key(), asking.conversation() if in_conversation else None
    first = asking.ask(talk=talk, idempotency_key=mine)
    asking.delete(first)
    with pytest.raises(NotFound):
        asking.ask(talk=talk, idempotency_key=mine)


@pytest.mark.parametrize("in_conversation", [False, True])
def test_a_retry_is_the_same_response(asking: Asking, in_conversation: bool) -> None:
    """Of a request that says so, while that response is not over, or has just ended. Nothing else is."""
    talk = asking.conversation() if in_conversation else None
    words = key()

    def retried(**changes: Any) -> tuple[str, bool]:
        accepted = asking.submit(asking.submission(words, talk, is_retry=True, **changes))
        return accepted.turn_id, accepted.is_new

    first = asking.claimed(words, talk)
    assert retried() == (first.turn_id, False)
    mine = key()
    assert retried(idempotency_key=mine) == (first.turn_id, False)
    assert asking.ask(words, talk, idempotency_key=mine) == first.turn_id
    assert asking.submit(asking.submission(words + "else", talk, is_retry=True)).is_new
    if not talk:
        assert retried(owner="another")[1]
    assert retried(stored=False)[1]
    asking.end(first)
    assert retried() == (first.turn_id, False)
    asking.seeds.age(first.turn_id, "completed_at", admission.ANSWERED_SECONDS + 1)
    assert retried()[1], "that one was answered: the same words are said anew"


def test_a_retry_leaves_nothing_behind(asking: Asking) -> None:
    """Neither a number of the conversation nor a session of its own."""
    talk, words = asking.conversation(), key()
    sessions = "SELECT count(*) FROM sessions"
    first, alone = asking.ask(words, talk), asking.ask(words)
    before = asking.seeds.scalar(sessions)
    for _ in range(3):
        assert asking.ask(words, talk, is_retry=True) == first
        assert asking.ask(words, is_retry=True) == alone
    second = asking.ask("next", talk)
    assert asking.seeds.scalar(sessions) == before
    assert [asking.seeds.column(one, "number") for one in (first, second)] == [1, 2]


def test_a_retry_of_what_was_deleted_is_new(asking: Asking) -> None:
    """A program that deletes what it made and makes it again is not given what it deleted."""
    words = key()
    first = asking.ended(words)
    asking.delete(first)
    assert asking.submit(asking.submission(words, is_retry=True)).is_new
    talk = asking.conversation()
    asking.ended(words, talk)
    asking.store.transact(conversations.mark_deleted, OWNER, talk)
    with pytest.raises(NotFound):
        asking.ask(words, talk, is_retry=True)


def test_a_retry_in_a_conversation_waits_for_what_it_repeats(asking: Asking) -> None:
    """The first request's transaction may still be under way when the second one comes."""
    talk = asking.conversation()
    first, second = (asking.submission(talk=talk, is_retry=retry) for retry in (False, True))
    with ThreadPoolExecutor(1) as threads, unhurried(asking.store) as connection:
        admission.accept_response(connection, first)
        waiting = threads.submit(asking.submit, second)
        blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'"
        wait_until(lambda: asking.seeds.scalar(blocked))
        connection.commit()
        assert waiting.result(60).turn_id == first.turn_id


def resolve(asking: Asking, asked: ResponseSubmission, proxy: TcpProxy, through: Store) -> tuple[str, bool]:
    """Loses the reply to the commit and asks again, as the API does."""
    proxy.lose_reply_after(b"COMMIT")
    with pytest.raises(OutcomeUnknown):
        through.transact(admission.accept_response, asked)
    proxy.wait_lost()
    accepted = asking.submit(asked)
    return accepted.turn_id, accepted.is_new


def test_a_commit_whose_reply_was_lost(asking: Asking, store_url: str) -> None:
    """The response is there once, and is said to be new: nobody has rung for it. In a conversation, alone, with a key,
    as a retry, and not to be stored."""
    url = make_url(store_url)
    assert url.host
    assert url.port
    talk = asking.conversation()
    kinds: list[dict[str, Any]] = [
        {"talk": talk},
        {"talk": talk, "is_retry": True},
        {},
        {"idempotency_key": key()},
        {"is_retry": True, "idempotency_key": key()},
        {"stored": False},
        {"talk": talk, "idempotency_key": key()},
    ]
    with TcpProxy(url.host, url.port) as proxy:
        behind = url.set(drivername="postgresql+psycopg2", port=proxy.port).update_query_dict({"sslmode": "disable"})
        through = Store(behind, pool_size=1, name="quick")
        for kind in kinds:
            asked = asking.submission(key(), **kind)
            assert resolve(asking, asked, proxy, through) == (asked.turn_id, True), kind
            count = "SELECT count(*) FROM turns WHERE request_hash = :hash"
            assert asking.seeds.scalar(count, hash=asked.request_hash) == 1
            assert asking.seeds.events(asked.turn_id) == asked.opening
        through.close()
    numbers = "SELECT array_agg(number ORDER BY number) FROM turns WHERE session_id = :id"
    assert asking.seeds.scalar(numbers, id=talk) == [1, 2, 3]


@pytest.mark.parametrize(
    ("caps", "setting"),
    [
        (lambda mine, all_: Caps(1, mine + 9, all_ + 9), "MAX_TURNS_PER_SESSION"),
        (lambda mine, all_: Caps(9, mine + 1, all_ + 9), "MAX_TURNS_PER_PRINCIPAL"),
        (lambda mine, all_: Caps(9, mine + 9, all_ + 1), r"\(MAX_TURNS\)"),
    ],
)
def test_caps(asking: Asking, caps: Callable[[int, int], Caps], setting: str) -> None:
    """Nothing is stored of what is refused, neither a key nor a number."""
    talk, mine = asking.conversation(), key()
    active = "SELECT count(*) FROM turns WHERE status IN ('queued', 'running')"
    limits = caps(asking.seeds.scalar(f"{active} AND owner = :owner", owner=OWNER), asking.seeds.scalar(active))
    first = asking.ask(talk=talk, caps=limits)
    with pytest.raises(TooManyTurns, match=setting):
        asking.ask(talk=talk, caps=limits, idempotency_key=mine)
    assert asking.seeds.cancel(first) == TurnStatus.CANCELLED
    second = asking.ask(talk=talk, caps=limits, idempotency_key=mine)
    assert asking.seeds.column(second, "number") == 2
    assert asking.seeds.cancel(second) == TurnStatus.CANCELLED


# --- in a conversation ------------------------------------------------------------------------------------------------


def test_responses_of_a_conversation_are_numbered_and_run_in_order(asking: Asking) -> None:
    talk = asking.conversation()
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: asking.ask(str(number), talk), range(16)))
    numbers = sorted((asking.seeds.column(turn_id, "number"), turn_id) for turn_id in made)
    assert [number for number, _ in numbers] == list(range(1, 17))
    first, second = (turn_id for _, turn_id in numbers[:2])
    assert asking.seeds.claim(second) is None
    asking.end(asking.seeds.claimed(first))
    assert asking.seeds.claim(second) is not None


def test_each_response_knows_what_the_one_before_added(asking: Asking) -> None:
    """Its claim brings the conversation's items, with what a tool gave the model; no steps of other responses."""
    talk = asking.conversation()
    first, second = asking.claimed("one", talk), asking.ask("two", talk)
    assert (first.items, first.past) == ([], [])
    added = [(first.request["input"][0], None), (output("one"), "found")]
    asking.end(first, *added)
    later = asking.seeds.claimed(second)
    assert (later.items, later.past) == (added, [])


def test_an_end_whose_reply_was_lost_adds_its_items_once(asking: Asking) -> None:
    """The same transaction again finds itself made."""
    talk = asking.conversation()
    claim = asking.claimed("one", talk)
    end = LegEnd(TurnStatus.COMPLETED, {"status": "completed"}, items=[(output("one"), None)])
    last = [next_event(claim, EventKind.TURN_COMPLETE)]
    for _ in range(2):
        asking.seeds.record(claim, last, end=end)
    assert len(asking.store.transact(conversations.items_of, talk)) == 1


def test_a_conversation_that_is_not_ones_own(asking: Asking) -> None:
    """Another's, a deleted one, an agent's session, a response's own: not found, and nothing is stored."""
    mine, deleted = asking.conversation(), asking.conversation()
    asking.store.transact(conversations.mark_deleted, OWNER, deleted)
    alone = asking.submission()
    asking.submit(alone)
    for talk, owner in (
        (mine, "another"),
        (deleted, OWNER),
        (asking.seeds.session(), OWNER),
        (alone.session_id, OWNER),
        (str(uuid.uuid4()), OWNER),
    ):
        with pytest.raises(NotFound, match="Conversation 'conv_"):
            asking.ask(talk=talk, owner=owner)


def test_a_conversation_that_is_deleted_ends_its_responses(asking: Asking) -> None:
    """Running ones are asked to end; one that ends well all the same does no harm; then all of it goes."""
    talk = asking.conversation()
    running, queued = asking.claimed("one", talk), asking.ask("two", talk)
    assert asking.store.transact(conversations.mark_deleted, OWNER, talk) == [running.turn_id, queued]
    with pytest.raises(NotFound):
        asking.get(running.turn_id)
    asking.end(running, (output("one"), None))
    assert asking.seeds.claim(queued) is None
    assert asking.seeds.cancel(queued) == TurnStatus.CANCELLED
    asking.store.transact(agents.purge_deleted, -1, 1000)
    assert asking.seeds.scalar("SELECT count(*) FROM turns WHERE session_id = :id", id=talk) == 0


# --- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_is_claimed_whole(asking: Asking) -> None:
    """The first one first, whatever became of each: its input and its recorded steps. 300 of them are no trouble."""
    previous = None
    for number in range(300):
        previous = asking.ended(str(number), previous=previous)
    claim = asking.claimed("last", previous=previous)
    said = [past.messages[0]["content"][0]["text"] for past in claim.past]
    assert said == [str(number) for number in range(300)]
    assert all(len(past.steps) == 1 for past in claim.past)
    assert len(asking.store.transact(responses.input_items, OWNER, claim.turn_id)) == 301


@pytest.mark.parametrize("failed", ["model_error", "cancelled"])
def test_a_response_that_ended_badly_can_be_gone_on_from(asking: Asking, failed: Any) -> None:
    """With what was recorded of it."""
    claim = asking.claimed("one")
    claim = asking.seeds.record(claim, [next_event(claim)], step={"step_id": str(uuid.uuid4()), "items": []})
    failure = TurnFailure(failed, "no")
    status = TurnStatus.CANCELLED if failed == "cancelled" else TurnStatus.FAILED
    asking.seeds.record(claim, [next_event(claim, EventKind.ERROR)], end=LegEnd(status, failure=failure))
    [past] = asking.claimed("two", previous=claim.turn_id).past
    assert len(past.steps) == 1


def test_what_cannot_be_gone_on_from(asking: Asking) -> None:
    """What is not there, not one's own, deleted, not stored, not over, or of a conversation: it is said which."""
    running = asking.claimed().turn_id
    deleted, unstored, theirs = asking.ended(), asking.ended(stored=False), asking.ask(owner="another")
    asking.delete(deleted)
    talking = asking.ended(talk=asking.conversation())
    agents_turn = asking.seeds.turn()
    for previous, problem in (
        (str(uuid.uuid4()), "not found"),
        (deleted, "not found"),
        (unstored, "not found"),
        (theirs, "not found"),
        (agents_turn, "not found"),
        (running, "is running"),
        (asking.ask(), "is queued"),
        (talking, "conversation"),
    ):
        with pytest.raises(InvalidRequest, match=problem) as refused:
            asking.ask(previous=previous)
        assert refused.value.param == "previous_response_id"


def test_input_items_of_a_chain(asking: Asking) -> None:
    """Inputs and outputs in order. An item that was given again under its id is there once: pages go by ids."""
    one, two = output("one"), output("two")
    first = asking.claimed("a")
    asking.end(first, output=[one, two])
    again = asking.submission("b", previous=first.turn_id)
    again = replace(
        again, request={**again.request, "input": [first.request["input"][0], one, *again.request["input"]]}
    )
    last = asking.submit(again).turn_id
    found = asking.store.transact(responses.input_items, OWNER, last)
    assert [item["id"] for item in found] == [
        first.request["input"][0]["id"],
        one["id"],
        two["id"],
        again.request["input"][-1]["id"],
    ]
    with pytest.raises(NotFound):
        asking.store.transact(responses.input_items, "another", last)


# --- listed and deleted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 200])
def test_pages(asking: Asking, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newest first or oldest first, of one model or of all; also where several were made at one moment."""
    monkeypatch.setattr(responses, "LISTED_AT_ONCE", at_once)
    owner, other = key(), key()
    made = [asking.ask(str(number), owner=owner) for number in range(5)]
    moment = asking.seeds.column(made[0], "created_at")
    update = "UPDATE turns SET created_at = :at, request = :request WHERE turn_id = :id RETURNING 1"
    for number, turn_id in enumerate(made):
        request = '{"model": "a\\u0000", "input": []}' if number % 2 else '{"model": "b", "input": []}'
        asking.seeds.scalar(update, at=moment + timedelta(seconds=number // 2), request=request, id=turn_id)
    order = sorted(made, key=lambda one: (made.index(one) // 2, uuid.UUID(one)))

    def page(
        after: str | None, limit: int, model: str | None = None, *, descending: bool = True
    ) -> tuple[list[str], bool]:
        rows, more = asking.store.transact(
            responses.list_responses, owner, after, limit, model=model, descending=descending
        )
        return [row.turn_id for row in rows], more

    assert page(None, 5) == (order[::-1], False)
    assert page(None, 5, descending=False) == (order, False)
    assert page(None, 2) == (order[:2:-1], True)
    assert page(order[3], 2) == (order[2:0:-1], True)
    assert page(order[1], 2) == (order[:1], False)
    assert page(order[1], 2, descending=False) == (order[2:4], True)
    odd = [one for one in order[::-1] if made.index(one) % 2]
    assert page(None, 2, "a\0") == (odd, False)
    assert page(None, 1, "a\0") == (odd[:1], True)
    assert page(odd[0], 2, "a\0") == (odd[1:], False)
    asking.store.transact(responses.mark_response_deleted, owner, order[0])
    assert page(None, 9)[0] == order[:0:-1]
    for unknown in (order[0], asking.ask(owner=other), str(uuid.uuid4())):
        with pytest.raises(NotFound):
            page(unknown, 1)


def test_what_is_not_stored_is_shown_to_nobody(asking: Asking) -> None:
    """But to who asked for it, until it is purged, which waits for its end and a while more."""
    owner = key()
    claim = asking.claimed(stored=False, owner=owner)
    with pytest.raises(NotFound):
        asking.store.transact(responses.get_response, owner, claim.turn_id)
    assert asking.store.transact(responses.list_responses, owner, None, 9, model=None, descending=True) == ([], False)
    asking.store.transact(agents.purge_deleted, -1, 1000)
    asking.end(claim)
    asking.store.transact(agents.purge_deleted, 30, 1000)
    assert asking.store.transact(responses.read_response, owner, claim.turn_id).status == TurnStatus.COMPLETED
    with pytest.raises(NotFound):
        asking.store.transact(responses.read_response, "another", claim.turn_id)
    asking.store.transact(agents.purge_deleted, -1, 1000)
    with pytest.raises(NotFound):
        asking.store.transact(responses.read_response, owner, claim.turn_id)


@pytest.mark.parametrize("talk", [False, True])
def test_a_deleted_response(asking: Asking, talk: bool) -> None:
    """Hidden at once; asked to end if it runs; deleted once. A conversation goes on without it."""
    session_id = asking.conversation() if talk else None
    claim = asking.claimed(talk=session_id)
    with pytest.raises(NotFound):
        asking.store.transact(responses.mark_response_deleted, "another", claim.turn_id)
    assert asking.delete(claim.turn_id) == [claim.turn_id]
    assert asking.seeds.column(claim.turn_id, "cancel_requested_at") is not None
    for again in (asking.get, asking.delete):
        with pytest.raises(NotFound):
            again(claim.turn_id)
    asking.end(claim)
    asking.store.transact(agents.purge_deleted, -1, 1000)
    left = asking.seeds.scalar("SELECT count(*) FROM turns WHERE turn_id = :id", id=claim.turn_id)
    assert left == (1 if talk else 0)
    if session_id:
        assert asking.ask(talk=session_id)
    assert asking.delete(asking.ended()) == []


def test_a_chain_is_purged_from_its_end(asking: Asking) -> None:
    """What others go on from stays, however often it is deleted; when the last one goes, all that are deleted go."""
    first = asking.ended("1")
    second = asking.ended("2", previous=first)
    third = asking.ended("3", previous=second)
    for gone in (first, second):
        asking.delete(gone)
    asking.store.transact(agents.purge_deleted, -1, 1000)
    assert len(asking.claimed("4", previous=third).past) == 3
    kept = asking.ended("5", previous=third)
    asking.delete(third)
    asking.store.transact(agents.purge_deleted, -1, 1000)
    assert len(asking.claimed("6", previous=kept).past) == 4


# --- the log and the claim --------------------------------------------------------------------------------------------


def test_where_a_reader_begins(asking: Asking) -> None:
    """Behind the last segment that ends before the number that it wants, also after numbers that were left out."""
    claim = asking.claimed()
    claim = asking.seeds.record(claim, next_events(claim, *[EventKind.RESPONSE] * 3))
    leap = [replace(one, id=EventId(1, one.id.n + 1_000_000)) for one in next_events(claim, EventKind.RESPONSE)]
    claim = asking.seeds.record(claim, leap)
    turn_id = claim.turn_id

    def before(n: int) -> EventId:
        return asking.store.transact(responses.segment_end_before, turn_id, n)

    assert [before(n) for n in (0, 1, 2, 3, 4, 5, 1_000_004, 1_000_005, 10**15)] == [
        START,
        EventId(0, 1),
        EventId(0, 1),
        EventId(0, 1),
        EventId(1, 4),
        EventId(1, 4),
        EventId(1, 4),
        EventId(1, 1_000_005),
        EventId(1, 1_000_005),
    ]


def test_which_items_were_begun(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all segments, of all attempts, however few events are read at once."""
    claim = asking.claimed()
    for start in range(0, 6, 2):
        contents = [(EventKind.RESPONSE, event("in_progress", response={}))] if not start else []
        for index in (start, start + 1):
            contents.append((EventKind.ITEM_ADDED, item_event("added", "r", index, {"id": str(index)})))
        contents.append((EventKind.RESPONSE, item_event("done", "r", start, {"id": str(start)})))
        claim = asking.seeds.record(claim, events.number(claim.last, claim.fence, contents, claim.last.n + 1))
    for at_once in (1, 2, 3, 5000):
        monkeypatch.setattr(responses, "EVENTS_AT_ONCE", at_once)
        begun = asking.store.transact(responses.items_begun, claim.turn_id)
        assert begun.items == {index: {"id": str(index)} for index in range(6)}
        assert (begun.done, begun.in_progress, begun.next_index) == ({0, 2, 4}, True, 6)


def completed(asking: Asking, claim: Claim) -> None:
    asking.end(claim)


def failed(asking: Asking, claim: Claim) -> None:
    end = LegEnd(TurnStatus.FAILED, failure=TurnFailure("model_error", "no"))
    asking.seeds.record(claim, [next_event(claim, EventKind.ERROR)], end=end)


def lost(asking: Asking, claim: Claim) -> None:
    asking.seeds.lose_worker(claim, max_losses=1)


def cancelled_with_its_worker(asking: Asking, claim: Claim) -> None:
    asking.seeds.cancel(claim.turn_id)
    asking.seeds.lose_worker(claim)


def cancelled_in_the_queue(asking: Asking, claim: Claim) -> None:
    asking.store.transact(claims.hand_over, claim, [])
    asking.seeds.cancel(claim.turn_id)


@pytest.mark.parametrize("end", [completed, failed, lost, cancelled_with_its_worker, cancelled_in_the_queue])
def test_secrets_are_erased_at_every_end(asking: Asking, end: Callable[[Asking, Claim], None]) -> None:
    """They are kept while an attempt may still need them."""
    claim = asking.claimed(sealed=b"secret")
    assert bytes(claim.sealed or b"") == b"secret"
    asking.seeds.lose_worker(claim)
    again = asking.seeds.claimed(claim.turn_id)
    assert bytes(again.sealed or b"") == b"secret"
    end(asking, again)
    assert asking.get(claim.turn_id).status not in (TurnStatus.QUEUED, TurnStatus.RUNNING)
    assert asking.seeds.column(claim.turn_id, "sealed") is None


def test_a_second_claim_brings_what_is_recorded(asking: Asking) -> None:
    """Journal and ledger; no agent's configuration. A first claim has none of it to read."""
    first = asking.claimed(previous=asking.ended("before"))
    step = {"step_type": "inference", "step_id": str(uuid.uuid4()), "items": []}
    first = asking.seeds.record(first, [next_event(first)], step=step, started_calls=[(0, 0), (0, 1)])
    asking.seeds.record(first, result=(0, 1, {"content": "3"}))
    asking.seeds.lose_worker(first)
    again = asking.seeds.claimed(first.turn_id)
    assert (again.steps, again.agent_config, again.agent_id) == ([step], None, None)
    assert {place: entry.result for place, entry in again.ledger.items()} == {(0, 0): None, (0, 1): {"content": "3"}}
    assert len(again.past) == 1
    assert (again.fence, again.last) == (3, first.last)


def test_an_agents_routes_do_not_show_responses(asking: Asking) -> None:
    """A response is no turn of an agent's session, nor an agent's turn a response."""
    turn_id = asking.seeds.turn()
    for query in (responses.get_response, responses.read_response):
        with pytest.raises(NotFound):
            asking.store.transact(query, OWNER, turn_id)
    with pytest.raises(NotFound):
        asking.delete(turn_id)


def test_a_response_that_ends_from_outside_has_one_terminal_event(asking: Asking) -> None:
    """Queued or lost: it follows the events that it was stored with."""
    turn_id = asking.ask()
    _, ended = asking.store.transact(turns.cancel, turn_id, TurnFailure("cancelled", "Cancelled."), no_redis)
    assert ended is not None
    created, last = asking.seeds.events(turn_id)
    assert (last.kind, last.after, last.id) == (EventKind.ERROR, created.id, EventId(1, 2))
    assert asking.store.transact(turns.cancel, turn_id, TurnFailure("cancelled", "again"), no_redis)[1] is None
