"""The toolgroup `builtin::code_interpreter`, as the Llama Stack lists it.

It runs nothing. The worker's engine makes the calls itself, in a sandbox (`tasks.tools`), because what they leave is
recorded with the turn; a web process never runs code.
"""

from __future__ import annotations

from typing import Any

from llama_stack.apis.tools import ListToolDefsResponse, ToolDef, ToolGroup, ToolInvocationResult, ToolRuntime
from llama_stack.providers.datatypes import Api, ToolGroupsProtocolPrivate
from pydantic import BaseModel

TOOLGROUP = "builtin::code_interpreter"
PROVIDER_TYPE = "inline::code-interpreter"
TOOL = ToolDef(
    toolgroup_id=TOOLGROUP,
    name="code_interpreter",
    description=(
        "Run Python code, with pandas, numpy and matplotlib, and without a network. Print what you want to see; the "
        "value of the last expression is shown as well. Files in the current folder stay for later calls, variables "
        "and imports do not. The user is shown the files that the code makes, and the figures that it shows."
    ),
    input_schema={
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The Python code to run"}},
        "required": ["code"],
    },
)


class Config(BaseModel):
    """Nothing to configure: the settings of the sandbox are the worker's."""


class CodeInterpreter(ToolGroupsProtocolPrivate, ToolRuntime):
    def __init__(self) -> None:
        """Without one of its own, a subclass of these cannot be instantiated."""

    async def register_toolgroup(self, toolgroup: ToolGroup) -> None:
        pass

    async def unregister_toolgroup(self, toolgroup_id: str) -> None:
        pass

    async def list_runtime_tools(
        self, tool_group_id: str | None = None, mcp_endpoint: Any | None = None
    ) -> ListToolDefsResponse:
        return ListToolDefsResponse(data=[TOOL])

    async def invoke_tool(self, tool_name: str, kwargs: dict[str, Any]) -> ToolInvocationResult:
        message = "The code interpreter runs in turns of agents only, on a worker: it works in the session's folder."
        return ToolInvocationResult(error_message=message, error_code=1)


async def get_provider_impl(config: Config, deps: dict[Api, Any]) -> CodeInterpreter:
    return CodeInterpreter()
