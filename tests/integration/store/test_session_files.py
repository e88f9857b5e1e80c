"""The folder that a session's code works in, as each turn leaves it."""

from __future__ import annotations

import uuid

import pytest

from app.domain.errors import NotFound
from app.store import agents, session_files
from app.store.agents import purge_deleted
from app.store.claims import Claim
from tests.integration.store.seeds import OWNER, Seeds


def left(seeds: Seeds, session_id: str, **files: bytes | None) -> Claim:
    """A turn of the session, the only one that runs there, which left these files and ended."""
    claim = seeds.claimed(seeds.turn(session_id))
    seeds.record(claim, files=files)
    seeds.cancel(claim.turn_id)
    seeds.lose_worker(claim)
    return claim


def folder(seeds: Seeds, session_id: str) -> dict[str, bytes]:
    return seeds.store.transact(session_files.folder, session_id)


def test_the_folder_is_what_the_last_turn_left_of_each_file(seeds: Seeds) -> None:
    """A removed file is gone, until a turn makes it again; other sessions have folders of their own."""
    session_id = seeds.session()
    left(seeds, session_id, a=b"1", b=b"1")
    left(seeds, session_id, a=b"22", b=None, c=b"2")
    assert folder(seeds, session_id) == {"a": b"22", "c": b"2"}
    assert seeds.store.transact(session_files.sizes, session_id) == {"a": 2, "c": 1}
    left(seeds, session_id, b=b"", c=None)
    assert folder(seeds, session_id) == {"a": b"22", "b": b""}
    assert folder(seeds, seeds.session()) == {}


def test_a_turn_that_leaves_a_file_twice_leaves_the_last(seeds: Seeds) -> None:
    claim = seeds.claimed()
    claim = seeds.record(claim, files={"a": b"1", "b": b"1"})
    seeds.record(claim, files={"a": b"2", "b": None})
    assert folder(seeds, claim.session_id) == {"a": b"2"}


def test_a_turns_files_stay_as_it_left_them(seeds: Seeds) -> None:
    """Whatever later turns do to them; what it never left, or removed, is not found."""
    session_id = seeds.session()
    first = left(seeds, session_id, a=b"1")
    second = left(seeds, session_id, a=None, b=b"2")
    read = session_files.left_by_turn
    assert seeds.store.transact(read, session_id, first.turn_id, "a") == b"1"
    assert seeds.store.transact(read, session_id, second.turn_id, "b") == b"2"
    for turn_id, name in ((first.turn_id, "b"), (second.turn_id, "a"), (str(uuid.uuid4()), "a")):
        with pytest.raises(NotFound):
            seeds.store.transact(read, session_id, turn_id, name)
    with pytest.raises(NotFound):
        seeds.store.transact(read, seeds.session(), first.turn_id, "a")


def test_files_go_with_their_session(seeds: Seeds) -> None:
    claim = left(seeds, seeds.session(), a=b"1")
    assert claim.agent_id
    seeds.store.transact(agents.mark_session_deleted, OWNER, claim.agent_id, claim.session_id)
    seeds.store.transact(purge_deleted, -1, 1000)
    assert folder(seeds, claim.session_id) == {}
