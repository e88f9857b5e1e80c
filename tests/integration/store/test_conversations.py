"""Conversations and their items; what other sessions go on from stays."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import text

from app.domain.errors import InvalidRequest, NotFound
from app.domain.items import Item, checked, with_ids
from app.store import agents, conversations, prune
from app.store.conversations import ConversationRow
from tests.integration.store.seeds import OWNER, Seeds, unhurried
from tests.integration.store.test_prune import DAY, aged, prune_all, sessions
from tests.support import wait_until

OTHER = "another"


def said(*texts: str) -> list[Item]:
    return with_ids(checked([{"role": "user", "content": text} for text in texts]))


def texts(items: list[Item]) -> list[str]:
    return [item["content"][0]["text"] for item in items]


class Talk:
    """A conversation, by the store's functions."""

    def __init__(self, seeds: Seeds, *items: Item, metadata: dict[str, str] | None = None) -> None:
        self.store = seeds.store
        self.session_id = str(uuid.uuid4())
        self.made: ConversationRow = self.store.transact(
            conversations.create, OWNER, self.session_id, metadata or {}, items
        )

    def add(self, *items: Item) -> None:
        self.store.transact(conversations.add_items, OWNER, self.session_id, items)

    def page(self, limit: int, after: str | None = None, *, descending: bool = False) -> tuple[list[Item], bool]:
        return self.store.transact(
            conversations.list_items, OWNER, self.session_id, after, limit, descending=descending
        )

    def all(self) -> list[tuple[Item, str | None]]:
        return self.store.transact(conversations.items_of, self.session_id)


def test_items_are_listed_in_order_page_by_page_both_ways(seeds: Seeds) -> None:
    talk = Talk(seeds, *said("1", "2"))
    talk.add(*said("3", "4", "5"))
    first, more = talk.page(2)
    assert (texts(first), more) == (["1", "2"], True)
    rest, more = talk.page(3, after=first[-1]["id"])
    assert (texts(rest), more) == (["3", "4", "5"], False)
    newest, more = talk.page(2, descending=True)
    assert (texts(newest), more) == (["5", "4"], True)
    oldest, more = talk.page(100, after=newest[-1]["id"], descending=True)
    assert (texts(oldest), more) == (["3", "2", "1"], False)
    assert talk.page(1, after=rest[-1]["id"]) == ([], False)
    assert [(item["id"], result) for item, result in talk.all()] == [(item["id"], None) for item in [*first, *rest]]


def test_an_item_is_kept_as_it_is(seeds: Seeds) -> None:
    """U+0000, numbers, the order of the members; also what a tool said besides."""
    talk = Talk(seeds)
    item = {"z": 1.5, "id": "fs_1", "type": "file_search_call", "queries": ["\0é"], "a": {"b": [None, 10**30]}}
    seeds.store.transact(conversations.append, talk.session_id, [(item, "found \0 it"), (said("x")[0], None)])
    assert talk.all()[0] == (item, "found \0 it")
    assert list(talk.all()[0][0]) == list(item)
    assert talk.all()[1][1] is None
    assert seeds.store.transact(conversations.get_item, OWNER, talk.session_id, "fs_1") == item


def test_an_id_is_there_once_in_a_conversation(seeds: Seeds) -> None:
    """A request that brings one again is refused, all of it; the engine leaves it out; another conversation has one."""
    item, same, new = {**said("first")[0], "id": "m1"}, {**said("same")[0], "id": "m1"}, said("new")[0]
    talk = Talk(seeds, item)
    with pytest.raises(InvalidRequest, match=r"^items\[1\]\.id: .*'m1'"):
        talk.add(new, same)
    assert [each for each, _ in talk.all()] == [item]
    assert seeds.store.transact(conversations.append, talk.session_id, [(same, None), (new, None)]) == {"m1"}
    assert [each for each, _ in talk.all()] == [item, new]
    assert Talk(seeds, same).page(1)[0] == [same]


def test_what_two_add_at_once_is_not_mixed(seeds: Seeds) -> None:
    """Each request's items stand together, and in the order of the commits: no reader is overtaken."""
    talk = Talk(seeds)
    batches = [said(*(f"{number}.{index}" for index in range(20))) for number in range(12)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda batch: talk.add(*batch), batches))
    found = texts([item for item, _ in talk.all()])
    assert len(found) == 240
    for start in range(0, 240, 20):
        number = found[start].partition(".")[0]
        assert found[start : start + 20] == [f"{number}.{index}" for index in range(20)]


@contextmanager
def not_found(*named: str) -> Iterator[None]:
    with pytest.raises(NotFound) as raised:
        yield
    assert all(name in str(raised.value) for name in named)


def test_another_principals_conversation_does_not_exist(seeds: Seeds) -> None:
    """Nor does an agent's session, a response's own, a deleted or an unknown conversation; for no route."""
    talk = Talk(seeds, *said("mine"))
    of_agent, gone, alone, unknown = seeds.session(), Talk(seeds).session_id, str(uuid.uuid4()), str(uuid.uuid4())
    seeds.store.transact(conversations.mark_deleted, OWNER, gone)
    insert = "INSERT INTO sessions (session_id, owner, name) VALUES (:id, :owner, '') RETURNING 1"
    seeds.scalar(insert, id=alone, owner=OWNER)
    item_id = talk.page(1)[0][0]["id"]
    for owner, session_id in [(OTHER, talk.session_id), *((OWNER, it) for it in (of_agent, gone, alone, unknown))]:
        name = f"conv_{session_id.replace('-', '')}"
        for query, more in (
            (conversations.get, ()),
            (conversations.update_metadata, ({"a": "b"},)),
            (conversations.mark_deleted, ()),
            (conversations.add_items, (said("x"),)),
            (conversations.get_item, (item_id,)),
            (conversations.delete_item, (item_id,)),
        ):
            with not_found("Conversation", name):
                seeds.store.transact(query, owner, session_id, *more)
        with not_found("Conversation", name):
            seeds.store.transact(conversations.list_items, owner, session_id, None, 1, descending=True)
    assert seeds.store.transact(conversations.get, OWNER, talk.session_id) == talk.made
    assert texts([item for item, _ in talk.all()]) == ["mine"]


@pytest.mark.parametrize("item_id", ["unknown", "with \0", "x" * 5000], ids=["unknown", "nul", "long"])
def test_an_unknown_item_is_not_found(seeds: Seeds, item_id: str) -> None:
    talk = Talk(seeds, *said("x"))
    for query in (conversations.get_item, conversations.delete_item):
        with not_found("Item"):
            seeds.store.transact(query, OWNER, talk.session_id, item_id)
    with not_found("Item"):
        talk.page(1, after=item_id)


def test_an_item_and_metadata_can_be_changed(seeds: Seeds) -> None:
    talk = Talk(seeds, *said("1", "2", "3"), metadata={"a": "\0"})
    assert talk.made.metadata == {"a": "\0"}
    second = talk.page(3)[0][1]["id"]
    assert seeds.store.transact(conversations.delete_item, OWNER, talk.session_id, second) == talk.made
    assert texts(talk.page(3)[0]) == ["1", "3"]
    changed = seeds.store.transact(conversations.update_metadata, OWNER, talk.session_id, {})
    assert changed.metadata == {}
    assert seeds.store.transact(conversations.get, OWNER, talk.session_id) == changed


def test_a_deleted_conversation_is_hidden_at_once_and_its_items_go_with_it(seeds: Seeds) -> None:
    talk = Talk(seeds, *said("1"))
    running = turn_in(seeds, talk.session_id, status="queued")
    assert seeds.store.transact(conversations.mark_deleted, OWNER, talk.session_id) == [running]
    assert seeds.column(running, "cancel_requested_at") is not None
    seeds.store.transact(agents.purge_deleted, 0, 1000)
    assert len(talk.all()) == 1
    finish(seeds, running)
    seeds.store.transact(agents.purge_deleted, 0, 1000)
    assert talk.all() == []
    assert talk.session_id not in sessions(seeds)


# --- what others go on from -------------------------------------------------------------------------------------------


def turn_in(seeds: Seeds, session_id: str, previous: str | None = None, status: str = "completed") -> str:
    """A response's turn, as the web process stores one."""
    turn_id = str(uuid.uuid4())
    seeds.scalar(
        """INSERT INTO turns (turn_id, session_id, owner, number, status, request, tool_responses, queued_at, kind,
                              previous_turn_id, completed_at)
           VALUES (:turn, :session, :owner, 1, :status, '{}', '{}', now(), 'response', :previous,
                   CASE :status WHEN 'completed' THEN now() END) RETURNING 1""",
        turn=turn_id, session=session_id, owner=OWNER, status=status, previous=previous,
    )  # fmt: skip
    seeds.scalar("UPDATE sessions SET next_number = 2 WHERE session_id = :id RETURNING 1", id=session_id)
    return turn_id


def finish(seeds: Seeds, turn_id: str) -> None:
    seeds.scalar(
        "UPDATE turns SET status = 'completed', completed_at = now() WHERE turn_id = :id RETURNING 1", id=turn_id
    )


def chain(seeds: Seeds, length: int, days: float = 0) -> list[str]:
    """The sessions of so many responses, each of which goes on from the one before."""
    made, previous = [], None
    for _ in range(length):
        session_id = Talk(seeds).session_id
        previous = turn_in(seeds, session_id, previous)
        made.append(aged(seeds, session_id, days) if days else session_id)
    return made


def delete(seeds: Seeds, *session_ids: str) -> None:
    for session_id in session_ids:
        seeds.store.transact(conversations.mark_deleted, OWNER, session_id)


def test_what_another_sessions_response_goes_on_from_is_not_purged(seeds: Seeds) -> None:
    """Be it through others, and if these are deleted too. All of it goes once nobody goes on from it."""
    first, second, last = chain(seeds, 3)
    delete(seeds, first, second)
    seeds.store.transact(agents.purge_deleted, 0, 1000)
    assert {first, second, last} <= sessions(seeds)
    delete(seeds, last)
    seeds.store.transact(agents.purge_deleted, 0, 1000)
    assert not {first, second, last} & sessions(seeds)


def test_a_conversation_whose_responses_go_on_from_each_other_is_purged(seeds: Seeds) -> None:
    talk = Talk(seeds)
    first = turn_in(seeds, talk.session_id)
    seeds.scalar("UPDATE turns SET number = 0 WHERE turn_id = :id RETURNING 1", id=first)
    turn_in(seeds, talk.session_id, first)
    delete(seeds, talk.session_id)
    seeds.store.transact(agents.purge_deleted, 0, 1000)
    assert talk.session_id not in sessions(seeds)


def test_what_a_session_in_use_goes_on_from_is_not_pruned(seeds: Seeds) -> None:
    prune_all(seeds, DAY)
    used, idle = chain(seeds, 3, days=40), chain(seeds, 4, days=40)
    used.append(Talk(seeds).session_id)
    turn_in(seeds, used[-1], previous=last_turn(seeds, used[-2]))
    assert seeds.store.transact(prune.idle_sessions, 30 * DAY) == len(idle)
    assert prune_all(seeds, 30 * DAY) == len(idle)
    assert set(used) <= sessions(seeds)
    assert not set(idle) & sessions(seeds)


def test_a_chain_is_pruned_whatever_batches_its_sessions_are_in(seeds: Seeds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one first, so that no response is ever without what it goes on from."""
    monkeypatch.setattr(prune, "BATCH", 2)
    prune_all(seeds, DAY)
    made = chain(seeds, 9, days=40)
    torn = (
        """SELECT count(*) FROM turns WHERE kind = 'response' AND previous_turn_id IS NULL AND session_id = ANY(:ids)"""
    )
    after: str | None = None
    while True:
        _, after = seeds.store.transact(prune.prune_sessions, 30 * DAY, after)
        assert seeds.scalar(torn, ids=[uuid.UUID(each) for each in made[1:]]) == 0
        if after is None:
            break
    assert not set(made) & sessions(seeds)


def last_turn(seeds: Seeds, session_id: str) -> str:
    return str(seeds.scalar("SELECT turn_id FROM turns WHERE session_id = :id", id=session_id))


def test_a_conversation_to_which_somebody_added_lately_is_not_pruned(seeds: Seeds) -> None:
    """Nor is one with a late response; an old one goes, with or without items."""
    prune_all(seeds, DAY)
    added, answered, empty, old = talks = [Talk(seeds, *said(*"ab"[:number])) for number in (1, 2, 0, 2)]
    for talk in talks:
        aged(seeds, talk.session_id, 40)
        seeds.scalar(
            "UPDATE session_items SET created_at = created_at - interval '40 d' WHERE session_id = :id RETURNING 1",
            id=talk.session_id,
        )
    added.add(*said("later"))
    turn_in(seeds, answered.session_id)
    prune_all(seeds, 30 * DAY)
    left = sessions(seeds)
    assert {added.session_id, answered.session_id} <= left
    assert not {empty.session_id, old.session_id} & left


def test_an_item_that_is_added_while_its_conversation_is_pruned_is_refused(seeds: Seeds) -> None:
    """It waits, and then there is no conversation: no error of the database's."""
    talk = Talk(seeds)
    with ThreadPoolExecutor(1) as thread, unhurried(seeds.store) as connection:
        connection.execute(text("DELETE FROM sessions WHERE session_id = :id"), {"id": talk.session_id})
        adding = thread.submit(talk.add, *said("x"))
        wait_until(lambda: seeds.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0)
        connection.commit()
        with not_found("Conversation"):
            adding.result(60)
