"""Server tools, resolved once."""

from __future__ import annotations

from typing import Any

import pytest
from llama_stack.apis.agents import AgentConfig

from app.domain.errors import TurnFailure
from tasks.engine.mcp import Connections, Server
from tasks.engine.tools import Resolved, Tool, offered, resolve
from tests.support.mcp_server import McpServer
from tests.unit.engine.stack import Stack, as_stack

PLAIN: dict[str, Any] = {
    "name": "add",
    "toolgroup_id": "mcp::g",
    "description": None,
    "input_schema": None,
    "args": {},
    "is_mcp": True,
}
"""A tool as it was stored before annotations were kept."""


async def resolved(request: dict[str, Any], mcp_url: str | None = None, **agent: Any) -> Resolved:
    config = AgentConfig(**{"model": "m", "instructions": "", **agent})
    connections = Connections(1_000_000)
    try:
        return await resolve(
            as_stack(Stack(mcp_url=mcp_url)),
            config,
            request,
            lambda endpoint: connections.list_tools(Server(endpoint)),
        )
    finally:
        connections.close()


def names(given: Resolved) -> list[str]:
    return [tool.name for tool in given.tools]


async def test_an_agents_toolgroups_are_resolved_with_their_arguments(server: McpServer) -> None:
    """One tool of a group can be named."""
    group = {"name": "calc/echo", "args": {"unit": "m"}}
    given = await resolved({}, mcp_url=server.url, toolgroups=[group, "mcp/put"])
    assert [(tool.name, tool.args, tool.is_mcp, tool.annotations) for tool in given.tools] == [
        ("echo", {"unit": "m"}, False, {}),
        ("put", {}, True, {"idempotentHint": True}),
    ]
    assert given.tools[1].description == "Counts a side effect under the key."
    assert (given.tools[1].input_schema or {})["required"] == ["key"]


async def test_a_turns_toolgroups_take_the_place_of_the_agents() -> None:
    """Arguments that the agent gives a group stay."""
    given = await resolved({"toolgroups": ["calc"]}, toolgroups=[{"name": "calc", "args": {"a": 1}}, "mcp"])
    assert (names(given), given.tools[0].args) == (["add", "echo"], {"a": 1})


@pytest.mark.parametrize(
    ("toolgroups", "client_tools"),
    [
        (["nowhere"], []),
        (["empty"], []),
        (["mcp"], []),
        (["calc/nothing"], []),
        (["calc", "more"], []),
        (["calc"], [{"name": "add"}]),
    ],
)
async def test_toolgroups_that_cannot_be_used_fail_the_turn(toolgroups: list[str], client_tools: list[Any]) -> None:
    """The request is wrong: no such group or tool, or one name for two tools."""
    with pytest.raises(TurnFailure) as failure:
        await resolved({}, mcp_url="http://127.0.0.1:1/mcp", toolgroups=toolgroups, client_tools=client_tools)
    assert failure.value.code == "invalid_request"


async def test_what_was_resolved_is_stored_and_read_back(server: McpServer) -> None:
    """Every attempt offers the same tools."""
    given = await resolved({}, mcp_url=server.url, toolgroups=["calc/echo", "mcp"])
    assert Resolved.model_validate(given.model_dump(mode="json")) == given


async def test_what_was_resolved_before_annotations_were_kept_is_read() -> None:
    """A turn that an older worker began: its tools are not safe to repeat."""
    [tool] = Resolved.model_validate({"tools": [PLAIN], "context": ""}).tools
    assert not tool.safe_to_repeat([])


@pytest.mark.parametrize(
    ("given", "configured", "safe"),
    [
        ({"annotations": {"readOnlyHint": True}}, [], True),
        ({"annotations": {"idempotentHint": True}}, [], True),
        ({"annotations": {"readOnlyHint": False, "destructiveHint": False}}, [], False),
        ({}, [], False),
        ({}, ["add"], True),
        ({}, ["mcp::g/add"], True),
        ({}, ["other/add", "mcp::g", "ad"], False),
        ({"name": "web_search", "is_mcp": False}, [], True),
        ({"name": "web_search", "is_mcp": True}, [], False),
        ({"name": "other", "is_mcp": False}, [], False),
    ],
)
def test_which_calls_may_be_made_again(given: dict[str, Any], configured: list[str], safe: bool) -> None:
    """Those of builtin tools that read, those whose MCP server says so, those that the operator names."""
    assert Tool(**{**PLAIN, **given}).safe_to_repeat(configured) is safe


def test_client_and_server_tools_are_offered_alike() -> None:
    """The client's first; what a tool does not have is left out."""
    config = AgentConfig(model="m", instructions="", client_tools=[{"name": "ask", "description": "Asks."}])
    tool = Tool(name="add", toolgroup_id="c", description=None, input_schema={"type": "object"}, args={}, is_mcp=False)
    assert offered(config, Resolved(tools=[tool])) == [
        {"type": "function", "function": {"name": "ask", "description": "Asks."}},
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    ]
