"""A document's text in overlapping pieces, llama_stack's `Chunk`s, and their embeddings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llama_stack.apis.inference import OpenAIEmbeddingsRequestWithExtraBody
from llama_stack.apis.vector_io import Chunk, ChunkMetadata
from llama_stack.models.llama.llama3.tokenizer import Tokenizer
from llama_stack.providers.utils.vector_io.vector_utils import generate_chunk_id

BATCH = 64
"""Texts in one request for embeddings: servers limit them."""

_TOKENIZER = "DEFAULT_TIKTOKEN_TOKENIZER"


async def pieces(document_id: str, text: str, tokens: int, overlap: int, metadata: Mapping[str, Any]) -> list[Chunk]:
    """Pieces of `tokens` tokens of Llama 3, each `overlap` of which the one before has too; no embeddings yet.

    As `make_overlapped_chunks` of llama_stack makes them, but: in a thread, since it reads a vocabulary first; the id
    of a piece says whose it is, so that two documents of one text do not share it; no piece only repeats the last's.
    Raises ValueError: they overlap by more than four fifths (by all but one token, a document makes gigabytes).
    """
    if not 0 <= 5 * overlap <= 4 * tokens:
        raise ValueError(f"chunk_overlap_tokens must be from 0 to {4 * tokens // 5} for {tokens} tokens, not {overlap}")
    return await asyncio.to_thread(_pieces, document_id, text, tokens, overlap, metadata)


def _pieces(document_id: str, text: str, tokens: int, overlap: int, metadata: Mapping[str, Any]) -> list[Chunk]:
    tokenizer = Tokenizer.get_instance()
    encoded = tokenizer.encode(text, bos=False, eos=False)
    about = len(tokenizer.encode(str(dict(metadata)), bos=False, eos=False))
    now = int(time.time())
    found = []
    for start in range(0, max(1, len(encoded) - overlap), tokens - overlap):
        window = encoded[start : start + tokens]
        content = tokenizer.decode(window)
        if not content.strip():
            continue
        where = f"{start}-{start + len(window)}"
        chunk_id = generate_chunk_id(document_id, content, where)
        about_it = {**metadata, "chunk_id": chunk_id, "document_id": document_id}
        backend = ChunkMetadata(
            chunk_id=chunk_id,
            document_id=document_id,
            source=metadata.get("source"),
            created_timestamp=now,
            updated_timestamp=now,
            chunk_window=where,
            chunk_tokenizer=_TOKENIZER,
            content_token_count=len(window),
            metadata_token_count=about,
        )
        counts = {"token_count": len(window), "metadata_token_count": about}
        found.append(Chunk(content=content, metadata=about_it | counts, chunk_metadata=backend))
    return found


async def embed(inference: Any, model: str, chunks: Sequence[Chunk], dimension: int | None = None) -> None:
    """Give each chunk its embedding by `model`; all have one, or it raises what the model server's failure raises.

    Raises ValueError: an embedding has not `dimension` numbers, or some are missing.
    """
    for start in range(0, len(chunks), BATCH):
        batch = chunks[start : start + BATCH]
        asked = OpenAIEmbeddingsRequestWithExtraBody(model=model, input=[str(chunk.content) for chunk in batch])
        answer = await inference.openai_embeddings(asked)
        if len(answer.data) != len(batch):
            raise ValueError(f"{model} gave {len(answer.data)} embeddings for {len(batch)} texts")
        for chunk, given in zip(batch, answer.data, strict=True):
            if dimension is not None and len(given.embedding) != dimension:
                raise ValueError(f"{model} gives {len(given.embedding)} numbers, where {dimension} are registered")
            chunk.embedding = given.embedding
            if chunk.chunk_metadata is not None:
                chunk.chunk_metadata.chunk_embedding_model = model
                chunk.chunk_metadata.chunk_embedding_dimension = len(given.embedding)
