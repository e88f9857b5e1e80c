"""A turn is accepted or resumed: once, however often it is sent, in its place in the session, within the caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, literal, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert

from app.domain.errors import Conflict, KeyReused, NotFound, TooManyTurns, TurnFailure
from app.domain.events import START, Event, EventId
from app.domain.turns import MultitaskStrategy, TurnKind, TurnStatus, match_responses
from app.store import responses
from app.store.agents import get_session
from app.store.tables import UNFINISHED_SQL, idempotency_keys, seconds, sessions, turns
from app.store.turns import Ended, RaiseFence, add_segment, cancel, end, read_steps

KEEP_KEYS_SECONDS = 24 * 3600
ANSWERED_SECONDS = 15
"""SDKs wait 8 s at most before they try again: what ended earlier than that was answered, so this is no retry of it."""

RETRY_SECONDS = 1800
"""What is older than this was not asked for by an earlier try: SDKs wait 600 s for an answer, three times."""

SUPERSEDED = TurnFailure("superseded", "A newer turn of the session superseded this one while it awaited input.")
INTERRUPTED = TurnFailure("cancelled", "Interrupted by a newer turn of the session.")

EXACT_BELOW = 64
"""So near a cap, requests count one after the other; before, they count side by side."""


@dataclass(frozen=True)
class Caps:
    """How many turns may be queued or running: in one session, of one principal, in all."""

    session: int
    principal: int
    total: int


@dataclass(frozen=True)
class Submission:
    """A request for a turn: `request` as it is stored, `request_hash` of all that makes it the same request."""

    owner: str
    agent_id: str
    session_id: str
    turn_id: str
    request: dict[str, Any]
    request_hash: bytes
    caps: Caps
    strategy: MultitaskStrategy = MultitaskStrategy.ENQUEUE
    idempotency_key: str | None = None
    is_retry: bool = False
    sealed: bytes | None = None


@dataclass(frozen=True)
class ResponseSubmission:
    """A request for a response: as a Submission. `session_id`: its conversation's, or one that is made for it.

    `opening`: the first events, which are recorded with it.
    """

    owner: str
    turn_id: str
    session_id: str
    in_conversation: bool
    request: dict[str, Any]
    request_hash: bytes
    caps: Caps
    opening: Sequence[Event]
    previous_turn_id: str | None = None
    stored: bool = True
    sealed: bytes | None = None
    idempotency_key: str | None = None
    is_retry: bool = False


@dataclass(frozen=True)
class Resumption:
    """A request for a turn's next leg: a ToolResponse for each call that awaits one.

    `sealed`: secrets in place of those that the turn has; None: these stay.
    """

    owner: str
    session_id: str
    turn_id: str
    responses: list[dict[str, Any]]
    request_hash: bytes
    caps: Caps
    idempotency_key: str | None = None
    sealed: bytes | None = None


@dataclass(frozen=True)
class Accepted:
    """The turn that a request leads to, and the event that its leg follows.

    `is_new`: False if an earlier request made it. `ended`: turns that this superseded or interrupted; `interrupted`:
    the running turn whose worker is asked to cancel it.
    """

    turn_id: str
    after: EventId = START
    is_new: bool = True
    ended: Sequence[Ended] = ()
    interrupted: str | None = None


_NOW = func.clock_timestamp()
_ADD_KEY = (
    insert(idempotency_keys)
    .values({name: bindparam(name) for name in ("owner", "key", "request_hash", "turn_id")})
    .on_conflict_do_update(
        index_elements=["owner", "key"],
        set_={name: bindparam(name) for name in ("request_hash", "turn_id")}
        | {"after_fence": 0, "after_n": 0, "created_at": _NOW},
        where=idempotency_keys.c.created_at < _NOW - seconds(KEEP_KEYS_SECONDS),
    )
    .returning(idempotency_keys.c.key)
)
_TAKE_NUMBER = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("of_session"),
        sessions.c.agent_id == bindparam("of_agent"),
        sessions.c.owner == bindparam("of_owner"),
        sessions.c.deleted_at.is_(None),
    )
    .values(next_number=sessions.c.next_number + 1)
    .returning(sessions.c.next_number)
)
_TAKE_NUMBER_IN_CONVERSATION = (
    update(sessions)
    .where(
        sessions.c.session_id == bindparam("of_session"),
        sessions.c.owner == bindparam("of_owner"),
        sessions.c.metadata.is_not(None),
        sessions.c.deleted_at.is_(None),
    )
    .values(next_number=sessions.c.next_number + 1)
    .returning(sessions.c.next_number)
)
_UNFINISHED = (
    select(turns.c.turn_id, turns.c.status)
    .where(turns.c.session_id == bindparam("of_session"), text(UNFINISHED_SQL))
    .order_by(turns.c.number)
)
_LOCK_TURN = select(turns.c.status).where(turns.c.turn_id == bindparam("of_turn")).with_for_update()
_MAY_BE_RETRIED = (
    turns.c.created_at > _NOW - seconds(RETRY_SECONDS),
    or_(turns.c.completed_at.is_(None), turns.c.completed_at > _NOW - seconds(ANSWERED_SECONDS)),
)
_NEWEST = (
    select(turns.c.turn_id, turns.c.request_hash)
    .where(turns.c.session_id == bindparam("of_session"), turns.c.number == bindparam("numbered"), *_MAY_BE_RETRIED)
    .limit(1)
)
_SAME_RESPONSE = (
    select(turns.c.turn_id)
    .where(
        turns.c.kind == TurnKind.RESPONSE,
        turns.c.request_hash == bindparam("hash"),
        turns.c.owner == bindparam("of_owner"),
        turns.c.stored == bindparam("as_stored"),  # and not deleted since
        *_MAY_BE_RETRIED,
    )
    .order_by(turns.c.created_at.desc())
    .limit(1)
)
_ACTIVE = text("status IN ('queued', 'running')")


def _counted(*conditions: Any, most: str) -> Any:
    some = select(literal(1)).select_from(turns).where(_ACTIVE, *conditions).limit(bindparam(most)).subquery()
    return select(func.count()).select_from(some).scalar_subquery()


_COUNTS = select(
    _counted(turns.c.owner == bindparam("of_owner"), most="principal").label("principal"),
    _counted(most="total").label("total"),
)
_LOCK = select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("what"), 0)))
_GIVEN = ("turn_id", "session_id", "owner", "number", "request", "request_hash", "sealed")
_GIVEN_OF_RESPONSES = ("kind", "previous_turn_id", "stored", "last_fence", "last_n")
_QUEUED = {"status": TurnStatus.QUEUED, "tool_responses": {}, "queued_at": _NOW, "rung_at": _NOW, "rings": 1}
_ADD_TURN = insert(turns).values({name: bindparam(name) for name in _GIVEN} | _QUEUED)
_ADD_RESPONSE = insert(turns).values({name: bindparam(name) for name in _GIVEN + _GIVEN_OF_RESPONSES} | _QUEUED)


def accept(connection: Connection, asked: Submission, raise_fence: RaiseFence) -> Accepted:
    """Stores a new turn at the end of its session, and supersedes the one that awaits input there, if any.

    Raises NotFound: no such agent or session. KeyReused, TooManyTurns. Conflict: the strategy is `reject`, and the
    session has a turn that is queued or running.
    """
    known = _first_with_key(connection, asked.owner, asked.idempotency_key, asked.request_hash, asked.turn_id)
    if known is not None:
        get_session(connection, asked.owner, asked.agent_id, asked.session_id)
        return known
    where = {"of_session": asked.session_id, "of_agent": asked.agent_id, "of_owner": asked.owner}
    following = connection.execute(_TAKE_NUMBER, where).scalar()
    if following is None:
        get_session(connection, asked.owner, asked.agent_id, asked.session_id)
        raise NotFound("Session", asked.session_id)
    number = following - 1
    if asked.is_retry and (earlier := _retried(connection, asked, number)) is not None:
        return earlier
    unfinished = _with_first_settled(connection, asked) if number > 1 else ()
    _check_room(connection, asked, [row for row in unfinished if row.status != TurnStatus.AWAITING_INPUT])
    head = unfinished[0] if unfinished else None
    ended, interrupted = _make_way(connection, asked, head, raise_fence) if head else ((), None)
    given = {name: getattr(asked, name) for name in _GIVEN if name != "number"}
    connection.execute(_ADD_TURN, {**given, "number": number})
    return Accepted(asked.turn_id, ended=ended, interrupted=interrupted)


def accept_response(connection: Connection, asked: ResponseSubmission) -> Accepted:
    """Stores a new response, at the end of its conversation or alone, with its first events.

    May be asked again after a commit whose reply was lost: it then gives what the first one gave. Raises NotFound: no
    such conversation, or the response that the key led to was deleted. InvalidRequest: it cannot go on from the
    previous response. KeyReused, TooManyTurns.
    """
    known = _first_with_key(connection, asked.owner, asked.idempotency_key, asked.request_hash, asked.turn_id)
    if known is not None and known.turn_id != asked.turn_id:
        if asked.stored:
            responses.get_response(connection, asked.owner, known.turn_id)
        return known
    # Locks a conversation, so that a request waits for the one that it repeats.
    number = _place_in_conversation(connection, asked) if asked.in_conversation else _own_session(connection, asked)
    if (earlier := _earlier(connection, asked, made=number is None)) is not None:
        _give_back(connection, asked, earlier)
        return earlier
    assert number is not None  # else its own commit made it
    if asked.previous_turn_id is not None:
        responses.check_previous(connection, asked.owner, asked.previous_turn_id)
    busy = len(_unfinished(connection, asked.session_id)) if number > 1 else 0
    if busy >= asked.caps.session:
        raise TooManyTurns(f"The conversation has {busy} responses queued or running (MAX_TURNS_PER_SESSION)")
    _check_counts(connection, asked.owner, asked.caps)
    names = ("turn_id", "session_id", "owner", "request", "request_hash", "previous_turn_id", "stored", "sealed")
    last = asked.opening[-1].id
    more = {"number": number, "kind": TurnKind.RESPONSE, "last_fence": last.fence, "last_n": last.n}
    connection.execute(_ADD_RESPONSE, {name: getattr(asked, name) for name in names} | more)
    add_segment(connection, asked.turn_id, asked.opening)
    return Accepted(asked.turn_id)


def _place_in_conversation(connection: Connection, asked: ResponseSubmission) -> int:
    where = {"of_session": asked.session_id, "of_owner": asked.owner}
    following = connection.execute(_TAKE_NUMBER_IN_CONVERSATION, where).scalar()
    if following is None:
        raise NotFound("Conversation", f"conv_{asked.session_id.replace('-', '')}")
    return int(following) - 1


def _own_session(connection: Connection, asked: ResponseSubmission) -> int | None:
    """None: an earlier commit, whose reply was lost, has made it. One that is not stored is born deleted."""
    row = {"session_id": asked.session_id, "owner": asked.owner, "name": "", "next_number": 2}
    row["deleted_at"] = None if asked.stored else _NOW
    made = insert(sessions).values(row).on_conflict_do_nothing().returning(sessions.c.session_id)
    return 1 if connection.execute(made).scalar() else None


def _earlier(connection: Connection, asked: ResponseSubmission, *, made: bool) -> Accepted | None:
    """The response that this request has led to before: its own, after a lost reply to the commit; or if it is a retry,
    the newest that was asked for with the same words, as an SDK that lost its connection repeats them."""
    if made or connection.scalar(select(turns.c.turn_id).where(turns.c.turn_id == asked.turn_id)):
        return Accepted(asked.turn_id)
    if not asked.is_retry:
        return None
    row = {"of_owner": asked.owner, "hash": asked.request_hash, "as_stored": asked.stored}
    newest = connection.execute(_SAME_RESPONSE, row).scalar()
    return None if newest is None else Accepted(newest, is_new=False)


def _give_back(connection: Connection, asked: ResponseSubmission, earlier: Accepted) -> None:
    """The place that a request has taken, and the key, if an earlier one led to another response."""
    place = sessions.c.session_id == asked.session_id
    if asked.in_conversation:
        connection.execute(update(sessions).where(place).values(next_number=sessions.c.next_number - 1))
    elif not earlier.is_new:
        connection.execute(delete(sessions).where(place))
    if asked.idempotency_key is not None:
        mine = (idempotency_keys.c.owner == asked.owner, idempotency_keys.c.key == asked.idempotency_key)
        connection.execute(update(idempotency_keys).where(*mine).values(turn_id=earlier.turn_id))


def accept_again(connection: Connection, asked: Submission, raise_fence: RaiseFence) -> Accepted:
    """`accept` after a commit whose reply was lost: if that went through, or is under way still, its turn is the one.

    Of the turns that the first one ended, followers hear from Postgres, and upkeep rings what comes next.
    """
    connection.execute(select(sessions.c.session_id).where(sessions.c.session_id == asked.session_id).with_for_update())
    if connection.scalar(select(turns.c.turn_id).where(turns.c.turn_id == asked.turn_id)):
        return Accepted(asked.turn_id)
    return accept(connection, asked, raise_fence)


def resume(connection: Connection, asked: Resumption) -> Accepted:
    """Stores a client's tool responses and puts the turn back to queued for its next leg.

    Raises NotFound. KeyReused, TooManyTurns. Conflict: the turn does not await input. InvalidRequest: these are not its
    calls.
    """
    known = _first_with_key(connection, asked.owner, asked.idempotency_key, asked.request_hash, asked.turn_id)
    if known is not None:
        return known
    row = connection.execute(
        select(turns).where(turns.c.turn_id == asked.turn_id, turns.c.session_id == asked.session_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound("Turn", asked.turn_id)
    if row.status != TurnStatus.AWAITING_INPUT or row.cancel_requested_at is not None:
        is_now = row.status if row.cancel_requested_at is None else "being cancelled"
        raise Conflict(f"Turn '{asked.turn_id}' is {is_now}, so it does not await tool responses")
    responses = match_responses(row.output_message["tool_calls"], asked.responses)
    _check_counts(connection, asked.owner, asked.caps)
    steps = read_steps(connection, [asked.turn_id])[asked.turn_id]
    ordinal = max(i for i, step in enumerate(steps) if step["step_type"] == "inference")
    connection.execute(
        update(turns)
        .where(turns.c.turn_id == asked.turn_id)
        .values(
            status=TurnStatus.QUEUED,
            tool_responses={**row.tool_responses, str(ordinal): responses},
            output_message=None,
            completed_at=None,
            deadline_at=None,
            queued_at=_NOW,
            rung_at=_NOW,
            rings=1,
            **({"sealed": asked.sealed} if asked.sealed is not None else {}),
        )
    )
    after = EventId(row.last_fence, row.last_n)
    if asked.idempotency_key is not None:
        mine = (idempotency_keys.c.owner == asked.owner, idempotency_keys.c.key == asked.idempotency_key)
        connection.execute(update(idempotency_keys).where(*mine).values(after_fence=after.fence, after_n=after.n))
    return Accepted(asked.turn_id, after)


def _first_with_key(
    connection: Connection, owner: str, key: str | None, request_hash: bytes, turn_id: str
) -> Accepted | None:
    """Takes the key for this request, waiting for another one with the same key to be over.

    Gives what the earlier request led to, None if there was none. Raises KeyReused.
    """
    if key is None:
        return None
    row = {"owner": owner, "key": key, "request_hash": request_hash, "turn_id": turn_id}
    if connection.execute(_ADD_KEY, row).scalar() is not None:
        return None
    found = connection.execute(
        select(idempotency_keys).where(idempotency_keys.c.owner == owner, idempotency_keys.c.key == key)
    ).one()
    if bytes(found.request_hash) != request_hash:
        raise KeyReused("Idempotency-Key: this key was given before with another request")
    return Accepted(found.turn_id, EventId(found.after_fence, found.after_n), is_new=False)


def _retried(connection: Connection, asked: Submission, number: int) -> Accepted | None:
    """The session's newest turn, if this request asks for the same and was not answered yet; gives the number back."""
    newest = connection.execute(_NEWEST, {"of_session": asked.session_id, "numbered": number - 1}).one_or_none()
    if newest is None or newest.request_hash is None or bytes(newest.request_hash) != asked.request_hash:
        return None
    untaken = update(sessions).where(sessions.c.session_id == asked.session_id)
    connection.execute(untaken.values(next_number=number))
    if asked.idempotency_key is not None:
        mine = (idempotency_keys.c.owner == asked.owner, idempotency_keys.c.key == asked.idempotency_key)
        connection.execute(update(idempotency_keys).where(*mine).values(turn_id=newest.turn_id))
    return Accepted(newest.turn_id, is_new=False)


def _unfinished(connection: Connection, session_id: str) -> Sequence[Any]:
    return connection.execute(_UNFINISHED, {"of_session": session_id}).all()


def _with_first_settled(connection: Connection, asked: Submission) -> Sequence[Any]:
    """The session's unfinished turns. The first one's row is locked if that turn is to make way: what its status says
    here is so until the end of this transaction, and nobody resumes it meanwhile.
    """
    while unfinished := _unfinished(connection, asked.session_id):
        first = unfinished[0]
        if first.status != TurnStatus.AWAITING_INPUT and asked.strategy != MultitaskStrategy.INTERRUPT:
            break
        if connection.scalar(_LOCK_TURN, {"of_turn": first.turn_id}) == first.status:
            break
    return unfinished


def _check_room(connection: Connection, asked: Submission, busy: Sequence[Any]) -> None:
    if busy and asked.strategy == MultitaskStrategy.REJECT:
        raise Conflict(f"Session '{asked.session_id}' has a turn that is {busy[0].status}: '{busy[0].turn_id}'")
    if len(busy) >= asked.caps.session:
        raise TooManyTurns(f"The session has {len(busy)} turns queued or running (MAX_TURNS_PER_SESSION)")
    _check_counts(connection, asked.owner, asked.caps)


def _check_counts(connection: Connection, owner: str, caps: Caps) -> None:
    """Exact although requests run side by side: near a cap they go one by one."""
    limits: dict[str, Any] = {"of_owner": owner, "principal": caps.principal, "total": caps.total}
    counts = connection.execute(_COUNTS, limits).one()
    near = [
        what
        for what, count, cap in (
            (f"turns of {owner}", counts.principal, caps.principal),
            ("turns", counts.total, caps.total),
        )
        if count + EXACT_BELOW >= cap
    ]
    for what in near:
        connection.execute(_LOCK, {"what": f"caravan {what}"})
    if near:
        counts = connection.execute(_COUNTS, limits).one()
    if counts.principal >= caps.principal:
        raise TooManyTurns(f"You have {caps.principal} turns queued or running (MAX_TURNS_PER_PRINCIPAL)")
    if counts.total >= caps.total:
        raise TooManyTurns(f"There are {caps.total} turns queued or running (MAX_TURNS)")


def _make_way(
    connection: Connection, asked: Submission, head: Any, raise_fence: RaiseFence
) -> tuple[list[Ended], str | None]:
    """Ends the first unfinished turn of the session if it awaits input, or is to be interrupted.

    Gives the turns that ended, and the running one that its worker is asked to cancel.
    """
    status: TurnStatus | None = TurnStatus(head.status)
    if status == TurnStatus.AWAITING_INPUT:
        ended = end(connection, head.turn_id, SUPERSEDED, _no_tail)
    elif asked.strategy == MultitaskStrategy.INTERRUPT:
        status, ended = cancel(connection, head.turn_id, INTERRUPTED, raise_fence)
    else:
        return [], None
    return [ended] if ended else [], head.turn_id if status == TurnStatus.RUNNING else None


def _no_tail(turn_id: str, fence: int, last: EventId) -> None:
    """A turn that awaits input has every event recorded, so there is no tail to save."""


def forget_keys(connection: Connection, limit: int) -> int:
    """Deletes keys that are over a day old."""
    # Not by the clock, which is volatile, so that Postgres would look at every key.
    old = (
        select(idempotency_keys.c.owner, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at < func.now() - seconds(KEEP_KEYS_SECONDS))
        .order_by(idempotency_keys.c.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .subquery()
    )
    same = (idempotency_keys.c.owner == old.c.owner, idempotency_keys.c.key == old.c.key)
    return connection.execute(idempotency_keys.delete().where(*same)).rowcount
