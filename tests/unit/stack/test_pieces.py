"""Texts in pieces, and their embeddings."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from app.stack.pieces import BATCH, embed, pieces

TEXT = " ".join(f"word{n}" for n in range(300))


async def cut(document_id: str = "d", text: str = TEXT, **metadata: Any) -> list[Any]:
    return await pieces(document_id, text, 100, 25, metadata)


async def test_pieces_overlap_and_cover_the_text() -> None:
    """Each begins where the last had a fourth left; none lies wholly in the one before."""
    found = await cut(source="s", filename="f")
    windows = [tuple(map(int, each.chunk_metadata.chunk_window.split("-"))) for each in found]
    assert all(later[0] == earlier[0] + 75 for earlier, later in pairwise(windows))
    assert all(later[1] > earlier[1] for earlier, later in pairwise(windows))
    assert found[0].content.startswith(TEXT[:20])
    assert found[-1].content.endswith("word299")
    assert found[0].metadata.items() >= {"source": "s", "filename": "f", "document_id": "d", "token_count": 100}.items()
    assert found[0].chunk_metadata.source == "s"


async def test_the_same_text_in_two_documents_has_ids_of_its_own() -> None:
    """And in one document always the same ones."""
    one, again, other = [{each.chunk_id for each in await cut(name)} for name in ("a", "a", "b")]
    assert one == again
    assert not one & other


@pytest.mark.parametrize("text", ["", "  \n "])
async def test_nothing_has_no_pieces(text: str) -> None:
    assert await cut(text=text) == []


@pytest.mark.parametrize("overlap", [-1, 81, 100, 400])
async def test_pieces_that_hardly_differ_or_have_gaps_are_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 80 for 100 tokens, not {overlap}"):
        await pieces("d", TEXT, 100, overlap, {})


class Inference:
    """`asked`: how many texts each request had."""

    def __init__(self, dimension: int = 2, missing: int = 0) -> None:
        self.asked: list[int] = []
        self._dimension = dimension
        self._missing = missing

    async def openai_embeddings(self, params: Any) -> Any:
        self.asked.append(len(params.input))
        given = [SimpleNamespace(embedding=[float(len(text))] * self._dimension) for text in params.input]
        return SimpleNamespace(data=given[self._missing :])


async def test_each_piece_gets_its_embedding() -> None:
    inference, chunks = Inference(), await cut(text=" ".join([TEXT] * 12))
    assert len(chunks) > BATCH
    await embed(inference, "m", chunks, 2)
    assert all(each.embedding == [len(each.content)] * 2 for each in chunks)
    assert max(inference.asked) == BATCH
    assert {each.chunk_metadata.chunk_embedding_model for each in chunks} == {"m"}


async def test_wrong_embeddings_are_an_error() -> None:
    """Too few of them, or of another length than was registered."""
    chunks = await cut()
    with pytest.raises(ValueError, match="embeddings for"):
        await embed(Inference(missing=1), "m", chunks)
    with pytest.raises(ValueError, match="3 numbers, where 2"):
        await embed(Inference(dimension=3), "m", chunks, 2)
