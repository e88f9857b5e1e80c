"""Server tools: resolved once, called one by one, and whatever goes wrong is a response."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
from llama_stack.apis.agents import AgentConfig
from llama_stack.apis.inference import ToolCall
from llama_stack.apis.tools import ListToolDefsResponse, ToolDef, ToolInvocationResult

from app.domain.errors import TurnFailure
from tasks.engine.mcp import IDEMPOTENCY_KEY
from tasks.engine.tools import Limits, Resolved, Tool, call, offered, resolve
from tasks.stack import LlamaStack
from tests.support import wait_until
from tests.support.mcp_server import McpServer

GROUPS = {
    "calc": [ToolDef(name="add", description="Adds."), ToolDef(name="echo", input_schema={"type": "object"})],
    "more": [ToolDef(name="add")],
    "empty": [],
}
MCP = {"toolgroup_id": "mcp", "is_mcp": True}
PLAIN: dict[str, Any] = {
    "name": "add",
    "toolgroup_id": "mcp::g",
    "description": None,
    "input_schema": None,
    "args": {},
    "is_mcp": True,
}
"""A tool as it was stored before annotations were kept."""


class Stack:
    """`tool_groups` and `tool_runtime` of a Llama Stack. The toolgroup `mcp` is an MCP server."""

    def __init__(self, result: Any = None, mcp_url: str | None = None) -> None:
        self.tool_groups = self.tool_runtime = self
        self.mcp_url = mcp_url
        self.result = result or ToolInvocationResult(content="3", metadata={"m": 1})
        self.invoked: list[tuple[str, dict[str, Any]]] = []

    async def mcp_endpoint(self, toolgroup_id: str) -> str | None:
        return self.mcp_url if toolgroup_id == "mcp" else None

    async def list_tools(self, toolgroup_id: str) -> ListToolDefsResponse:
        return ListToolDefsResponse(data=GROUPS[toolgroup_id])

    async def invoke_tool(self, tool_name: str, kwargs: dict[str, Any]) -> ToolInvocationResult:
        self.invoked.append((tool_name, kwargs))
        if isinstance(self.result, BaseException):
            raise self.result
        if callable(self.result):
            await self.result()
        return self.result


def as_stack(stack: Stack) -> LlamaStack:
    return cast(LlamaStack, stack)


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    with McpServer() as mcp:
        yield mcp


async def resolved(request: dict[str, Any], max_bytes: int = 100, mcp_url: str | None = None, **agent: Any) -> Resolved:
    config = AgentConfig(**{"model": "m", "instructions": "", **agent})
    return await resolve(as_stack(Stack(mcp_url=mcp_url)), config, request, max_bytes)


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
    request = {"documents": [{"content": "text", "mime_type": "text/plain"}]}
    given = await resolved(request, mcp_url=server.url, toolgroups=["calc/echo", "mcp"])
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


async def test_documents_become_one_text() -> None:
    """Given as text, as an item, or to be fetched."""
    item = {"type": "text", "text": "two"}
    given = await resolved(
        {
            "documents": [
                {"content": "one", "mime_type": "text/plain"},
                {"content": item, "mime_type": "application/json"},
            ]
        }
    )
    assert given.context == "one\ntwo"


@pytest.mark.parametrize(
    "document",
    [
        {"content": "x", "mime_type": "application/pdf"},
        {"content": {"uri": "file:///etc/passwd"}, "mime_type": "text/plain"},
        {"content": "é" * 51, "mime_type": "text/plain"},
        {"content": {"uri": "http://127.0.0.1:1/none"}, "mime_type": "text/plain"},
        {"content": [{"type": "text", "text": "x"}], "mime_type": "text/plain"},
    ],
)
async def test_a_document_that_cannot_be_had_fails_the_turn(document: dict[str, Any]) -> None:
    """Its type, its place, its size."""
    with pytest.raises(TurnFailure) as failure:
        await resolved({"documents": [document]})
    assert failure.value.code == "invalid_request"


@pytest.mark.parametrize("size", [100, 101])
async def test_a_fetched_document_is_bounded(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the limit is read."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="x" * size))
    client = httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **kwargs: client(transport=transport, **kwargs))
    fetching = resolved({"documents": [{"content": {"uri": "https://x/y"}, "mime_type": "text/plain"}]})
    if size > 100:
        with pytest.raises(TurnFailure, match="over 100 bytes"):
            await fetching
    else:
        assert (await fetching).context == "x" * size


def test_client_and_server_tools_are_offered_alike() -> None:
    """The client's first; what a tool does not have is left out."""
    config = AgentConfig(model="m", instructions="", client_tools=[{"name": "ask", "description": "Asks."}])
    tool = Tool(name="add", toolgroup_id="c", description=None, input_schema={"type": "object"}, args={}, is_mcp=False)
    assert offered(config, Resolved(tools=[tool])) == [
        {"type": "function", "function": {"name": "ask", "description": "Asks."}},
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    ]


async def called(
    stack: Stack,
    name: str = "add",
    arguments: str = "{}",
    timeout_seconds: float = 5,
    max_bytes: int = 10_000,
    tool: dict[str, Any] | None = None,
) -> Any:
    known = Tool(
        **{
            "name": "add",
            "toolgroup_id": "calc",
            "description": None,
            "input_schema": None,
            "args": {},
            "is_mcp": False,
            **(tool or {}),
        }
    )
    asked = ToolCall(call_id="c1", tool_name=name, arguments=arguments)
    limits = Limits(timeout_seconds, max_bytes)
    return await call(as_stack(stack), Resolved(tools=[known]), "session", asked, "t:0:0", limits)


async def test_a_call_gets_the_session_the_models_and_the_groups_arguments() -> None:
    """The group's win."""
    stack = Stack()
    response = await called(stack, arguments='{"a": 1, "b": 2}', tool={"args": {"b": 3}})
    assert stack.invoked == [("add", {"session_id": "session", "a": 1, "b": 3})]
    assert (response.call_id, response.content, response.metadata) == ("c1", "3", {"m": 1})


async def test_an_mcp_server_is_called_by_us(server: McpServer) -> None:
    """With the model's and the group's arguments, without a session, and with the call's key."""
    server.reset()
    stack = Stack(mcp_url=server.url)
    response = await called(stack, arguments='{"a": 1, "b": 2}', tool={**MCP, "args": {"b": 3}})
    assert [item.text for item in response.content] == ["4"]
    assert (response.call_id, response.metadata, stack.invoked) == ("c1", None, [])
    [made] = server.calls()
    assert (made["arguments"], made["_meta"]) == ({"a": 1, "b": 3}, {IDEMPOTENCY_KEY: "t:0:0"})
    gone = await called(Stack(mcp_url=None), tool=MCP)
    assert "no MCP server any longer" in gone.content


async def test_an_mcp_call_out_of_time_is_stopped(server: McpServer) -> None:
    """The server is told; the model is, too, and which setting it was."""
    server.reset()
    arguments = '{"seconds": 60, "text": "x"}'
    response = await called(
        Stack(mcp_url=server.url), "slow", arguments, timeout_seconds=1, tool={**MCP, "name": "slow"}
    )
    assert response.content == "The tool gave no result within 1 s (TOOL_TIMEOUT_SECONDS)."
    await asyncio.to_thread(wait_until, lambda: [made["ended"] for made in server.calls()] == ["cancelled"])


@pytest.mark.parametrize("content", ["é" * 600, [{"type": "text", "text": "x" * 1000}]])
async def test_a_result_that_is_too_large_is_an_error(content: Any) -> None:
    """It names its size, the limit and the setting; one that just fits is given."""
    result = ToolInvocationResult(content=content)
    whole = await called(Stack(result))
    size = len(whole.model_dump_json().encode())
    assert await called(Stack(result), max_bytes=size) == whole
    refused = await called(Stack(result), max_bytes=size - 1)
    assert refused.metadata == {"error": True}
    assert f"{size} bytes, more than the {size - 1} allowed (TOOL_RESULT_MAX_BYTES)" in refused.content


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "nowhere"}, "no tool nowhere"),
        ({"name": "code_interpreter"}, "no tool code_interpreter"),
        ({"arguments": "{oops"}, "not valid JSON"),
        ({"arguments": "[1]"}, "not a JSON object"),
    ],
)
async def test_a_call_that_cannot_be_made_is_answered(given: dict[str, Any], said: str) -> None:
    """The model is told why; nothing is invoked."""
    stack = Stack()
    response = await called(stack, **given)
    assert said in response.content
    assert response.metadata == {"error": True}
    assert not stack.invoked


async def test_a_tool_that_raises_or_hangs_is_answered() -> None:
    """With its own words, or with the time that it had."""
    assert "broken" in (await called(Stack(RuntimeError("broken")))).content
    hanging = await called(Stack(asyncio.Event().wait), timeout_seconds=0.01)
    assert "0.01 s" in hanging.content


async def test_a_tool_without_content_is_answered_with_its_error() -> None:
    """Or with nothing."""
    assert (await called(Stack(ToolInvocationResult(error_message="why")))).content == "why"
    assert (await called(Stack(ToolInvocationResult()))).content == ""


async def test_a_cancelled_call_is_not_answered() -> None:
    """The turn is over."""
    task = asyncio.create_task(called(Stack(asyncio.Event().wait)))
    await asyncio.wait([task], timeout=0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
