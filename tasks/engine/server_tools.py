"""The server tools of one attempt at a turn: each call of one of them.

Whatever goes wrong in a tool becomes the tool's response: the model can go on from it, and the turn is not lost.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from llama_stack.apis.inference import ToolCall, ToolResponse
from llama_stack.apis.tools import ToolInvocationResult
from mcp import types

from app.domain.arguments import parsed
from app.domain.decide import tool_name
from app.identity.secrets import HEADER, Secrets
from app.settings import Settings
from app.stack.code_interpreter import TOOLGROUP as CODE
from tasks.engine import mcp
from tasks.engine.knowledge import KNOWLEDGE_SEARCH, Knowledge
from tasks.engine.mcp import Connections
from tasks.engine.mcp_wire import Unauthorized
from tasks.engine.tools import Resolved, Tool, failed
from tasks.stack import LlamaStack
from tasks.tools.code_interpreter import CodeInterpreter

logger = logging.getLogger(__name__)


class ServerTools:
    """Of one attempt. `secrets` is set once they are opened, `resolved` once the turn's tools are known."""

    def __init__(
        self,
        stack: LlamaStack,
        settings: Settings,
        session_id: str,
        knowledge: Knowledge,
        connections: Connections,
        code: CodeInterpreter,
    ) -> None:
        self._stack = stack
        self._settings = settings
        self._session_id = session_id
        self._knowledge = knowledge
        self._mcp = connections
        self.secrets = Secrets()
        self.code = code
        self.resolved = Resolved()

    def repeatable(self, tool_call: ToolCall) -> bool:
        """Whether a call that was in flight when its worker died may be made again."""
        tool = self.resolved.tool(tool_call)
        return tool is not None and tool.safe_to_repeat(self._settings.tools_safe_to_repeat)

    def runs_code(self, tool_call: ToolCall) -> bool:
        """Whether it is for the code interpreter, whose calls are made in order and recorded with what they leave."""
        tool = self.resolved.tool(tool_call)
        return tool is not None and tool.toolgroup_id == CODE

    async def call(self, tool_call: ToolCall, key: str) -> ToolResponse:
        """Makes one call. Whatever goes wrong is the response, which never has a secret of the request.

        `key`: the same for every attempt of this call, and different for every other call.
        """
        tool = self.resolved.tool(tool_call)
        if tool is None:
            known = ", ".join(tool.name for tool in self.resolved.tools) or "none"
            return failed(tool_call, f"There is no tool {tool_name(tool_call)}. Tools: {known}.")
        try:
            arguments = parsed(tool_call.arguments)
        except ValueError as error:
            return failed(tool_call, str(error))
        limit = self._settings.tool_timeout_seconds
        try:
            async with asyncio.timeout(limit) as taken:
                result = await self._invoke(tool, {**arguments, **tool.args}, key)
            return self._bounded(self._hidden(_response(tool_call, result)), tool_call)
        except Exception as error:
            if taken.expired():
                return failed(tool_call, f"The tool gave no result within {limit:g} s (TOOL_TIMEOUT_SECONDS).")
            said = self.secrets.hide(_words(error))
            logger.warning("tool %s failed: %s", tool.name, said)
            return failed(tool_call, f"The tool failed: {said}")

    async def _invoke(self, tool: Tool, arguments: dict[str, Any], key: str) -> ToolInvocationResult:
        if tool.is_mcp:
            return await self._invoke_mcp(tool, arguments, key)
        if tool.toolgroup_id == CODE:
            return await self.code.run(arguments)
        if tool.name == KNOWLEDGE_SEARCH:
            return await self._knowledge.search(arguments.get("query"), tool.args)
        kwargs = {**arguments, "session_id": self._session_id}  # whatever the model says
        return await self._stack.call_tool(tool.toolgroup_id, tool.name, kwargs)

    async def _invoke_mcp(self, tool: Tool, arguments: dict[str, Any], key: str) -> ToolInvocationResult:
        endpoint = await self._stack.mcp_endpoint(tool.toolgroup_id)
        if endpoint is None:
            raise ValueError(f"toolgroup {tool.toolgroup_id} is no MCP server any longer")
        # It gets just what the model said: its schema knows no session.
        return await self._mcp.call_tool(self._server(endpoint), tool.name, arguments, key)

    async def listed(self, endpoint: str) -> list[types.Tool]:
        """The tools of an MCP server, which may repeat a secret too. Raises Exception, in words for the turn's user."""
        try:
            listed = await self._mcp.list_tools(self._server(endpoint))
            return [types.Tool.model_validate(self.secrets.hide(tool.model_dump(mode="json"))) for tool in listed]
        except Exception as error:
            raise ConnectionError(self.secrets.hide(_words(error))) from None

    def _server(self, endpoint: str) -> mcp.Server:
        return mcp.Server(endpoint, self.secrets.headers_of_server(endpoint))

    def _hidden(self, response: ToolResponse) -> ToolResponse:
        return ToolResponse.model_validate(self.secrets.hide(response.model_dump(mode="json")))

    def _bounded(self, response: ToolResponse, tool_call: ToolCall) -> ToolResponse:
        size, limit = len(response.model_dump_json().encode()), self._settings.tool_result_max_bytes
        if size <= limit:
            return response
        logger.warning("tool %s gave a result of %d bytes", tool_name(tool_call), size)
        message = f"The tool's result has {size} bytes, more than the {limit} allowed (TOOL_RESULT_MAX_BYTES)."
        return failed(tool_call, message)


def _words(error: Exception) -> str:
    if isinstance(error, Unauthorized):
        example = '{"mcp_headers": {"<the URL of its endpoint>": {"Authorization": "Bearer …"}}}'
        return f"{error}: send it credentials that it accepts, by {HEADER}: {example}"
    return str(error) or type(error).__name__


def _response(tool_call: ToolCall, result: ToolInvocationResult) -> ToolResponse:
    content = result.content if result.content is not None else result.error_message or ""
    return ToolResponse(
        call_id=tool_call.call_id, tool_name=tool_call.tool_name, content=content, metadata=result.metadata
    )
