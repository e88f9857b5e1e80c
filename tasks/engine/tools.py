"""Server tools: what a turn may call, resolved once, and one call of one of them.

Whatever goes wrong in a tool becomes the tool's response: the model can go on from it, and the turn is not lost.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import httpx
from llama_stack.apis.agents import AgentConfig, AgentToolGroupWithArgs, Document
from llama_stack.apis.common.content_types import URL, TextContentItem
from llama_stack.apis.inference import ToolCall, ToolResponse
from llama_stack.apis.tools import ToolInvocationResult
from pydantic import BaseModel, TypeAdapter

from app.domain.decide import tool_name
from app.domain.errors import TurnFailure
from tasks.engine import mcp
from tasks.engine.messages import OpenAITool
from tasks.stack import LlamaStack

logger = logging.getLogger(__name__)

READ_ONLY_BUILTINS = frozenset({"knowledge_search", "web_search"})

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
        return self.name in READ_ONLY_BUILTINS


class Resolved(BaseModel):
    """What a turn resolves once, in its first attempt."""

    tools: list[Tool] = []
    context: str = ""

    def tool(self, call: ToolCall) -> Tool | None:
        """The tool that a call names."""
        name = tool_name(call)
        return next((tool for tool in self.tools if tool.name == name), None)


Toolgroups = TypeAdapter(list[str | AgentToolGroupWithArgs])
Documents = TypeAdapter(list[Document])


async def resolve(stack: LlamaStack, config: AgentConfig, request: dict[str, Any], document_max_bytes: int) -> Resolved:
    """Raises TurnFailure: a toolgroup or a document cannot be had."""
    toolgroups = Toolgroups.validate_python(request.get("toolgroups") or [])
    documents = Documents.validate_python(request.get("documents") or [])
    return Resolved(
        tools=await _resolve_tools(stack, config, toolgroups),
        context="\n".join([await _document_text(document, document_max_bytes) for document in documents]),
    )


async def _resolve_tools(
    stack: LlamaStack, config: AgentConfig, for_turn: list[str | AgentToolGroupWithArgs]
) -> list[Tool]:
    """The turn's toolgroups in place of the agent's, if it names any; arguments of both."""
    configured = [*(config.toolgroups or []), *for_turn]
    args = {_split(group.name)[0]: group.args for group in configured if isinstance(group, AgentToolGroupWithArgs)}
    names = dict.fromkeys(_name(group) for group in for_turn or config.toolgroups or [])
    tools: dict[str, Tool] = {}
    client_tools = {tool.name for tool in config.client_tools or []}
    for name in names:
        for tool in await _group_tools(stack, *_split(name), args):
            if tool.name in tools or tool.name in client_tools:
                raise TurnFailure("invalid_request", f"Tool {tool.name} is offered twice")
            tools[tool.name] = tool
    return list(tools.values())


async def _group_tools(stack: LlamaStack, group: str, only: str | None, args: dict[str, dict[str, Any]]) -> list[Tool]:
    try:
        endpoint = await stack.mcp_endpoint(group)
        listed = await (_runtime_tools(stack, group) if endpoint is None else _mcp_tools(endpoint))
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
    ]


async def _mcp_tools(endpoint: str) -> list[dict[str, Any]]:
    return [
        {
            "name": tool.name,
            "description": tool.description,
            "input_schema": tool.inputSchema,
            "is_mcp": True,
            "annotations": tool.annotations.model_dump(exclude_none=True) if tool.annotations else {},
        }
        for tool in await mcp.list_tools(mcp.Server(endpoint))
    ]


def _name(group: str | AgentToolGroupWithArgs) -> str:
    return group if isinstance(group, str) else str(group.name)


def _split(name: str) -> tuple[str, str | None]:
    """`group/tool` names one tool of a group (`builtin::rag/knowledge_search`)."""
    group, _, tool = name.partition("/")
    return group, tool or None


async def _document_text(document: Document, max_bytes: int) -> str:
    if not (document.mime_type.startswith("text/") or document.mime_type in ("application/yaml", "application/json")):
        raise TurnFailure("invalid_request", f"Unexpected document mime type: {document.mime_type}")
    content = document.content
    if isinstance(content, URL):
        text = await _fetch(content.uri, max_bytes)
    elif isinstance(content, TextContentItem):
        text = content.text
    elif isinstance(content, str):
        text = content
    else:
        raise TurnFailure("invalid_request", f"Unexpected document content: {type(content).__name__}")
    if len(text.encode()) > max_bytes:
        raise TurnFailure("invalid_request", f"A document is over {max_bytes} bytes (DOCUMENT_MAX_BYTES)")
    # Postgres cannot read a member out of a JSON value that has U+0000 anywhere in it.
    return text.replace("\0", "")


async def _fetch(uri: str, max_bytes: int) -> str:
    if not uri.startswith(("http://", "https://")):
        raise TurnFailure("invalid_request", f"Unexpected URL: {uri}")
    try:
        async with httpx.AsyncClient(timeout=30) as client, client.stream("GET", uri) as response:
            response.raise_for_status()
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > max_bytes:
                    break
            return content.decode(response.encoding or "utf-8", errors="replace")
    except httpx.HTTPError as error:
        raise TurnFailure("invalid_request", f"The document {uri} cannot be fetched: {error}") from error


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


@dataclass(frozen=True)
class Limits:
    """Of one call: seconds that it may take, bytes that its response may have as JSON."""

    timeout_seconds: float
    max_bytes: int


async def call(
    stack: LlamaStack, resolved: Resolved, session_id: str, tool_call: ToolCall, key: str, limits: Limits
) -> ToolResponse:
    """Makes one call. Whatever goes wrong is the response.

    `key`: the same for every attempt of this call, and different for every other call.
    """
    tool = resolved.tool(tool_call)
    if tool is None:
        known = ", ".join(tool.name for tool in resolved.tools) or "none"
        return failed(tool_call, f"There is no tool {tool_name(tool_call)}. Tools: {known}.")
    try:
        arguments = json.loads(tool_call.arguments)
    except json.JSONDecodeError as error:
        return failed(tool_call, f"The arguments are not valid JSON: {error}.")
    if not isinstance(arguments, dict):
        return failed(tool_call, "The arguments are not a JSON object.")
    try:
        async with asyncio.timeout(limits.timeout_seconds):
            result = await _invoke(stack, tool, session_id, {**arguments, **tool.args}, key)
    except TimeoutError:
        seconds = f"{limits.timeout_seconds:g} s"
        return failed(tool_call, f"The tool gave no result within {seconds} (TOOL_TIMEOUT_SECONDS).")
    except Exception as error:
        logger.warning("tool %s failed: %s", tool.name, error)
        return failed(tool_call, f"The tool failed: {error}")
    return _bounded(_response(tool_call, result), tool_call, limits.max_bytes)


async def _invoke(
    stack: LlamaStack, tool: Tool, session_id: str, arguments: dict[str, Any], key: str
) -> ToolInvocationResult:
    if tool.is_mcp:
        endpoint = await stack.mcp_endpoint(tool.toolgroup_id)
        if endpoint is None:
            raise ValueError(f"toolgroup {tool.toolgroup_id} is no MCP server any longer")
        # It gets just what the model said: its schema knows no session.
        return await mcp.call_tool(mcp.Server(endpoint), tool.name, arguments, key)
    # The router finds a tool's group in an index that listing the group fills: another process may have resolved it.
    await stack.tool_groups.list_tools(toolgroup_id=tool.toolgroup_id)
    kwargs = {"session_id": session_id, **arguments}
    return await stack.tool_runtime.invoke_tool(tool_name=tool.name, kwargs=kwargs)


def _response(tool_call: ToolCall, result: ToolInvocationResult) -> ToolResponse:
    content = result.content if result.content is not None else result.error_message or ""
    return ToolResponse(
        call_id=tool_call.call_id, tool_name=tool_call.tool_name, content=content, metadata=result.metadata
    )


def _bounded(response: ToolResponse, tool_call: ToolCall, max_bytes: int) -> ToolResponse:
    size = len(response.model_dump_json().encode())
    if size <= max_bytes:
        return response
    logger.warning("tool %s gave a result of %d bytes", tool_name(tool_call), size)
    return failed(
        tool_call, f"The tool's result has {size} bytes, more than the {max_bytes} allowed (TOOL_RESULT_MAX_BYTES)."
    )


def failed(tool_call: ToolCall, message: str) -> ToolResponse:
    return ToolResponse(
        call_id=tool_call.call_id, tool_name=tool_call.tool_name, content=message, metadata={"error": True}
    )
