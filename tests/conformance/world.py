"""What both engines work with: the same model, the same tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_stack.apis.safety import RunShieldResponse
from llama_stack.apis.shields import Shield
from llama_stack.apis.tools import ListToolDefsResponse, ListToolGroupsResponse, ToolDef, ToolInvocationResult
from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.safety.llama_guard.config import LlamaGuardConfig
from llama_stack.providers.inline.safety.llama_guard.llama_guard import LlamaGuardSafetyImpl
from llama_stack.providers.utils.tools.mcp import invoke_mcp_tool, list_mcp_tools

from app.stack import code_interpreter
from app.stack.inference import ModelServer, ModelServerConfig
from app.stack.safety import LlamaGuard
from tests.support.mcp_server import McpServer


def schema(**properties: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": kind} for name, kind in properties.items()}}


GROUPS: dict[str, list[ToolDef]] = {
    "calc": [
        ToolDef(name="add", description="Adds.", input_schema=schema(a="integer", b="integer")),
        ToolDef(name="echo", description="Says it again.", input_schema=schema(text="string")),
    ],
    "faulty": [ToolDef(name="fail"), ToolDef(name="mute")],
    "slow": [ToolDef(name="wait")],
    code_interpreter.TOOLGROUP: [code_interpreter.TOOL],
    "builtin::websearch": [ToolDef(name="web_search", description="Searches.")],
}


class Shields:
    """`safety` of a Llama Stack, in which every shield is a Llama Guard of this kind."""

    def __init__(self, guard: type[LlamaGuardSafetyImpl], inference: ModelServer) -> None:
        self._guard = guard(LlamaGuardConfig(), {Api.inference: inference})
        self._guard.shield_store = self

    async def get_shield(self, shield_id: str) -> Shield:
        return Shield(identifier=shield_id, provider_resource_id="guard", provider_id="llama-guard")

    async def run_shield(self, shield_id: str, messages: list[Any], params: dict[str, Any]) -> RunShieldResponse:
        answer: RunShieldResponse = await self._guard.run_shield(shield_id, messages, params)
        return answer


class World:
    """`inference`, `tool_groups` and `tool_runtime` of a Llama Stack, and a record of the tool calls made.

    `safety` is ours, `their_safety` llama_stack's own. The toolgroup `mcp` is a real MCP server: llama_stack's client
    lists and calls it for `ChatAgent`, ours for us.
    """

    def __init__(self, model_url: str, mcp: McpServer) -> None:
        config = ModelServerConfig(url=model_url, models=["scripted"], timeout_seconds=60)
        self.inference = ModelServer(config)
        self.safety = Shields(LlamaGuard, self.inference)
        self.their_safety = Shields(LlamaGuardSafetyImpl, self.inference)
        self.tool_groups = self
        self.tool_runtime = self
        self._mcp = mcp
        self._calls: list[tuple[str, dict[str, Any]]] = []
        self.let_go = asyncio.Event()

    @property
    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and arguments of each call that was made, those of the MCP server last."""
        return self._calls + [(call["tool"], call["arguments"]) for call in self._mcp.calls()]

    async def mcp_endpoint(self, toolgroup_id: str) -> str | None:
        return self._mcp.url if toolgroup_id == "mcp" else None

    async def list_tools(self, toolgroup_id: str | None = None) -> ListToolDefsResponse:
        if toolgroup_id == "mcp":
            return await list_mcp_tools(self._mcp.url, {})
        return ListToolDefsResponse(data=GROUPS.get(toolgroup_id or "", []))

    async def list_tool_groups(self) -> ListToolGroupsResponse:
        return ListToolGroupsResponse(data=[])

    async def invoke_tool(self, tool_name: str, kwargs: dict[str, Any]) -> ToolInvocationResult:
        result = getattr(self, f"_{tool_name}", None)
        if result is None:
            return await invoke_mcp_tool(self._mcp.url, {}, tool_name, kwargs)
        self._calls.append((tool_name, dict(kwargs)))
        given: ToolInvocationResult = await result(
            **{key: value for key, value in kwargs.items() if key != "session_id"}
        )
        return given

    async def call_tool(self, toolgroup_id: str, name: str, arguments: dict[str, Any]) -> ToolInvocationResult:
        return await self.invoke_tool(name, arguments)

    def called(self, name: str) -> Sequence[dict[str, Any]]:
        return [arguments for tool, arguments in self.calls if tool == name]

    async def _add(self, a: int, b: int, **more: Any) -> ToolInvocationResult:
        return ToolInvocationResult(content=str(a + b), metadata={"exact": True, **more})

    async def _echo(self, text: str = "") -> ToolInvocationResult:
        return ToolInvocationResult(content=text)

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
        self._mcp.reset()
        await self.inference.shutdown()
