"""Web search by our providers, against a server of each one's shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_stack.core.utils.dynamic import instantiate_class_type
from llama_stack.providers.datatypes import RemoteProviderSpec

from app.identity.secrets import HIDDEN
from app.stack import web_search
from app.stack.access import acting_as, enforce
from app.stack.library import quiet_logging
from app.stack.provider import get_provider_spec
from app.stack.web_search import WebSearch, get_adapter_impl
from tests.support.search_server import SearchServer

KEY = "tvly-0123456789"
KINDS = ["tavily", "brave", "bing"]


@pytest.fixture(scope="module")
def running() -> Iterator[SearchServer]:
    enforce()
    quiet_logging()
    with SearchServer() as server:
        yield server


@pytest.fixture
def server(running: SearchServer) -> SearchServer:
    running.reset()
    return running


async def provider(kind: str, url: str, key: str | None = KEY) -> WebSearch:
    """As llama_stack makes it of its spec."""
    [spec] = [each for each in get_provider_spec() if each.provider_type == f"remote::{kind}-search"]
    assert isinstance(spec, RemoteProviderSpec)
    made = await get_adapter_impl(instantiate_class_type(spec.config_class)(api_key=key, url=url), {})
    made.__provider_spec__ = spec  # llama_stack's resolver does
    return made


async def found(kind: str, url: str, query: str = "camels", key: str | None = KEY, **data: Any) -> str:
    with acting_as("somebody", data):
        result = await (await provider(kind, url, key)).invoke_tool("web_search", {"query": query})
    return str(result.content)


@pytest.mark.parametrize("kind", KINDS)
async def test_each_searches_with_the_servers_key_or_with_the_requests(server: SearchServer, kind: str) -> None:
    """The request's goes first. The tool has one name and one parameter, whoever searches."""
    text = await found(kind, server.url)
    for part in ("About camels", "https://one.example/", "What two says about camels"):
        assert part in text
    assert await found(kind, server.url, "NOTHING")
    await found(kind, server.url, **{f"{kind}_search_api_key": "own-key"})
    assert [search["key"] for search in server.searches()] == [KEY, KEY, "own-key"]
    assert {search["shape"] for search in server.searches()} == {kind}
    [tool] = (await (await provider(kind, server.url)).list_runtime_tools()).data
    assert (tool.name, tool.input_schema["required"]) == ("web_search", ["query"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_missing_key_names_where_to_give_one(server: SearchServer, kind: str) -> None:
    """Also with keys of other providers, which are in no log."""
    other = KINDS[(KINDS.index(kind) + 1) % 3]
    for data in ({}, {f"{other}_search_api_key": "of-another-provider"}):
        with pytest.raises(ValueError, match=f'set {kind.upper()}_SEARCH_API_KEY .*"{kind}_search_api_key"'):
            await found(kind, server.url, key=None, **data)
    assert not server.searches()


async def test_keys_of_other_providers_are_in_no_log(server: SearchServer, caplog: pytest.LogCaptureFixture) -> None:
    """llama_stack logs all that the request brought, when a provider finds its own key missing."""
    caplog.set_level("DEBUG")
    with pytest.raises(ValueError, match="There is no key"):
        await found("tavily", server.url, key=None, a_key="of-another")
    assert "of-another" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("query", "kind_of_error", "said"),
    [
        ("STATUS 401", PermissionError, r"refused the key \(status 401\)"),
        ("STATUS 432", ConnectionError, "answered with status 432"),
        ("STATUS 307", ConnectionError, "answered with status 307"),
        ("GARBAGE", ConnectionError, "not understood"),
        ("OTHER", ConnectionError, "not understood"),
        ("HUGE 9000000", ConnectionError, "gave more than 8388608 bytes"),
        ("PACKED 9000000", ConnectionError, "gave more than 8388608 bytes"),
        ("DROP", ConnectionError, "status 500|cannot be reached"),
        ("", ValueError, "needs a query"),
    ],
)
async def test_what_goes_wrong_is_said_without_the_key(
    server: SearchServer, kind: str, query: str, kind_of_error: type[Exception], said: str
) -> None:
    with pytest.raises(kind_of_error, match=said) as raised:
        await found(kind, server.url, query)
    assert KEY not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


async def test_a_server_that_is_not_there_or_hangs(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match="Tavily cannot be reached: ConnectError"):
        await found("tavily", "http://127.0.0.1:1")
    monkeypatch.setattr(web_search, "SECONDS", 0.2)
    with pytest.raises(TimeoutError, match="Tavily did not answer within"):
        await found("tavily", server.url, "HANG")


async def test_a_key_that_comes_back_is_hidden(server: SearchServer) -> None:
    text = await found("tavily", server.url, "LEAK")
    assert KEY not in text
    assert f"LEAK {HIDDEN}" in text
