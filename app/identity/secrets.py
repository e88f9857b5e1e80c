"""What a request brings for its turn's tools, and nobody else may see: provider data, and headers for MCP servers.

Provider data are llama_stack's: a JSON object in the header `X-LlamaStack-Provider-Data`, of which each provider reads
the members that it knows (`tavily_search_api_key`, `mcp_headers`, …). They are sealed in the turn's row until it ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from app.domain.arguments import parsed
from app.domain.errors import InvalidRequest
from app.identity.sealing import Sealing

HEADER = "X-LlamaStack-Provider-Data"
MAX_BYTES = 32_768
HIDDEN = "[secret]"

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"([!-~]([ -~\t]*[!-~])?)?")
_NAMES_A_SECRET = re.compile(r"key|token|secret|password|credential|auth|cookie", re.IGNORECASE)
_HIDDEN_FROM = 8
"""Characters: what is shorter stands in too many texts by chance."""


def sendable(headers: Mapping[str, str]) -> bool:
    """Whether these can be sent as HTTP headers; a library that finds out later shows what it could not send."""
    return all(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value) for name, value in headers.items())


def provider_data(header: str | None) -> dict[str, Any]:
    """The header's members; those that are null or empty ask for nothing.

    Raises InvalidRequest, which shows nothing of the content.
    """
    if not header:
        return {}
    if len(header) > MAX_BYTES:
        raise InvalidRequest(f"{HEADER}: is over {MAX_BYTES} bytes", HEADER)
    try:
        given = parsed(header)
    except ValueError:
        raise InvalidRequest(f"{HEADER}: must be a JSON object, nested up to 200 deep", HEADER) from None
    members = told_members(given)
    for name, value in members.items():
        _check(name, value)
    return members


def told_members(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that ask for something, without the caller's name, which llama_stack keeps among them."""
    return {name: value for name, value in given.items() if value not in (None, "", {}) and name[:2] != "__"}


def _check(name: str, value: Any) -> None:
    if name == "mcp_headers":
        if not (isinstance(value, dict) and all(_is_url(url) and _are_headers(value[url]) for url in value)):
            raise InvalidRequest(
                f"{HEADER}: mcp_headers must be an object of headers by the URL of their MCP server: "
                '{"https://host/mcp": {"Authorization": "Bearer …"}}',
                HEADER,
            )
    elif name.endswith("_api_key") and not (isinstance(value, str) and _HEADER_VALUE.fullmatch(value)):
        raise InvalidRequest(f"{HEADER}: {name[:100]} must be a text that can be sent as a header", HEADER)


def _is_url(text: str) -> bool:
    try:
        return bool(_place(text)[0])
    except ValueError:
        return False


def _are_headers(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(value, str) for value in given.values()) and sendable(given)


@dataclass(frozen=True)
class Secrets:
    """Of one turn. `mcp_headers`: those of a response's MCP tools, by the label of their server."""

    provider_data: dict[str, Any] = field(default_factory=dict, repr=False)
    mcp_headers: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    def sealed(self, sealing: Sealing, turn_id: str) -> bytes | None:
        """None: there is nothing to seal. Raises InvalidRequest: there is no key to do it with."""
        given = {name: value for name, value in vars(self).items() if value}
        return sealing.seal(given, turn_id) if given else None

    @classmethod
    def opened(cls, sealing: Sealing, sealed: bytes | None, turn_id: str) -> Self:
        """Raises Unsealable."""
        return cls() if sealed is None else cls(**sealing.open(sealed, turn_id))

    def headers_of_server(self, url: str) -> dict[str, str]:
        """What provider data have for an MCP server: under its URL, whose scheme, query and fragment do not count, as
        in llama_stack."""
        found: dict[str, str] = {}
        for given, headers in self.provider_data.get("mcp_headers", {}).items():
            if _place(given) == _place(url):
                found |= headers
        return found

    def hide[Value](self, value: Value) -> Value:
        """A JSON value without what is secret here: a server may repeat a key that it was sent.

        Only what a name like `…_api_key` or `Authorization` tells to be secret: a tenant's name stands in honest
        answers too.
        """
        secret = sorted(set(_secret(vars(self))), key=len, reverse=True)
        hidden: Value = _without(value, secret) if secret else value
        return hidden


def _place(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.netloc, parts.path


def _secret(value: Any, *, named: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, member in value.items():
            is_url = "/" in name
            yield from _secret(member, named=named or not (is_url or _NAMES_A_SECRET.search(name) is None))
    elif isinstance(value, list):
        for member in value:
            yield from _secret(member, named=named)
    elif isinstance(value, str) and named:
        yield from (text for text in (value, value.rpartition(" ")[2]) if len(text) >= _HIDDEN_FROM)  # "Bearer …"


def _without(value: Any, secret: list[str]) -> Any:
    if isinstance(value, str):
        for text in secret:
            value = value.replace(text, HIDDEN)
        return value
    if isinstance(value, Mapping):
        return {_without(name, secret): _without(member, secret) for name, member in value.items()}
    if isinstance(value, list):
        return [_without(member, secret) for member in value]
    return value
