"""Conversations through OpenAI's SDK and Llama Stack's, both unmodified."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from llama_stack_client import LlamaStackClient
from openai import OpenAI
from openai.types.conversations import Message

from tests.acceptance.conftest import Caravan
from tests.support import wait_until
from tests.support.scripted_model import ScriptedModel
from tests.unit.domain.test_items import OF_EACH_TYPE

pytestmark = pytest.mark.parametrize("caravan", ["turn-pool"], indirect=True)

SAID: Any = {"role": "user", "content": "SAY hi"}


@pytest.fixture
def sdk(caravan: Caravan) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{caravan.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def texts(items: Any) -> list[str]:
    return [item.content[0].text for item in items]


def said(*texts: str) -> Any:
    return [{"type": "message", "role": "user", "content": text} for text in texts]


def test_openais_sdk_makes_reads_changes_and_deletes_a_conversation(sdk: OpenAI) -> None:
    made = sdk.conversations.create(items=[SAID], metadata={"name": "a"})
    assert (made.id[:5], made.object, made.metadata) == ("conv_", "conversation", {"name": "a"})
    assert isinstance(made.created_at, int)
    assert sdk.conversations.retrieve(made.id) == made
    changed = sdk.conversations.update(made.id, metadata={"name": "b"})
    assert (changed.metadata, changed.created_at) == ({"name": "b"}, made.created_at)
    assert sdk.conversations.update(made.id, metadata=None).metadata == {}
    gone = sdk.conversations.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "conversation.deleted", True)
    with pytest.raises(openai.NotFoundError, match=made.id):
        sdk.conversations.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        sdk.conversations.items.list(made.id)


def test_openais_sdk_adds_reads_pages_and_deletes_items(sdk: OpenAI) -> None:
    """Its pages follow each other by themselves, in both orders; a message's content is a list, as its type says."""
    made = sdk.conversations.create()
    added = sdk.conversations.items.create(made.id, items=said(*"abcde"), include=["file_search_call.results"])
    assert (texts(added.data), added.has_more) == (list("abcde"), False)
    assert (added.first_id, added.last_id) == (added.data[0].id, added.data[-1].id)
    assert texts(sdk.conversations.items.list(made.id, limit=2)) == list("edcba")
    assert texts(sdk.conversations.items.list(made.id, limit=2, order="asc")) == list("abcde")
    ids = [str(item.id) for item in added.data]
    page = sdk.conversations.items.list(made.id, limit=2, order="asc", after=ids[1])
    assert (texts(page.data), page.has_more) == (["c", "d"], True)
    one = sdk.conversations.items.retrieve(ids[2], conversation_id=made.id)
    assert isinstance(one, Message)
    assert (one.id[:4], one.role, one.status, texts([one])) == ("msg_", "user", "completed", ["c"])
    assert one.content[0].type == "input_text"
    left = sdk.conversations.items.delete(one.id, conversation_id=made.id)
    assert (left.id, left.object, left.metadata) == (made.id, "conversation", {})
    assert texts(sdk.conversations.items.list(made.id, order="asc")) == list("abde")
    for gone in (one.id, "no such", "msg/../x"):
        with pytest.raises(openai.NotFoundError):
            sdk.conversations.items.retrieve(gone, conversation_id=made.id)


def test_every_type_of_item_comes_back_as_it_was_sent(sdk: OpenAI) -> None:
    given: Any = OF_EACH_TYPE
    made = sdk.conversations.create(items=given)
    found = [item.to_dict() for item in sdk.conversations.items.list(made.id, order="asc")]
    assert [{**item, **sent} for item, sent in zip(found, given, strict=True)] == found
    assert [item["type"] for item in found] == [sent["type"] for sent in given]


def test_llama_stacks_sdk_does_the_same(client: LlamaStackClient, http: httpx.Client) -> None:
    made = client.conversations.create(metadata={"name": "a"})
    assert (made.object, made.metadata, made.items) == ("conversation", {"name": "a"}, None)
    assert client.conversations.retrieve(made.id) == made
    assert client.conversations.update(made.id, metadata={"name": "b"}).metadata == {"name": "b"}
    added = client.conversations.items.create(made.id, items=said("a", "b"))
    assert (added.object, texts(added.data)) == ("list", ["a", "b"])
    include: Any = ["file_search_call.results", "message.output_text.logprobs"]
    listed = client.conversations.items.list(made.id, limit=1, order="asc", include=include, after="")
    assert (texts(listed.data), listed.first_id) == (["a"], added.first_id)
    got: Any = client.conversations.items.get(str(added.first_id), conversation_id=made.id)
    assert (got.type, got.id) == ("message", added.first_id)
    # Later versions have this route; none reads what OpenAI's SDK reads.
    path = f"/v1/conversations/{made.id}/items/{added.first_id}"
    for headers in ({"X-LlamaStack-Client-Version": "0.7.5"}, {"User-Agent": "LlamaStackClient/JS 0.7.3"}):
        answer = http.delete(path, headers=headers)
        assert answer.json() == {"id": added.first_id, "object": "conversation.item.deleted", "deleted": True}
        path = f"/v1/conversations/{made.id}/items/{added.last_id}"
        added.first_id = added.last_id
    assert client.conversations.delete(made.id).deleted is True


def test_items_added_while_a_response_runs_reach_the_next_one(sdk: OpenAI, model: ScriptedModel) -> None:
    """It has read its context before; what it adds comes behind them."""
    made = sdk.conversations.create()
    running = sdk.responses.create(
        model="scripted", input="HOLD items | HISTORY", conversation=made.id, background=True
    )
    model.wait_held("items")
    sdk.conversations.items.create(made.id, items=said("added meanwhile"))
    model.release("items")
    wait_until(lambda: sdk.responses.retrieve(running.id).status == "completed")
    assert "added meanwhile" not in sdk.responses.retrieve(running.id).output_text
    items = sdk.conversations.items.list(made.id, order="asc")
    assert texts(items)[0] == "added meanwhile"
    assert len(texts(items)) == 3
    assert (
        "added meanwhile" in sdk.responses.create(model="scripted", input="HISTORY", conversation=made.id).output_text
    )


def test_what_runs_in_a_deleted_conversation_is_cancelled(sdk: OpenAI, model: ScriptedModel) -> None:
    """And is gone with it, as what waited behind it is. The model is let go of."""
    made = sdk.conversations.create()
    for script in ("HOLD deleted | SAY never", "SAY never either"):
        response = sdk.responses.create(model="scripted", input=script, conversation=made.id, background=True)
    model.wait_held("deleted")
    sdk.conversations.delete(made.id)
    wait_until(lambda: model.open_streams() == 0)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="scripted", input="SAY more", conversation=made.id)


def test_a_conversation_has_no_other_id(http: httpx.Client) -> None:
    """Its hexadecimal digits may be grouped by dashes; whatever else is 404, also what is none."""
    made = http.post("/v1/conversations", json={}).json()["id"]
    digits = made.removeprefix("conv_")
    assert http.get(f"/v1/conversations/conv_{uuid.UUID(digits)}").json()["id"] == made
    wrong = [digits, f"CONV_{digits}", f"conv_{digits}0", f"conv_{digits[:-1]}", "conv_", "%00", "a%2Fb", "é"]
    for name in [*wrong, f"conv_{uuid.uuid4().hex}"]:
        for path in (
            f"/v1/conversations/{name}",
            f"/v1/conversations/{name}/items",
            f"/v1/conversations/{name}/items/x",
        ):
            assert http.get(path).status_code == 404, path


WRONG: list[tuple[Any, str]] = [
    ({"items": said(*(21 * "a"))}, "items"),
    ({"items": [{"type": "computer_call", "id": "c"}]}, "items[0].type"),
    ({"items": [*said("a"), {"role": "user", "content": [{"type": "input_file"}]}]}, "items[1].content[0].type"),
    ({"items": "a"}, "items"),
    ({"items": []}, "items"),
    ({"items": [{**SAID, "id": "a\0"}]}, "items[0].id"),
    ({"items": [{**SAID, "id": "same"}, {**SAID, "id": "same"}]}, "items[1].id"),
    ({}, "items"),
]
WRONG_METADATA: list[Any] = [
    {"a": 1},
    {"a" * 65: ""},
    {"a": "b" * 513},
    {str(number): "" for number in range(17)},
    "a",
]


def test_what_is_wrong_is_400_and_named(http: httpx.Client) -> None:
    made = http.post("/v1/conversations", json={"items": [{**SAID, "id": "there"}]}).json()["id"]
    path = f"/v1/conversations/{made}"
    for body, param in [*WRONG, ({"items": [{**SAID, "id": "there"}]}, "items[0].id")]:
        refused = http.post(f"{path}/items", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), body
    for metadata in WRONG_METADATA:
        for each in ("/v1/conversations", path):
            refused = http.post(each, json={"metadata": metadata})
            assert refused.status_code == 400, metadata
            assert refused.json()["error"]["param"].startswith("metadata"), metadata
    assert http.post(path, json={}).status_code == 400
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "include=everything", "include[]=a"):
        refused = http.get(f"{path}/items?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, query.partition("=")[0].strip("[]"))
    assert http.get(f"{path}/items?after=no").status_code == 404
    assert len(http.get(f"{path}/items").json()["data"]) == 1


ODD = [
    '"\\u0000 in a text"',
    '"\\ud800"',
    "NaN",
    "1e999",
    "-0.0",
    "[" * 900 + "]" * 900,
    "[" * 20_000 + "]" * 20_000,
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: value[:12])
def test_odd_values_are_stored_or_refused_and_never_an_error_of_the_server(http: httpx.Client, value: str) -> None:
    """Wherever they stand; what was stored is read again."""
    for item in ('{"role": "user", "content": "x", "odd": VALUE}', '{"role": "user", "content": VALUE}', "VALUE"):
        body = '{"items": [ITEM], "metadata": {"a": "\\u0000"}}'.replace("ITEM", item.replace("VALUE", value))
        answer = http.post("/v1/conversations", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            made = answer.json()
            assert made["metadata"] == {"a": "\0"}
            assert http.get(f"/v1/conversations/{made['id']}/items").status_code == 200
    body = '{"metadata": {"a": VALUE}}'.replace("VALUE", value)
    answer = http.post("/v1/conversations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
