"""Which principal a request is made as, for every way in which a server may describe its client."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.identity.keys import Keys, entry, make_key
from app.identity.middleware import Identification

ALICE = make_key()


async def identify(keys: Keys, **given: Any) -> tuple[str | None, list[Message]]:
    """The principal that the application sees, None if it is not asked; and what is sent to the client."""
    seen: list[str | None] = []
    sent: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope.get("principal", "nobody"))

    async def receive() -> Message:
        raise AssertionError("nothing is read of a request")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/agents", "headers": [], "client": ("127.0.0.1", 50000)}
    await Identification(application, keys)({**scope, **given}, receive, send)
    assert len(seen) + bool(sent) == 1
    return (seen[0] if seen else None), sent


KEYS = Keys([entry("alice", ALICE)])
NONE = Keys([])


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_schemes_name_is_read_in_any_case(scheme: str) -> None:
    headers = [(b"authorization", f"{scheme} {ALICE}".encode())]
    assert (await identify(KEYS, headers=headers))[0] == "alice"


@pytest.mark.parametrize("value", [b"Bearer ", b"Bearer  ", b"Bearer", b"Bearer \xff\xfe", b"Bearer\t", b" "])
async def test_odd_headers_are_refused(value: bytes) -> None:
    principal, sent = await identify(KEYS, headers=[(b"authorization", value)])
    assert principal is None
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost"])
async def test_without_keys_the_loopback_is_local(host: str) -> None:
    """As IPv6 spells IPv4 too, which a socket for both does."""
    assert (await identify(NONE, client=(host, 1)))[0] == "local"


@pytest.mark.parametrize(
    "host",
    ["192.0.2.1", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "2001:db8::1", "0.0.0.0", "::", "", "unknown", "a.b"],
)
async def test_without_keys_everything_else_is_refused(host: str) -> None:
    principal, sent = await identify(NONE, client=(host, 1))
    assert principal is None
    assert sent[0]["status"] == 401
    assert b"caravan keys" in sent[1]["body"]


async def test_without_keys_a_unix_socket_is_local_under_any_name() -> None:
    assert (await identify(NONE, client=None, headers=[(b"host", b"anything")]))[0] == "local"


@pytest.mark.parametrize("host", [b"localhost:8321", b"LOCALHOST", b"127.0.0.1:8321", b"[::1]:8321", b"app.localhost"])
async def test_without_keys_names_of_the_loopback_are_served(host: bytes) -> None:
    assert (await identify(NONE, headers=[(b"host", host)]))[0] == "local"


@pytest.mark.parametrize(
    "host", [b"page.example", b"localhost.page.example:8321", b"192.0.2.1", b"[::ffff:8.8.8.8]", b""]
)
async def test_without_keys_other_names_are_refused(host: bytes) -> None:
    assert (await identify(NONE, headers=[(b"host", host)]))[0] is None


async def test_with_keys_neither_address_nor_name_matters() -> None:
    headers = [(b"authorization", f"Bearer {ALICE}".encode()), (b"host", b"page.example"), (b"x-forwarded-for", b"a")]
    assert (await identify(KEYS, client=("192.0.2.1", 1), headers=headers))[0] == "alice"


@pytest.mark.parametrize("path", ["/v1/health", "/v1alpha/health", "/behind/v1/health"])
async def test_health_is_served_to_all_and_as_nobody(path: str) -> None:
    """With a root path too, which servers leave in the path."""
    for keys in (KEYS, NONE):
        principal, _ = await identify(keys, path=path, root_path="/behind", client=("192.0.2.1", 1))
        assert principal == "nobody"


@pytest.mark.parametrize(
    "path", ["/v1/health/", "/v1/health/x", "/v1/healthy", "/V1/health", "//v1/health", "/x/v1/health"]
)
async def test_nothing_else_passes_for_health(path: str) -> None:
    assert (await identify(KEYS, path=path))[0] is None


async def test_a_websocket_needs_a_key_like_any_request() -> None:
    principal, sent = await identify(KEYS, type="websocket", path="/v1/health")
    assert principal is None
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_the_lifespan_passes() -> None:
    assert (await identify(KEYS, type="lifespan"))[0] == "nobody"


def test_each_key_is_found_among_many() -> None:
    made = [(f"p{number % 3}", make_key()) for number in range(9)]
    keys = Keys([entry(*each) for each in made])
    assert [keys.principal(key.encode()) for _, key in made] == [principal for principal, _ in made]
    assert keys.principal(make_key().encode()) is None
    assert keys.principal(b"") is None
