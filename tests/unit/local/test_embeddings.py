"""The local embeddings server: a real one, with the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI

from app.local import embeddings, minilm
from app.local.embeddings import Embeddings
from app.local.server import LocalError
from app.settings import Settings
from tests.support import ROOT

REFERENCE = json.loads(Path(__file__).with_name("minilm_vectors.json").read_text())
"""`[{text, tokens, vector}]` by sentence-transformers on torch: tests/unit/local/minilm_vectors.py writes it."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embeddings]:
    with Embeddings(tmp_path_factory.mktemp("embeddings")) as running:
        yield running


@pytest.fixture
def client(server: Embeddings) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as sdk:
        yield sdk


def vectors(client: OpenAI, texts: list[str], **more: Any) -> np.ndarray[Any, Any]:
    answer = client.embeddings.create(model=minilm.MODEL_ID, input=texts, **more)
    assert [entry.index for entry in answer.data] == list(range(len(texts)))
    return np.array([entry.embedding for entry in answer.data])


def test_vectors_are_the_references(client: OpenAI) -> None:
    """All of length 1, in any script, empty or too long: what is beyond 256 tokens has no effect."""
    found = vectors(client, [entry["text"] for entry in REFERENCE])
    assert found.shape == (len(REFERENCE), minilm.DIMENSION)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for entry, vector in zip(REFERENCE, found, strict=True):
        assert np.dot(vector, entry["vector"]) / np.linalg.norm(entry["vector"]) > 0.9999, entry["text"]


def test_a_text_is_cut_off_as_the_reference_does(client: OpenAI) -> None:
    long = " ".join(f"word{number}" for number in range(3000))
    answer = client.embeddings.create(model="any", input=[long, long + " and more"])
    assert answer.usage.total_tokens == 2 * minilm.MAX_TOKENS
    assert answer.data[0].embedding == answer.data[1].embedding
    assert [len(tokens) for tokens in minilm.Tokenizer().tokens([entry["text"] for entry in REFERENCE])] == [
        entry["tokens"] for entry in REFERENCE
    ]


def test_many_texts_and_many_requests_at_once_keep_their_order(client: OpenAI) -> None:
    texts = [f"caravan number {number}" for number in range(3 * embeddings.BATCH + 1)]
    alone = vectors(client, texts[-1:])
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: vectors(client, texts), range(8)):
            assert found.shape == (len(texts), minilm.DIMENSION)
            assert np.allclose(found[-1], alone[0], atol=1e-4)


def test_floats_and_base64_are_the_same(client: OpenAI) -> None:
    """The SDK asks for base64 unless it is told otherwise."""
    assert np.allclose(vectors(client, ["camel"]), vectors(client, ["camel"], encoding_format="float"), atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": []},
        {"input": [1, 2]},
        {"input": [[1, 2]]},
        {"input": ["a"] * (embeddings.MAX_INPUTS + 1)},
        {"input": "a", "dimensions": 128},
        {"input": "a", "encoding_format": "int8"},
    ],
)
def test_what_cannot_be_embedded_is_a_400_in_openais_shape(server: Embeddings, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/embeddings", json={"model": "any", **fields}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_settings_name_this_server_by_default(server: Embeddings) -> None:
    fields = Settings.model_fields
    (listed,) = httpx.get(f"{server.url}/models", timeout=60).json()["data"]
    assert listed["id"] == fields["embedding_model"].default == minilm.MODEL_ID
    assert fields["embedding_dimension"].default == minilm.DIMENSION
    assert fields["embedding_url"].default == f"http://127.0.0.1:{embeddings.PORT}/v1"


MAKE = "from app.local import minilm; print(minilm.gguf_file(), minilm.gguf_file().stat().st_ino)"


def test_processes_at_once_make_one_file(tmp_path: Path) -> None:
    """And what a process left that was killed while it made the file is no obstacle, and is never taken for it."""
    cached = minilm.gguf_file()
    folder = tmp_path / "caravan"
    folder.mkdir()
    (folder / cached.with_suffix(".new").name).write_bytes(b"GGUF, but not all of it")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKE], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = {maker.communicate(timeout=120)[0] for maker in makers}
    assert outputs == {f"{folder / cached.name} {(folder / cached.name).stat().st_ino}\n"}
    assert (folder / cached.name).read_bytes() == cached.read_bytes()
    assert sorted(path.suffix for path in folder.iterdir()) == [".gguf", ".lock"]


def test_a_folder_that_cannot_be_used_is_one_line_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caravan").write_text("a file is in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LocalError, match="XDG_CACHE_HOME"):
        minilm.gguf_file()
