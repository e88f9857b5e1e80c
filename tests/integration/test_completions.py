"""Completions of a provider of a user's own run.yaml, which are asked for through llama_stack's typed API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.domain.errors import CompletionError, InvalidRequest
from app.settings import Settings
from app.stack.completions import CHAT, EMBEDDINGS, TEXT, Begun, Endpoint
from app.stack.mounted import StackApp, create_stack_app, stack_lifespan
from tests.support import wait_until
from tests.support.scripted_model import DIMENSIONS, ScriptedModel

RUN_YAML = """
version: 2
image_name: own
apis: [inference]
providers:
  inference:
  - {{provider_id: own, provider_type: "remote::openai", config: {{base_url: "{url}", api_key: k}}}}
storage:
  backends:
    kv: {{type: kv_sqlite, db_path: "{folder}/kv.db"}}
    sql: {{type: sql_sqlite, db_path: "{folder}/sql.db"}}
  stores:
    metadata: {{backend: kv, namespace: registry}}
    inference: {{backend: sql, table_name: inference}}
    conversations: {{backend: sql, table_name: conversations}}
registered_resources:
  models:
  - {{model_id: scripted, provider_id: own, provider_model_id: scripted}}
  - {{model_id: embed, provider_id: own, provider_model_id: embed, model_type: embedding,
     metadata: {{embedding_dimension: 8}}}}
"""
MODEL = "own/scripted"


@pytest.fixture(scope="module")
def scripted_model() -> Iterator[ScriptedModel]:
    """llama_stack asks for the list of models when it starts."""
    with ScriptedModel(models=("scripted", "embed")) as server:
        yield server


@pytest.fixture(scope="module")
def run_yaml(scripted_model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    path = folder / "run.yaml"
    path.write_text(RUN_YAML.format(url=scripted_model.url, folder=folder))
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(postgres_url: str, run_yaml: Path) -> AsyncIterator[StackApp]:
    values: Any = {"database_url": postgres_url, "llama_stack_config": str(run_yaml)}
    app = create_stack_app(Settings(_env_file=None, **values))
    async with stack_lifespan(app):
        yield app


async def ask(stack: StackApp, endpoint: Endpoint = CHAT, **body: Any) -> Any:
    answer = await stack.complete(endpoint, {"model": MODEL, **body}, principal="local", headers={})
    return json.loads(answer) if isinstance(answer, bytes) else answer


def user(script: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": script}]


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_whole_and_streamed_answers(stack: StackApp) -> None:
    whole = await ask(stack, messages=user("SAY a b"))
    assert (whole["choices"][0]["message"]["content"], whole["model"]) == ("a b ", MODEL)
    begun = await ask(stack, messages=user("SAY a b"), stream=True)
    chunks = [chunk async for chunk in begun.chunks()]
    assert "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks) == "a b "
    assert {chunk["model"] for chunk in chunks} == {MODEL}


async def test_text_completions_and_embeddings(stack: StackApp) -> None:
    begun = await ask(stack, TEXT, prompt="SAY a b", stream=True)
    assert isinstance(begun, Begun)
    assert "".join([chunk["choices"][0]["text"] async for chunk in begun.chunks()]) == "a b "
    embedded = await ask(stack, EMBEDDINGS, model="own/embed", input=["a"])
    assert len(embedded["data"][0]["embedding"]) == DIMENSIONS


async def test_fields_beside_llama_stacks_own_reach_the_model(stack: StackApp, model: ScriptedModel) -> None:
    await ask(stack, messages=user("SAY a"), chat_template_kwargs={"a": 1})
    assert model.requests()[0]["body"]["chat_template_kwargs"] == {"a": 1}


async def test_field_that_the_types_would_drop_is_refused_by_name(stack: StackApp, model: ScriptedModel) -> None:
    with pytest.raises(InvalidRequest, match="does not know") as raised:
        await ask(stack, messages=[*user("SAY a"), {"role": "user", "content": "SAY b", "cache_control": {}}])
    assert raised.value.param == "messages[1].cache_control"
    with pytest.raises(InvalidRequest) as raised:
        await ask(stack, messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}])
    assert raised.value.param == "messages[0].content"
    assert model.requests() == []


async def test_errors_have_a_status_before_and_amid_the_stream(stack: StackApp) -> None:
    with pytest.raises(CompletionError, match="too many") as raised:
        await ask(stack, messages=user("ERR 400 too many"), stream=True)
    assert raised.value.status == 400
    with pytest.raises(CompletionError) as raised:
        await ask(stack, model="nothing", messages=user("SAY a"))
    assert (raised.value.status, raised.value.code) == (404, "model_not_found")
    begun = await ask(stack, messages=user("PART a | ERR 500 fell over"), stream=True)
    with pytest.raises(CompletionError):
        [chunk async for chunk in begun.chunks()]


async def test_closing_hangs_up_on_the_model(stack: StackApp, model: ScriptedModel) -> None:
    begun = await ask(stack, messages=user("PART a | HANG"), stream=True)
    await begun.close()
    left = ["client_closed"]
    await asyncio.to_thread(wait_until, lambda: [request["ended"] for request in model.requests()] == left)
