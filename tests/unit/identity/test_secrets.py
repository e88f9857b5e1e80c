"""What a request brings for its turn's tools: what is taken of it, who gets it, and where it is hidden."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import SecretStr

from app.domain.errors import InvalidRequest, Unsealable
from app.identity.sealing import Sealing, make_sealing_key
from app.identity.secrets import HEADER, HIDDEN, MAX_BYTES, Secrets, provider_data

OURS, OTHERS = (SecretStr(make_sealing_key()) for _ in range(2))
TURN = "turn-1"


def test_members_are_taken_as_they_are() -> None:
    """Of any provider; those without a value, as a program sends whose environment has no key, ask for nothing."""
    given = {"tavily_search_api_key": "k", "other": {"a": [1]}, "openai_api_key": None, "bing_search_api_key": ""}
    assert provider_data(json.dumps(given)) == {"tavily_search_api_key": "k", "other": {"a": [1]}}
    assert provider_data(None) == provider_data("") == provider_data("{}") == {}


def test_nobody_says_by_them_who_they_are() -> None:
    assert provider_data('{"__authenticated_user": {"principal": "root"}}') == {}


@pytest.mark.parametrize(
    "header",
    [
        "sekret",
        '["sekret"]',
        '"sekret"',
        "[" * 20_000,
        '{"a": '
        + "[" * 1_200
        + '"sekret"'
        + "]" * 1_200
        + "}",  # json reads it, and nothing in Python looks through it
        '{"a": "sekret \\ud83d"}',
        json.dumps({"sekret": "x" * MAX_BYTES}),
        '{"tavily_search_api_key": 5}',
        '{"brave_search_api_key": "sekret\\r\\nX-Other: 1"}',
        '{"mcp_headers": "sekret"}',
        '{"mcp_headers": {"https://h/mcp": "sekret"}}',
        '{"mcp_headers": {"https://h/mcp": {"A": ["sekret"]}}}',
        '{"mcp_headers": {"https://h/mcp": {"A": "sekret\\n"}}}',
        '{"mcp_headers": {"https://h/mcp": {"A b": "sekret"}}}',
        '{"mcp_headers": {"sekret": {"A": "b"}}}',
        '{"mcp_headers": {"https://[/mcp": {"A": "sekret"}}}',
    ],
)
def test_what_cannot_be_used_is_refused_and_not_shown(header: str) -> None:
    with pytest.raises(InvalidRequest, match=HEADER) as raised:
        provider_data(header)
    assert "sekret" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "asked", "is_it"),
    [
        ("http://host:80/mcp", "http://host:80/mcp", True),
        ("https://host/mcp", "http://host/mcp?session=1", True),
        ("http://host/mcp/", "http://host/mcp", False),
        ("http://host/mcp", "http://host:8080/mcp", False),
        ("http://other/mcp", "http://host/mcp", False),
    ],
)
def test_headers_go_to_the_server_under_whose_url_they_stand(given: str, asked: str, is_it: bool) -> None:
    """As in llama_stack: by host, port and path."""
    headers = {"Authorization": "Bearer x"}
    assert Secrets({"mcp_headers": {given: headers}}).headers_of_server(asked) == (headers if is_it else {})


def test_they_are_sealed_together_and_opened() -> None:
    """A response has headers by its tools' labels beside them. Nothing is sealed where there is nothing."""
    sealing = Sealing([OURS])
    secrets = Secrets({"a_api_key": "12345678"}, {"label": {"Authorization": "Bearer y"}})
    sealed = secrets.sealed(sealing, TURN)
    assert sealed
    assert b"12345678" not in sealed
    assert Secrets.opened(sealing, sealed, TURN) == secrets
    assert Secrets().sealed(Sealing([]), TURN) is None
    assert Secrets.opened(Sealing([]), None, TURN) == Secrets()
    with pytest.raises(InvalidRequest, match="SEALING_KEYS is not set"):
        secrets.sealed(Sealing([]), TURN)
    for keys, turn in (([OTHERS], TURN), ([], TURN), ([OURS], "turn-2")):
        with pytest.raises(Unsealable, match="SEALING_KEYS"):
            Secrets.opened(Sealing(keys), sealed, turn)


def test_what_an_older_web_process_sealed_is_opened() -> None:
    sealing = Sealing([OURS])
    sealed = sealing.seal({"mcp_headers": {"label": {"A": "b"}}}, TURN)
    assert Secrets.opened(sealing, sealed, TURN).mcp_headers == {"label": {"A": "b"}}


@pytest.mark.parametrize(
    ("data", "said", "hidden"),
    [
        ({"a_api_key": "tvly-123456"}, "key tvly-123456!", f"key {HIDDEN}!"),
        ({"nested": {"token": ["abcdefgh"]}}, {"abcdefgh": ["abcdefgh", 1]}, {HIDDEN: [HIDDEN, 1]}),
        ({"mcp_headers": {"https://h": {"Authorization": "Bearer abcdefgh"}}}, "abcdefgh", HIDDEN),
        ({"mcp_headers": {"https://key.h/": {"X-Tenant": "abcdefgh"}}}, "abcdefgh", "abcdefgh"),
        ({"a_api_key": "short"}, "a short one", "a short one"),
    ],
)
def test_secrets_are_hidden_in_what_a_tool_says(data: dict[str, Any], said: Any, hidden: Any) -> None:
    """What a name tells to be one, and is long enough to be no word."""
    assert Secrets(data).hide(said) == hidden
