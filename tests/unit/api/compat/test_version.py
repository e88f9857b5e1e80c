"""Which version of an SDK asks, and which dialect that means."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from app.api.compat.dialect import BEFORE_03, CANONICAL, Dialect, _dialect
from app.api.compat.version import client_version, is_llama_stack, is_ogx

NAME = "x-llamastack-client-version"
PACKAGE = "x-stainless-package-version"


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({NAME: "0.2.23"}, (0, 2)),
        ({NAME: "0.2.23", PACKAGE: "9.9"}, (0, 2)),
        ({NAME: "0.3.5rc1"}, (0, 3)),
        ({NAME: "1.5.0"}, (1, 5)),
        ({PACKAGE: "0.2.7"}, (0, 2)),
        ({}, None),
        ({NAME: ""}, None),
        ({NAME: "nonsense", PACKAGE: "0.2.7"}, (0, 2)),
        ({NAME: "99999999999.1"}, None),
    ],
)
def test_the_version_is_read_from_either_header(headers: dict[str, str], version: tuple[int, int] | None) -> None:
    """Python's header goes first; what is no version says nothing, and refuses nobody."""
    assert client_version(headers) == version


@pytest.mark.parametrize(
    ("header", "value", "dialect"),
    [
        (NAME, "0.1.9", BEFORE_03),
        (NAME, "0.2.23", BEFORE_03),
        (PACKAGE, "0.2.23", BEFORE_03),
        (NAME, "0.3.0", CANONICAL),
        (NAME, "0.7.5", CANONICAL),
        (PACKAGE, "6.9.1", CANONICAL),
        ("accept", "*/*", CANONICAL),
    ],
)
async def test_the_dialect_goes_by_the_version(header: str, value: str, dialect: Dialect) -> None:
    """Before 0.3 is one dialect; all others, and who says nothing, get what is stored."""
    scope = {"type": "http", "headers": [(header.encode(), value.encode())]}
    assert await _dialect(Request(scope)) is dialect


@pytest.mark.parametrize(
    ("headers", "llama_stack", "ogx"),
    [
        ({"x-llamastack-client-version": "0.3.5"}, True, False),
        ({"user-agent": "LlamaStackClient/JS 0.2.23"}, True, False),
        ({"user-agent": "AsyncLlamaStackClient/Python 0.7.5"}, True, False),
        ({"x-ogx-client-version": "1.5.0"}, False, True),
        ({"user-agent": "Mozilla/5.0", "x-stainless-lang": "js", PACKAGE: "0.2.23"}, True, False),
        ({"user-agent": "Mozilla/5.0", "x-stainless-lang": "js", PACKAGE: "6.9.1"}, False, False),
        ({"user-agent": "OpenAI::Client/Ruby 0.35.0", "x-stainless-lang": "ruby", PACKAGE: "0.35.0"}, False, False),
        ({"user-agent": "OpenAI/Python 3.54.0"}, False, False),
        ({}, False, False),
    ],
)
def test_whose_sdk_asks(headers: dict[str, str], llama_stack: bool, ogx: bool) -> None:
    """By the header that Python's send, the name in the User-Agent, or where that is another's by the version."""
    assert (is_llama_stack(headers), is_ogx(headers)) == (llama_stack, ogx)
