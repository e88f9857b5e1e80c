"""OpenAI's conversations: items that responses go on from, kept in order."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import JSONResponse
from llama_stack.apis.conversations import Conversation, ConversationDeletedResource
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from app.api.agents import end_all
from app.api.compat.response_events import CurrentResponseDialect
from app.api.compat.version import is_llama_stack
from app.api.errors import answers
from app.api.service import JSON, CurrentService, Owner
from app.api.validation import includes
from app.domain import items
from app.domain.items import Item
from app.store import conversations
from app.store.conversations import ConversationRow

router = APIRouter(tags=["Conversations"])

ITEMS_AT_ONCE = 20
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Items = Annotated[list[Any], Field(max_length=ITEMS_AT_ONCE)]


async def _session(conversation_id: Annotated[str, Path()]) -> str:
    return items.session_of_conversation(conversation_id)


SessionId = Annotated[str, Depends(_session)]
Include = Annotated[list[str], Depends(includes)]


class AnyItem(BaseModel):
    """An item of OpenAI's Responses: a message, a call of a tool or its output, a reasoning (see `type`)."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: str


class ItemList(BaseModel):
    """One page of items."""

    object: Literal["list"]
    data: list[AnyItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


EXAMPLE: JsonDict = {"type": "message", "role": "user", "content": "Say hello."}


class CreateConversation(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [EXAMPLE], "metadata": {"topic": "greeting"}}]})

    items: Items | None = None
    metadata: Metadata | None = None


class UpdateConversation(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"metadata": {"topic": "farewell"}}]})

    metadata: Metadata | None


class CreateItems(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [EXAMPLE]}]})

    items: Annotated[Items, Field(min_length=1)]


@router.post("/conversations", **answers(Conversation))
async def create_conversation(body: CreateConversation, service: CurrentService, owner: Owner) -> JSON:
    """Create a conversation, with up to 20 items to begin with."""
    first = items.with_ids(items.checked(body.items or []))
    session_id = str(uuid.uuid4())
    row = await service.store.run(conversations.create, owner, session_id, body.metadata or {}, first)
    return _shape(row)


@router.get("/conversations/{conversation_id}", **answers(Conversation))
async def get_conversation(session_id: SessionId, service: CurrentService, owner: Owner) -> JSON:
    """Describe a conversation."""
    return _shape(await service.store.run(conversations.get, owner, session_id))


@router.post("/conversations/{conversation_id}", **answers(Conversation))
async def update_conversation(
    session_id: SessionId, body: UpdateConversation, service: CurrentService, owner: Owner
) -> JSON:
    """Replace the metadata of a conversation."""
    metadata = body.metadata or {}
    return _shape(await service.store.run(conversations.update_metadata, owner, session_id, metadata))


@router.delete("/conversations/{conversation_id}", **answers(ConversationDeletedResource))
async def delete_conversation(session_id: SessionId, service: CurrentService, owner: Owner) -> JSON:
    """Delete a conversation with its items and responses. What runs there is cancelled and its streams end first."""
    unfinished = await service.store.run(conversations.mark_deleted, owner, session_id)
    await end_all(service, unfinished)
    return {"id": items.conversation_id(session_id), "object": "conversation.deleted", "deleted": True}


@router.post("/conversations/{conversation_id}/items", **answers(ItemList))
async def create_items(
    session_id: SessionId,
    body: CreateItems,
    include: Include,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentResponseDialect,
) -> JSONResponse:
    """Add up to 20 items at the end of a conversation. A response that runs there does not see them."""
    added = items.with_ids(items.checked(body.items))
    await service.store.run(conversations.add_items, owner, session_id, added)
    return _page(dialect.told(added), False)


@router.get("/conversations/{conversation_id}/items", **answers(ItemList))
async def list_items(
    session_id: SessionId,
    include: Include,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentResponseDialect,
    after: Annotated[str | None, Query(description="The id of an item: those behind it, in this order")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """List the items of a conversation, the newest first unless `order` says otherwise."""
    found, has_more = await service.store.run(
        conversations.list_items, owner, session_id, after or None, limit, descending=order == "desc"
    )
    return _page(dialect.told(found), has_more)


@router.get("/conversations/{conversation_id}/items/{item_id}", **answers(AnyItem))
async def get_item(
    session_id: SessionId,
    item_id: str,
    include: Include,
    service: CurrentService,
    owner: Owner,
    dialect: CurrentResponseDialect,
) -> JSONResponse:
    """An item of a conversation."""
    return JSONResponse(dialect.told(await service.store.run(conversations.get_item, owner, session_id, item_id)))


@router.delete("/conversations/{conversation_id}/items/{item_id}", **answers(Conversation))
async def delete_item(
    session_id: SessionId, item_id: str, request: Request, service: CurrentService, owner: Owner
) -> JSON:
    """Delete an item. Answers with the conversation, as OpenAI does; llama-stack-client gets what it reads."""
    row = await service.store.run(conversations.delete_item, owner, session_id, item_id)
    if is_llama_stack(request.headers):
        return {"id": item_id, "object": "conversation.item.deleted", "deleted": True}
    return {**_shape(row), "deleted": True}


def _shape(row: ConversationRow) -> JSON:
    return {
        "id": items.conversation_id(row.session_id),
        "object": "conversation",
        "created_at": int(row.created_at.timestamp()),
        "metadata": row.metadata,
        "items": None,
    }


def _page(found: Sequence[Item], has_more: bool) -> JSONResponse:
    """Not left to FastAPI to encode: it goes through each item once more, and not to every depth."""
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return JSONResponse({"object": "list", "data": found, "first_id": first, "last_id": last, "has_more": has_more})
