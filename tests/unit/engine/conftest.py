"""An MCP server for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.mcp_server import McpServer


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    with McpServer() as mcp:
        yield mcp
