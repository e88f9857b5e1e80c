"""Models: one row that every client can read.

`identifier`, `model_type` and `metadata` are read up to 0.3.5 (`model_id` is another name of `identifier` there);
`id`, `object`, `created`, `owned_by` and `custom_metadata` by openai's SDKs, Llama Stack's from 0.4, and ogx's.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Response

from app.api.compat.forward import Forwarded, stack_of
from app.api.service import CurrentService
from app.stack.config import MODEL_SERVER

router = APIRouter(tags=["Models"])

JSON = dict[str, Any]

OWNED_BY = "llama_stack"
CREATED = 0
"""Required by the newer clients, in Unix seconds; nobody knows when a model was made."""


@router.get("/models")
async def list_models(request: Request) -> Response:
    """List all models."""
    return Forwarded(stack_of(request), "GET", "/v1/models", answer=as_list)


@router.get("/models/{model_id:path}")
async def get_model(model_id: Annotated[str, Path()], request: Request) -> Response:
    """Describe a model."""
    return Forwarded(stack_of(request), "GET", f"/v1/models/{model_id}", answer=as_row)


@router.post("/models")
async def register_model(body: Annotated[JSON, Body()], request: Request, service: CurrentService) -> Response:
    """Register a model: `{model_id, provider_model_id?, provider_id?, model_type?, metadata?}`."""
    if not service.settings.llama_stack_config and body.get("provider_id") is None:
        body = {**body, "provider_id": MODEL_SERVER}  # the embeddings server has its one model from the settings
    return Forwarded(stack_of(request), "POST", "/v1/models", body, answer=as_row)


def as_list(listed: JSON) -> JSON:
    """For all: `object` is openai's. Many programs take the first one to talk with, so that others come after these."""
    models = sorted(listed["data"], key=lambda model: model["model_type"] != "llm")
    return {"object": "list", "data": [as_row(model) for model in models]}


def as_row(model: JSON) -> JSON:
    """For all: a Model of 0.3.5, and the newer clients' fields beside."""
    told = ("model_type", "provider_id", "provider_resource_id")
    return {
        "identifier": model["identifier"],
        "provider_resource_id": model["provider_resource_id"],
        "provider_id": model["provider_id"],
        "type": "model",
        "metadata": model["metadata"],
        "model_type": model["model_type"],
        "model_id": model["identifier"],
        "id": model["identifier"],
        "object": "model",
        "created": CREATED,
        "owned_by": OWNED_BY,
        "custom_metadata": {**model["metadata"], **{name: model[name] for name in told}},
    }
