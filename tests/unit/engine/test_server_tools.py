"""Server tools, called one by one: whatever goes wrong is a response."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from llama_stack.apis.inference import ToolCall
from llama_stack.apis.tools import ToolInvocationResult

from app.identity.secrets import HIDDEN, Secrets
from app.settings import Settings
from tasks.engine.knowledge import Knowledge
from tasks.engine.mcp import IDEMPOTENCY_KEY, Connections
from tasks.engine.server_tools import ServerTools
from tasks.engine.tools import Resolved, Tool
from tasks.tools.code_interpreter import CodeInterpreter
from tests.support import wait_until
from tests.support.mcp_server import McpServer
from tests.unit.engine.stack import Stack, as_stack

MCP = {"toolgroup_id": "mcp", "is_mcp": True}


async def called(
    stack: Stack,
    name: str = "add",
    arguments: str = "{}",
    timeout_seconds: float = 60,
    max_bytes: int = 10_000,
    tool: dict[str, Any] | None = None,
    secrets: Secrets = Secrets(),  # noqa: B008  (it is frozen)
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
    settings = Settings(
        _env_file=None,
        database_url="postgresql://unused",
        tool_timeout_seconds=timeout_seconds,
        tool_result_max_bytes=max_bytes,
    )
    connections = Connections(1_000_000)
    knowledge, code = cast(Knowledge, None), cast(CodeInterpreter, None)
    server_tools = ServerTools(as_stack(stack), settings, "session", knowledge, connections, code)
    server_tools.secrets = secrets
    server_tools.resolved = Resolved(tools=[known])
    try:
        return await server_tools.call(asked, "t:0:0")
    finally:
        connections.close()


async def test_a_call_gets_the_session_the_models_and_the_groups_arguments() -> None:
    """The group's win, and the session is not the model's to say."""
    stack = Stack()
    response = await called(stack, arguments='{"a": 1, "b": 2, "session_id": "x"}', tool={"args": {"b": 3}})
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
        Stack(mcp_url=server.url), "slow", arguments, timeout_seconds=4, tool={**MCP, "name": "slow"}
    )
    assert response.content == "The tool gave no result within 4 s (TOOL_TIMEOUT_SECONDS)."
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
        ({"arguments": '{"a": NaN}'}, "not valid JSON"),
        ({"arguments": '{"a": 1e999}'}, "not valid JSON"),
        ({"arguments": '{"a": %s}' % ("9" * 5000)}, "not valid JSON"),
        ({"arguments": '{"a":' * 100_000 + "1" + "}" * 100_000}, "not valid JSON"),
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


async def test_a_limit_of_the_tools_own_is_not_taken_for_ours() -> None:
    response = await called(Stack(TimeoutError("Tavily did not answer within 60 s")))
    assert response.content == "The tool failed: Tavily did not answer within 60 s"


async def test_a_secret_is_in_no_response(caplog: pytest.LogCaptureFixture) -> None:
    """Neither as a result, nor in an error, nor in our log: what a name tells to be one. Others may be honest words."""
    headers = {"Authorization": "Bearer 12345678-token", "X-Tenant": "tenant-of-mine"}
    secrets = Secrets({"x_api_key": "tvly-0123456789", "mcp_headers": {"https://token.host/mcp": headers}})
    told = [{"type": "text", "text": "got 12345678-token and tvly-0123456789 for tenant-of-mine"}]
    for result in (ToolInvocationResult(content=told), RuntimeError(told[0]["text"])):
        response = await called(Stack(result), secrets=secrets)
        assert f"got {HIDDEN} and {HIDDEN} for tenant-of-mine" in str(response.content)
    assert "12345678-token" not in caplog.text + repr(secrets)
    assert "tvly-" not in caplog.text + repr(secrets)


async def test_an_mcp_server_gets_the_headers_that_are_for_it() -> None:
    """Under its URL; a server that wants others is told of with where they go."""
    with McpServer(token="a-good-token") as guarded:
        for token, said in (("a-good-token", "5"), ("a-wrong-token", 'Data: {"mcp_headers"')):
            secrets = Secrets({"mcp_headers": {guarded.url: {"Authorization": f"Bearer {token}"}}})
            response = await called(Stack(mcp_url=guarded.url), arguments='{"a": 2, "b": 3}', tool=MCP, secrets=secrets)
            assert said in str(response.content)


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
