"""Server tools: what a turn may call, resolved once, and what the model is offered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from llama_stack.apis.agents import AgentConfig, AgentToolGroupWithArgs
from llama_stack.apis.inference import ToolCall, ToolResponse
from mcp import types
from pydantic import BaseModel, TypeAdapter

from app.domain.decide import tool_name
from app.domain.errors import TurnFailure
from app.stack.code_interpreter import TOOLGROUP as CODE
from tasks.engine.knowledge import KNOWLEDGE_SEARCH
from tasks.engine.messages import OpenAITool
from tasks.stack import LlamaStack

REPEATABLE_BUILTINS = frozenset({"knowledge_search", "web_search", "code_interpreter"})
"""The first two only read. What code does is nothing but what it leaves in its folder, and that is recorded in the
transaction that records its result, or not at all."""

_NOT_FOR_MODELS = frozenset({"insert_into_memory"})
"""Listed by `builtin::rag`, and no tool: a call of it is taken for a search."""

OUTCOME_UNKNOWN = (
    "The outcome of this tool call is unknown: the worker was lost while it ran. It was not made again, "
    "because it may have had an effect."
)


class Tool(BaseModel):
    """A server tool as a turn resolved it: stored with the turn, so that every attempt offers the same."""

    name: str
    toolgroup_id: str
    description: str | None
    input_schema: dict[str, Any] | None
    args: dict[str, Any]
    is_mcp: bool
    annotations: dict[str, Any] = {}
    """MCP's `ToolAnnotations`, as the server listed them."""

    def safe_to_repeat(self, configured: Collection[str]) -> bool:
        """Whether a call that was in flight when its worker died may be made again.

        `configured`: names of tools, alone or as `toolgroup/tool` (TOOLS_SAFE_TO_REPEAT).
        """
        if self.name in configured or f"{self.toolgroup_id}/{self.name}" in configured:
            return True
        if self.is_mcp:
            return bool(self.annotations.get("readOnlyHint") or self.annotations.get("idempotentHint"))
        return self.name in REPEATABLE_BUILTINS


class Resolved(BaseModel):
    """What a turn resolves once, in its first attempt."""

    tools: list[Tool] = []
    context: str = ""

    @property
    def searches_documents(self) -> bool:
        """Whether the turn's documents are to be searched, rather than read as they are."""
        return any(tool.name == KNOWLEDGE_SEARCH and not tool.is_mcp for tool in self.tools)

    @property
    def runs_code(self) -> bool:
        """Whether the turn's documents are files for its code."""
        return any(tool.toolgroup_id == CODE for tool in self.tools)

    def tool(self, call: ToolCall) -> Tool | None:
        """The tool that a call names."""
        name = tool_name(call)
        return next((tool for tool in self.tools if tool.name == name), None)


ListMcp = Callable[[str], Awaitable[list[types.Tool]]]
Toolgroups = TypeAdapter(list[str | AgentToolGroupWithArgs])


async def resolve(stack: LlamaStack, config: AgentConfig, request: dict[str, Any], list_mcp: ListMcp) -> Resolved:
    """Its tools. `list_mcp`: those of the MCP server at an endpoint. Raises TurnFailure: a toolgroup cannot be had."""
    toolgroups = Toolgroups.validate_python(request.get("toolgroups") or [])
    return Resolved(tools=await _resolve_tools(stack, config, toolgroups, list_mcp))


async def _resolve_tools(
    stack: LlamaStack, config: AgentConfig, for_turn: list[str | AgentToolGroupWithArgs], list_mcp: ListMcp
) -> list[Tool]:
    """The turn's toolgroups in place of the agent's, if it names any; arguments of both."""
    configured = [*(config.toolgroups or []), *for_turn]
    args = {_split(group.name)[0]: group.args for group in configured if isinstance(group, AgentToolGroupWithArgs)}
    names = dict.fromkeys(_name(group) for group in for_turn or config.toolgroups or [])
    tools: dict[str, Tool] = {}
    client_tools = {tool.name for tool in config.client_tools or []}
    for name in names:
        for tool in await _group_tools(stack, *_split(name), args, list_mcp):
            if tool.name in tools or tool.name in client_tools:
                raise TurnFailure("invalid_request", f"Tool {tool.name} is offered twice")
            tools[tool.name] = tool
    return list(tools.values())


async def _group_tools(
    stack: LlamaStack, group: str, only: str | None, args: dict[str, dict[str, Any]], list_mcp: ListMcp
) -> list[Tool]:
    try:
        endpoint = await stack.mcp_endpoint(group)
        listed = await _runtime_tools(stack, group) if endpoint is None else _mcp_tools(await list_mcp(endpoint))
    except Exception as error:
        raise TurnFailure("invalid_request", f"Toolgroup {group} cannot be used: {error}") from error
    found = [tool for tool in listed if only in (None, tool["name"])]
    if not found:
        raise TurnFailure("invalid_request", f"Toolgroup {group} has no tool{f' {only}' if only else 's, or is down'}")
    return [Tool(**tool, toolgroup_id=group, args=args.get(group, {})) for tool in found]


async def _runtime_tools(stack: LlamaStack, group: str) -> list[dict[str, Any]]:
    listed = (await stack.tool_groups.list_tools(toolgroup_id=group)).data
    return [
        {"name": tool.name, "description": tool.description, "input_schema": tool.input_schema, "is_mcp": False}
        for tool in listed
        if tool.name not in _NOT_FOR_MODELS
    ]


def _mcp_tools(listed: list[types.Tool]) -> list[dict[str, Any]]:
    return [
        {
            "name": tool.name,
            "description": tool.description,
            "input_schema": tool.inputSchema,
            "is_mcp": True,
            "annotations": tool.annotations.model_dump(exclude_none=True) if tool.annotations else {},
        }
        for tool in listed
    ]


def _name(group: str | AgentToolGroupWithArgs) -> str:
    return group if isinstance(group, str) else str(group.name)


def _split(name: str) -> tuple[str, str | None]:
    """`group/tool` names one tool of a group (`builtin::rag/knowledge_search`)."""
    group, _, tool = name.partition("/")
    return group, tool or None


def offered(config: AgentConfig, resolved: Resolved) -> list[OpenAITool]:
    """The client's and the server's tools, as the model is told of them."""
    tools = [(tool.name, tool.description, tool.input_schema) for tool in config.client_tools or []]
    tools += [(tool.name, tool.description, tool.input_schema) for tool in resolved.tools]
    return [{"type": "function", "function": _function(*tool)} for tool in tools]


def _function(name: str, description: str | None, input_schema: dict[str, Any] | None) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    if input_schema:
        function["parameters"] = input_schema
    return function


def failed(tool_call: ToolCall, message: str) -> ToolResponse:
    return ToolResponse(
        call_id=tool_call.call_id, tool_name=tool_call.tool_name, content=message, metadata={"error": True}
    )
