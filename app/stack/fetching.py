"""A document's or image's bytes, from inline content, a `data:` URL, or an http(s) URL: the one way to what users name.

An http(s) URL is a request that somebody else has this process make, so: only public addresses, save those that
`FETCH_ALLOWED` names, checked once the name is resolved and for each redirect anew, and the connection goes to the very
address that was checked; no proxy of the environment (it would resolve the name itself), no cookies; limits on bytes
(as sent and decompressed), time and redirects. Of a URL only scheme, host and path are told: the rest may be secret.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import mimetypes
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Self
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from llama_stack.apis.common.content_types import URL, ImageContentItem, TextContentItem
from yarl import URL as HTTPURL

from app.settings import Settings

TOTAL_SECONDS = 30.0
MAX_REDIRECTS = 5
NAME_BYTES = 200
"""A folder's files may have 255, and a number may come behind."""

UNKNOWN_TYPE = "application/octet-stream"

_GENERIC_TYPES = frozenset({"", UNKNOWN_TYPE, "binary/octet-stream", "application/x-unknown"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_URL_ALONE = re.compile(r"\s*(https?://\S+|data:[^\s,]*,.*)\s*", re.IGNORECASE | re.DOTALL)
_NO_BRACKETS = str.maketrans("", "", "[]")
_UNSAFE = re.compile(r"[^\w.@+ -]")

# Of their own: a name server of somebody else's may keep them waiting, and everything uses the loop's threads.
_NAMES = ThreadPoolExecutor(4, "names")

# Not for everyone to reach, though `is_global` says so of some: they stand for an IPv4 address, or for a site's own.
_STAND_INS = [
    ipaddress.ip_network(text)
    for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10", "192.88.99.0/24")
]

# What systems leave out of their tables.
_TYPES = {
    ".csv": "text/csv",
    ".htm": "text/html",
    ".html": "text/html",
    ".json": "application/json",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".rst": "text/x-rst",
    ".txt": "text/plain",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
_EXTENSIONS = {"application/yaml": ".yaml", "text/yaml": ".yaml", "text/markdown": ".md", "text/plain": ".txt"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class FetchError(ValueError):
    """It cannot be had. The message is for the user, and names no secret of the URL."""


@dataclass(frozen=True)
class Rules:
    """What may be fetched: `hosts` as `name` or `name:port`, and `networks`, beside all public addresses; and how much
    of it."""

    max_bytes: int
    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls.allowing(settings.fetch_allowed, settings.document_max_bytes)

    @classmethod
    def allowing(cls, entries: Sequence[str], max_bytes: int) -> Self:
        """`entries`: as in `FETCH_ALLOWED`."""
        networks = [network for entry in entries if (network := _network(entry))]
        hosts = frozenset(entry.lower().translate(_NO_BRACKETS) for entry in entries if _network(entry) is None)
        return cls(max_bytes, hosts, tuple(networks))

    def allows_host(self, url: HTTPURL) -> bool:
        host = (url.host or "").lower()
        return host in self.hosts or f"{host}:{url.port}" in self.hosts

    def allows_address(self, text: str) -> bool:
        address = _address(text)
        return _public(address) or any(address in network for network in self.networks)


@dataclass(frozen=True)
class Fetched:
    """`mime_type` is without parameters, `application/octet-stream` where nobody knows it; `name` is that of a file,
    without folders."""

    data: bytes
    mime_type: str
    name: str
    charset: str | None = None


async def fetch(content: Any, mime_type: str | None, rules: Rules, *, name: str | None = None) -> Fetched:
    """The bytes of a document's `content` (llama_stack's `InterleavedContent | URL`).

    A text that is nothing but a URL counts as one. `mime_type`: what the client says it is, which holds unless it says
    nothing (`application/octet-stream`, say); then the server's word for it, or the name's. Raises FetchError.
    """
    found = await _content(content, rules)
    if len(found.data) > rules.max_bytes:
        raise _too_large(rules)
    kind, charset = _parsed_type(mime_type)
    name = name or found.name
    kinds = (kind, found.mime_type, mime_type_by_name(name))
    kind = next((one for one in kinds if one not in _GENERIC_TYPES), UNKNOWN_TYPE)
    return Fetched(found.data, kind, _file_name(name, kind), charset or found.charset)


async def fetch_url(url: str, rules: Rules) -> Fetched:
    """What a `data:` or http(s) URL names, of whatever type it says. Raises FetchError."""
    return await fetch(URL(uri=url), None, rules)


async def _content(content: Any, rules: Rules) -> Fetched:
    if isinstance(content, URL):
        return await _url(content.uri, rules)
    if isinstance(content, ImageContentItem):
        image = content.image
        return await _url(image.url.uri, rules) if image.url else Fetched(_base64(image.data or ""), "image/png", "")
    text = _text(content)
    if _URL_ALONE.fullmatch(text):
        return await _url(text.strip(), rules)
    return Fetched(text.encode(errors="replace"), "text/plain", "", "utf-8")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, TextContentItem):
        return str(content.text)
    if isinstance(content, list):
        return "\n".join(map(_text, content))
    raise FetchError(f"a document cannot be made of {type(content).__name__}")


async def _url(url: str, rules: Rules) -> Fetched:
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _data_url(url, rules)
    if scheme in ("http", "https"):
        return await _download(url, rules)
    raise FetchError(f"URLs must be http, https or data, not {scheme[:20]!r}")


# --- data URLs --------------------------------------------------------------------------------------------------------


def _data_url(url: str, rules: Rules) -> Fetched:
    """RFC 2397, with `name=` among the parameters as some programs write it."""
    head, comma, data = url[5:].partition(",")
    if not comma:
        raise FetchError("a data: URL has a comma before its data")
    if len(data) > rules.max_bytes * 4:  # base64 takes 4/3 of its bytes, a percent-encoded byte 3
        raise _too_large(rules)
    kind, *parameters = [part.strip() for part in head.split(";")]
    encoded = any(part.lower() == "base64" for part in parameters)
    named = {key.lower(): value for key, _, value in (part.partition("=") for part in parameters)}
    raw = unquote_to_bytes(data)
    return Fetched(
        _base64(raw) if encoded else raw,
        kind.lower() or "text/plain",
        unquote_to_bytes(named.get("name") or named.get("filename", "")).decode(errors="replace"),
        named.get("charset"),
    )


def _base64(data: bytes | str) -> bytes:
    try:
        return base64.b64decode(data)
    except (binascii.Error, ValueError) as error:
        raise FetchError(f"its base64 is broken: {error}") from error


# --- http(s) URLs -----------------------------------------------------------------------------------------------------


async def _download(text: str, rules: Rules) -> Fetched:
    try:
        url = HTTPURL(text)
        async with asyncio.timeout(TOTAL_SECONDS), _session(rules) as session:
            return await _follow(session, url, rules)
    except TimeoutError as error:
        raise FetchError(f"{_shown(text)} was not had within {TOTAL_SECONDS:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise FetchError(f"{_shown(text)} cannot be fetched: {_reason(error)}") from error
    except FetchError:
        raise
    except (ValueError, zlib.error) as error:
        raise FetchError(f"{_shown(text)} cannot be fetched: {type(error).__name__}") from error


@asynccontextmanager
async def _session(rules: Rules) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(resolver=_Checked(rules), use_dns_cache=False, force_close=True, ssl=_tls())
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # it knows no limit
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "caravan"},
    ) as session:
        yield session


def _tls() -> ssl.SSLContext | bool:
    """What certificates are checked by: the system's authorities."""
    return True


async def _follow(session: aiohttp.ClientSession, url: HTTPURL, rules: Rules) -> Fetched:
    asked = url
    for _ in range(MAX_REDIRECTS + 1):
        _check_url(url, rules)
        async with session.get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                url = url.join(HTTPURL(location))
                continue
            if not response.ok:
                raise FetchError(f"{_shown(asked)} answered with status {response.status}")
            kind, charset = _parsed_type(response.headers.get("Content-Type"))
            return Fetched(await _body(response, rules), kind, asked.name, charset)
    raise FetchError(f"{_shown(asked)} has more than {MAX_REDIRECTS} redirects")


def _check_url(url: HTTPURL, rules: Rules) -> None:
    """What the resolver never gets to see: redirects to other schemes, and hosts that are addresses already."""
    if url.scheme not in ("http", "https") or not url.host:
        raise FetchError(f"{_shown(url)} is no http(s) URL")
    try:
        address = str(ipaddress.ip_address(url.host.partition("%")[0]))
    except ValueError:
        return
    if not rules.allows_host(url) and not rules.allows_address(address):
        raise _refused(url.host)


class _Checked(AbstractResolver):
    """Resolves a name once, for the connection that is about to be made, and only if every address of it is allowed."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        look_up = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(_NAMES, look_up)
        known = self._rules.allows_host(HTTPURL.build(scheme="http", host=host, port=port))
        for *_, sockaddr in found:
            if not known and not self._rules.allows_address(str(sockaddr[0])):
                raise _refused(host)
        return [
            ResolveResult(
                hostname=host, host=str(sockaddr[0]), port=port, family=family, proto=proto, flags=socket.AI_NUMERICHOST
            )
            for family, _, proto, _, sockaddr in found
        ]

    async def close(self) -> None:
        pass


async def _body(response: aiohttp.ClientResponse, rules: Rules) -> bytes:
    """Read to its end, or to the limit; decompressed under the same limit."""
    inflate = _inflate(response.headers)
    body = bytearray()
    async for block in response.content.iter_any():
        body += block if inflate is None else inflate.decompress(block, rules.max_bytes + 1 - len(body))
        if len(body) > rules.max_bytes:
            raise _too_large(rules)
    if inflate is not None and not inflate.eof:
        raise FetchError("its compressed content is cut off, or not compressed as it says")
    return bytes(body)


def _inflate(headers: Mapping[str, str]) -> Any:
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError(f"it is compressed with {encoding[:20]}, which was not asked for")
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib's or gzip's header, whichever is there


def _reason(error: Exception) -> str:
    """Without the URL, which some of these repeat."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its host is not known"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not valid for it"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"there is no connection to {error.host}:{error.port}"
    return type(error).__name__


def _shown(url: HTTPURL | str) -> str:
    """Without user, password, query and fragment."""
    try:
        parsed = HTTPURL(url)
        return str(parsed.with_user(None).with_query(None).with_fragment(None))[:300]
    except ValueError:
        return "the URL"


# --- rules, types, names ----------------------------------------------------------------------------------------------


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None


def _address(text: str) -> Address:
    """IPv4 in IPv6's clothes as what it is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _public(address: Address) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in _STAND_INS)


def _refused(host: str) -> FetchError:
    return FetchError(f"{host} is not a public address, and not among those of FETCH_ALLOWED")


def _too_large(rules: Rules) -> FetchError:
    return FetchError(f"it is over {rules.max_bytes} bytes (DOCUMENT_MAX_BYTES)")


def _parsed_type(text: str | None) -> tuple[str, str | None]:
    """The type, in small letters, and the charset of a Content-Type header."""
    kind, *parameters = (text or "").split(";")
    named = {key.strip().lower(): value.strip("\"' ") for key, _, value in (part.partition("=") for part in parameters)}
    return kind.strip().lower(), named.get("charset")


def mime_type_by_name(name: str) -> str:
    """`application/octet-stream` where nothing is known."""
    extension = PurePosixPath(name).suffix.lower()
    return _TYPES.get(extension) or mimetypes.guess_type(name)[0] or UNKNOWN_TYPE


def _file_name(name: str, mime_type: str) -> str:
    """A name for a file without folders, control characters or a leading dot; by its type where there is none."""
    safe = _UNSAFE.sub("_", name.replace("\\", "/").rpartition("/")[2]).encode()[-NAME_BYTES:]
    if text := safe.decode(errors="ignore").strip(". "):
        return text
    return f"document{_EXTENSIONS.get(mime_type) or mimetypes.guess_extension(mime_type) or ''}"
