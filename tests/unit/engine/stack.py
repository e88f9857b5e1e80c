"""Doubles that the engine's tests share."""

from __future__ import annotations

from typing import Any, cast

from llama_stack.apis.tools import ListToolDefsResponse, ToolDef, ToolInvocationResult

from tasks.stack import LlamaStack

GROUPS = {
    "calc": [ToolDef(name="add", description="Adds."), ToolDef(name="echo", input_schema={"type": "object"})],
    "more": [ToolDef(name="add")],
    "empty": [],
}


class Stack:
    """A Llama Stack and its `tool_groups`. The toolgroup `mcp` is an MCP server."""

    def __init__(self, result: Any = None, mcp_url: str | None = None) -> None:
        self.tool_groups = self
        self.mcp_url = mcp_url
        self.result = result or ToolInvocationResult(content="3", metadata={"m": 1})
        self.invoked: list[tuple[str, dict[str, Any]]] = []

    async def mcp_endpoint(self, toolgroup_id: str) -> str | None:
        return self.mcp_url if toolgroup_id == "mcp" else None

    async def list_tools(self, toolgroup_id: str) -> ListToolDefsResponse:
        return ListToolDefsResponse(data=GROUPS[toolgroup_id])

    async def call_tool(self, toolgroup_id: str, name: str, arguments: dict[str, Any]) -> ToolInvocationResult:
        self.invoked.append((name, arguments))
        if isinstance(self.result, BaseException):
            raise self.result
        if callable(self.result):
            await self.result()
        return self.result


def as_stack(stack: Stack) -> LlamaStack:
    return cast(LlamaStack, stack)
