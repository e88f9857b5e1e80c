"""The chunks of a session's documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from app.store import Store, agents, session_chunks
from app.store.session_chunks import SessionChunk, array_of
from tests.integration.store.seeds import OWNER, Seeds


@pytest.fixture(scope="module", autouse=True)
def _pgvector(store: Store) -> None:
    """As the Llama Stack does at its start."""
    store.transact(lambda connection: connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector")))


def chunk(content: str, *embedding: float) -> SessionChunk:
    return SessionChunk(content, {"content": content}, array_of(embedding))


def found(store: Store, session: str, *embedding: float) -> list[str]:
    return [each["content"] for each, _ in store.transact(session_chunks.nearest, session, embedding, 10)]


def test_the_nearest_chunks_of_a_session_are_found(store: Store, seeds: Seeds) -> None:
    """By distance, or by their words; never another session's."""
    one, other = seeds.session(), seeds.session()
    assert store.transact(session_chunks.embedding_model, one) is None
    camels = [chunk("camels drink", 1, 0), chunk("a camel rests", 0.6, 0.8), chunk("sand", 0, 1)]
    store.transact(session_chunks.replace_document, one, "d", "m", camels)
    store.transact(session_chunks.replace_document, other, "d", "m", [chunk("another's", 1, 0)])
    assert store.transact(session_chunks.embedding_model, one) == "m"
    assert found(store, one, 1, 0) == ["camels drink", "a camel rests", "sand"]
    assert [round(distance, 6) for _, distance in store.transact(session_chunks.nearest, one, [1.0, 0.0], 2)] == [
        0,
        0.4,
    ]
    matching = store.transact(session_chunks.matching, one, "drinking camels", 10)
    assert [each["content"] for each, _ in matching] == ["camels drink"]


def test_a_document_takes_its_own_place(store: Store, seeds: Seeds) -> None:
    session = seeds.session()
    store.transact(session_chunks.replace_document, session, "a", "m", [chunk("old", 1, 0), chunk("older", 1, 0)])
    store.transact(session_chunks.replace_document, session, "b", "m", [chunk("other", 0, 1)])
    store.transact(session_chunks.replace_document, session, "a", "m", [chunk("new", 1, 0)])
    assert found(store, session, 1, 0) == ["new", "other"]


def test_chunks_go_with_their_session_or_agent(store: Store, seeds: Seeds) -> None:
    """Whichever process purges them."""
    agent = seeds.agent()
    one, other = seeds.session(agent), seeds.session(agent)
    for session in (one, other):
        store.transact(session_chunks.replace_document, session, "a", "m", [chunk("x", 1, 0)])
    store.transact(agents.mark_session_deleted, OWNER, agent, one)
    store.transact(agents.purge_deleted, -1, 1000)
    assert (found(store, one, 1, 0), found(store, other, 1, 0)) == ([], ["x"])
    store.transact(agents.mark_agent_deleted, OWNER, agent)
    store.transact(agents.purge_deleted, -1, 1000)
    assert found(store, other, 1, 0) == []


def test_the_largest_document_takes_a_part_of_a_transactions_time(store: Store, seeds: Seeds) -> None:
    """A megabyte of text that is all signs, with long vectors: beyond that time it would be tried again for ever."""
    session = seeds.session()
    limited = Store(store.engine.url, pool_size=1, name="limited")
    many = [chunk("camels drink " * 20, *[0.123456789] * 1536)] * 5500
    limited.transact(session_chunks.replace_document, session, "d", "m", many)
    limited.close()
    assert len(found(store, session, *[1.0] * 1536)) == 10


def test_attempts_that_write_the_same_document_at_once_take_turns(store: Store, seeds: Seeds) -> None:
    """One of them has lost its lease, and does not know it yet."""
    session, many = seeds.session(), [chunk("camels", 1, 0)] * 50
    with ThreadPoolExecutor(3) as threads:
        written = [
            threads.submit(store.transact, session_chunks.replace_document, session, "d", "m", many) for _ in range(20)
        ]
        assert [each.result() for each in written] == [None] * 20
    assert len(store.transact(session_chunks.nearest, session, [1.0, 0.0], 100)) == 50
