"""What both engines work with: the same model, the same tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_stack.apis.tools import ListToolDefsResponse, ListToolGroupsResponse, ToolDef, ToolInvocationResult

from app.stack.inference import ModelServer, ModelServerConfig

MCP = {"endpoint": "http://127.0.0.1:1/sse"}


def schema(**properties: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": kind} for name, kind in properties.items()}}


GROUPS: dict[str, list[ToolDef]] = {
    "calc": [
        ToolDef(name="add", description="Adds.", input_schema=schema(a="integer", b="integer")),
        ToolDef(name="echo", description="Says it again.", input_schema=schema(text="string")),
    ],
    "things": [ToolDef(name="find", description="Finds.", input_schema=schema(what="string"), metadata=MCP)],
    "faulty": [ToolDef(name="fail"), ToolDef(name="mute")],
    "slow": [ToolDef(name="wait", metadata=MCP)],
    "builtin::websearch": [ToolDef(name="web_search", description="Searches.")],
}


class World:
    """`inference`, `tool_groups` and `tool_runtime` of a Llama Stack, and a record of the tool calls made."""

    def __init__(self, model_url: str) -> None:
        config = ModelServerConfig(url=model_url, models=["scripted"], timeout_seconds=10)
        self.inference = ModelServer(config)
        self.tool_groups = self
        self.tool_runtime = self
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.let_go = asyncio.Event()

    async def list_tools(self, toolgroup_id: str | None = None) -> ListToolDefsResponse:
        return ListToolDefsResponse(data=GROUPS.get(toolgroup_id or "", []))

    async def list_tool_groups(self) -> ListToolGroupsResponse:
        return ListToolGroupsResponse(data=[])

    async def invoke_tool(self, tool_name: str, kwargs: dict[str, Any]) -> ToolInvocationResult:
        self.calls.append((tool_name, dict(kwargs)))
        result = getattr(self, f"_{tool_name}")
        given: ToolInvocationResult = await result(
            **{key: value for key, value in kwargs.items() if key != "session_id"}
        )
        return given

    def called(self, name: str) -> Sequence[dict[str, Any]]:
        return [arguments for tool, arguments in self.calls if tool == name]

    async def _add(self, a: int, b: int, **more: Any) -> ToolInvocationResult:
        return ToolInvocationResult(content=str(a + b), metadata={"exact": True, **more})

    async def _echo(self, text: str = "") -> ToolInvocationResult:
        return ToolInvocationResult(content=text)

    async def _find(self, what: str = "") -> ToolInvocationResult:
        return ToolInvocationResult(content=f"found {what}")

    async def _web_search(self, query: str = "") -> ToolInvocationResult:
        return ToolInvocationResult(content=f"pages about {query}")

    async def _fail(self) -> ToolInvocationResult:
        raise RuntimeError("the tool is broken")

    async def _mute(self) -> ToolInvocationResult:
        return ToolInvocationResult(content=None, error_message="nothing to say")

    async def _wait(self) -> ToolInvocationResult:
        await self.let_go.wait()
        return ToolInvocationResult(content="waited")

    async def close(self) -> None:
        await self.inference.shutdown()
