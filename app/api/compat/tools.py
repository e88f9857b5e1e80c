"""Tools: one row that every client can read.

`identifier`, `type`, `provider_id` and `parameters` are read by 0.1 and 0.2 (`Agent` and `ReActAgent` of theirs),
`name` and `input_schema` since 0.3.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from app.api.compat.forward import Forwarded, fetched, stack_of
from app.api.compat.parameters import from_schema

router = APIRouter(tags=["Tools"])

JSON = dict[str, Any]


@router.get("/tools")
async def list_tools(request: Request) -> Response:
    """List the tools of all toolgroups, or of `toolgroup_id`."""
    return await _listed(request, "/v1/tools")


@router.get("/tools/{tool_name:path}")
async def get_tool(tool_name: Annotated[str, Path()], request: Request) -> Response:
    """Describe a tool."""
    providers = await _providers(request)
    return Forwarded(stack_of(request), "GET", f"/v1/tools/{tool_name}", answer=lambda tool: as_row(tool, providers))


@router.get("/tool-runtime/list-tools")
async def list_runtime_tools(request: Request) -> Response:
    """List the tools of `tool_group_id`, as the tool runtime knows them."""
    return await _listed(request, "/v1/tool-runtime/list-tools")


async def _listed(request: Request, path: str) -> Response:
    providers = await _providers(request)
    return Forwarded(stack_of(request), "GET", path, answer=lambda listed: as_list(listed, providers))


async def _providers(request: Request) -> dict[str, str]:
    """The provider of each toolgroup that the caller sees: 0.3.5's rows of tools do not tell it."""
    groups = (await fetched(request, stack_of(request), "/v1/toolgroups")).get("data", ())
    return {group["identifier"]: group["provider_id"] for group in groups}


def as_list(listed: JSON, providers: dict[str, str]) -> JSON:
    """For all."""
    return {"data": [as_row(tool, providers) for tool in listed["data"]]}


def as_row(tool: JSON, providers: dict[str, str]) -> JSON:
    """For all: a ToolDef of 0.3.5, and a Tool of 0.1 and 0.2 beside; `providers` by toolgroup."""
    return {
        **tool,
        "identifier": tool["name"],
        "type": "tool",
        "provider_id": providers.get(tool["toolgroup_id"]),
        "provider_resource_id": None,
        "parameters": from_schema(tool["input_schema"]),
    }
