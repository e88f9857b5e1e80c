"""Rows of models and tools that every client can read; ids of vector stores under both names; older paths."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Model as OpenAIModel

from app.api.compat import models, tools, vectors
from app.api.compat.paths import current_path

MODEL: dict[str, Any] = {
    "identifier": "org/llama",
    "provider_resource_id": "llama",
    "provider_id": "model-server",
    "type": "model",
    "owner": {"principal": "ada"},
    "source": "via_register_api",
    "metadata": {"embedding_dimension": 8},
    "model_type": "embedding",
}


def test_one_row_of_a_model_serves_all_readers() -> None:
    """0.1 to 0.3.5 read `identifier`, newer ones and openai's `id`; whose it is stays here."""
    row = models.as_row(MODEL)
    assert (row["identifier"], row["model_id"], row["id"]) == ("org/llama",) * 3
    assert (row["model_type"], row["type"], row["object"]) == ("embedding", "model", "model")
    assert row["custom_metadata"] == {
        "embedding_dimension": 8,
        "model_type": "embedding",
        "provider_id": "model-server",
        "provider_resource_id": "llama",
    }
    assert OpenAIModel.model_validate(row, strict=True).id == "org/llama"
    assert "owner" not in row


def test_a_list_of_models_is_one_for_openai_too() -> None:
    """`object` is the list's."""
    assert models.as_list({"data": [MODEL]}) == {"object": "list", "data": [models.as_row(MODEL)]}


def test_one_row_of_a_tool_serves_all_readers() -> None:
    """0.1 and 0.2 read `identifier` and `parameters`, 0.3 `name` and `input_schema`."""
    schema = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    tool = {"toolgroup_id": "g", "name": "search", "description": "d", "input_schema": schema, "metadata": None}
    row = tools.as_list({"data": [tool]}, {"g": "mcp"})["data"][0]
    assert row.items() >= tool.items()
    assert (row["identifier"], row["type"], row["provider_id"]) == ("search", "tool", "mcp")
    assert [(each["name"], each["required"]) for each in row["parameters"]] == [("query", True)]
    assert tools.as_row({**tool, "input_schema": None}, {})["parameters"] == []


@pytest.mark.parametrize("name", ["vector_db_id", "vector_store_id"])
def test_both_names_of_an_id_are_taken(name: str) -> None:
    """On each route under the name that the Llama Stack wants there; without one, it says what is missing."""
    for to in ("vector_db_id", "vector_store_id"):
        assert vectors.renamed({name: "x", "query": "q"}, to=to) == {to: "x", "query": "q"}
        assert vectors.renamed({"query": "q"}, to=to) == {"query": "q"}


def test_the_wanted_name_goes_first() -> None:
    """Also for the list of ids."""
    assert vectors.renamed({"vector_db_ids": ["a"]}, to="vector_store_ids") == {"vector_store_ids": ["a"]}
    both = {"vector_db_ids": ["a"], "vector_store_ids": ["b"]}
    assert vectors.renamed(both, to="vector_store_ids") == {"vector_store_ids": ["b"]}
    null = {"vector_db_ids": ["a"], "vector_store_ids": None}
    assert vectors.renamed(null, to="vector_store_ids") == {"vector_store_ids": ["a"]}


def test_chunks_get_metadata_that_search_can_read() -> None:
    """Theirs stays; what is no chunk is left for the validation."""
    own = {"content": "a", "chunk_metadata": {"source": "s"}}
    body = {"chunks": [own, {"content": "b", "chunk_id": "c", "metadata": {"document_id": "d"}}, "no chunk"]}
    described = vectors.described(body)["chunks"]
    assert described[0] == own
    assert described[1]["chunk_metadata"] == {"chunk_id": "c", "document_id": "d"}
    assert described[2] == "no chunk"
    number = vectors.described({"chunks": [{"metadata": {"document_id": 3}}]})["chunks"][0]
    assert number["chunk_metadata"]["document_id"] == number["metadata"]["document_id"] == "3"
    for wrong in ({}, {"chunks": 3}, {"chunks": [{"metadata": 3}]}):
        vectors.described(wrong)


@pytest.mark.parametrize(("given", "told"), [(50, 100), (512, 512), (10_000, 4096), (0, 0), (-1, -1), ("x", "x")])
def test_a_size_of_chunks_becomes_the_nearest_that_is_allowed(given: Any, told: Any) -> None:
    """0.1 and 0.2 knew no bounds; what is no size is left for the validation."""
    assert vectors.resized({"chunk_size_in_tokens": given}) == {"chunk_size_in_tokens": told}
    assert vectors.resized({}) == {}


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("/v1/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/openai/v1/vector_stores/vs_1/files", "/v1/vector_stores/vs_1/files"),
        ("/v1/openai/v1", "/v1/openai/v1"),
        ("/v1/inspect/providers", "/v1/providers"),
        ("/v1/models/v1/openai/v1/x", "/v1/models/v1/openai/v1/x"),
    ],
)
def test_older_paths_have_current_ones(old: str, current: str) -> None:
    """Only whole prefixes are replaced, and only once."""
    assert current_path(old) == current
