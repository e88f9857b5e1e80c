"""What a client is told of its request to the tool runtime, where that is not what the tool gave."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any, cast

import pytest

from app.identity.sealing import Sealing, make_sealing_key
from app.identity.secrets import Secrets
from app.settings import Settings
from app.store.tool_requests import Answer, ToolRequest
from tasks.stack import LlamaStack
from tasks.tool_requests import answer

KEY = make_sealing_key()
REQUEST_ID = "5f0c4f1e-53a1-4f6c-9e3e-0c9a3f2f7a10"


class ToolRuntime:
    """A tool for each name."""

    def __init__(self) -> None:
        self.tool_runtime = self

    async def invoke_tool(self, tool_name: str, kwargs: dict[str, Any]) -> Any:
        return await getattr(self, tool_name)(**kwargs)

    async def repeat(self, value: Any) -> Any:
        return {"content": value}

    async def hang(self) -> None:
        await asyncio.Event().wait()

    async def fail(self, kind: str, message: str) -> None:
        raise {"ValueError": ValueError, "PermissionError": PermissionError, "KeyError": KeyError}[kind](message)


def settings(**more: Any) -> Settings:
    given = {"database_url": "postgresql://localhost/x", "sealing_keys": KEY, "tool_timeout_seconds": 60, **more}
    return Settings(_env_file=None, **given)


async def answered(configured: Settings, tool_name: str, *, sealed: bytes | None = None, **kwargs: Any) -> Answer:
    arguments = json.dumps({"tool_name": tool_name, "kwargs": kwargs}).encode()
    request = ToolRequest(REQUEST_ID, "w", "alice", "invoke_tool", arguments, sealed, 1)
    return await answer(configured, cast(LlamaStack, ToolRuntime()), request)


async def test_what_a_tool_gives_is_the_answer() -> None:
    told = await answered(settings(), "repeat", value="camels \u0000 \U0001f42a")
    assert told.status == 200
    assert json.loads(told.body) == {"content": "camels \u0000 \U0001f42a"}


async def test_a_tool_that_takes_too_long() -> None:
    told = await answered(settings(tool_timeout_seconds=0.01), "hang")
    assert told == Answer(504, b'"The tool took longer than 0.01 s (TOOL_TIMEOUT_SECONDS)."')


async def test_a_result_that_is_too_large() -> None:
    told = await answered(settings(tool_result_max_bytes=1024), "repeat", value="x" * 1024)
    assert (told.status, b"TOOL_RESULT_MAX_BYTES" in told.body) == (502, True)


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("ValueError", 400, "Invalid value: camels"),
        ("PermissionError", 403, "Permission denied: camels"),
        ("KeyError", 500, "Internal server error: An unexpected error occurred."),
    ],
)
async def test_a_tool_that_fails(kind: str, status: int, told: str) -> None:
    """As llama_stack's server tells it."""
    assert await answered(settings(), "fail", kind=kind, message="camels") == Answer(status, json.dumps(told).encode())


async def test_secrets_are_hidden_from_the_answer() -> None:
    """It rests in Postgres until the web process has it."""
    secrets = Secrets({"tavily_search_api_key": "tvly-0123456789"})
    sealed = secrets.sealed(Sealing(settings().sealing_keys), REQUEST_ID)
    assert sealed
    told = await answered(settings(), "repeat", sealed=sealed, value="with tvly-0123456789")
    assert json.loads(told.body) == {"content": "with [secret]"}
    failed = await answered(settings(), "fail", sealed=sealed, kind="ValueError", message="with tvly-0123456789")
    assert failed.body == b'"Invalid value: with [secret]"'


async def test_secrets_are_hidden_from_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A server's URL with a key in it is in the error of a request that failed."""
    secrets = Secrets({"wolfram_alpha_api_key": "appid-0123456789"})
    sealed = secrets.sealed(Sealing(settings().sealing_keys), REQUEST_ID)
    told = await answered(settings(), "fail", sealed=sealed, kind="KeyError", message="?appid=appid-0123456789")
    assert told.status == 500
    assert "KeyError: '?appid=[secret]'" in caplog.text
    assert "appid-0123456789" not in caplog.text


async def test_secrets_that_this_worker_cannot_open() -> None:
    other = base64.b64encode(bytes(range(32))).decode()
    sealed = Secrets({"a_api_key": "b"}).sealed(Sealing(settings(sealing_keys=other).sealing_keys), REQUEST_ID)
    told = await answered(settings(), "repeat", sealed=sealed, value=1)
    assert (told.status, b"SEALING_KEYS" in told.body) == (500, True)
