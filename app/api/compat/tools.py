"""Tools: one row that every client can read.

`identifier`, `type` and `parameters` are read by 0.1 and 0.2 (`Agent` and `ReActAgent` of theirs),
`name` and `input_schema` since 0.3.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from app.api.compat.forward import Forwarded, stack_of
from app.api.compat.parameters import from_schema

router = APIRouter(tags=["Tools"])

JSON = dict[str, Any]


@router.get("/tools")
async def list_tools(request: Request) -> Response:
    """List the tools of all toolgroups, or of `toolgroup_id`."""
    return Forwarded(stack_of(request), "GET", "/v1/tools", answer=as_list)


@router.get("/tools/{tool_name:path}")
async def get_tool(tool_name: Annotated[str, Path()], request: Request) -> Response:
    """Describe a tool."""
    return Forwarded(stack_of(request), "GET", f"/v1/tools/{tool_name}", answer=as_row)


@router.get("/tool-runtime/list-tools")
async def list_runtime_tools(request: Request) -> Response:
    """List the tools of `tool_group_id`, as the tool runtime knows them."""
    return Forwarded(stack_of(request), "GET", "/v1/tool-runtime/list-tools", answer=as_list)


def as_list(listed: JSON) -> JSON:
    """For all."""
    return {"data": [as_row(tool) for tool in listed["data"]]}


def as_row(tool: JSON) -> JSON:
    """For all: a ToolDef of 0.3.5, and a Tool of 0.1 and 0.2 beside."""
    return {
        **tool,
        "identifier": tool["name"],
        "type": "tool",
        "parameters": from_schema(tool["input_schema"]),
        "provider_resource_id": None,
    }
