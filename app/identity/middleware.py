"""Names the principal of each request, or refuses it. Pure ASGI, so that streams pass untouched."""

from __future__ import annotations

import ipaddress

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.domain.error_bodies import error_body
from app.identity.keys import LOCAL_PRINCIPAL, Keys

HEALTH = frozenset({"/v1/health", "/v1alpha/health"})

MISSING = "No API key: send the header 'Authorization: Bearer <key>' (llama-stack-client: api_key)"
UNKNOWN = "This API key is not known here"
BEYOND = (
    "Without API_KEYS only direct requests from this machine, to localhost, are served. To allow others, "
    "make a key with `caravan keys NAME`, put its entry into API_KEYS, and restart"
)


class Identification:
    """Sets `scope["principal"]`: whom the key names; without any keys, `local` for callers on this machine."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = None if _is_health(scope) else self._identify(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = error_body(scope["path"], 401, refusal)
            response = JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)

    def _identify(self, scope: Scope) -> str | None:
        """Why the request is refused; None if it is not."""
        if not self.keys:
            scope["principal"] = LOCAL_PRINCIPAL
            return None if is_local(scope) else BEYOND
        key = _bearer(_header(scope, b"authorization"))
        if key is None:
            return MISSING
        scope["principal"] = self.keys.principal(key)
        return None if scope["principal"] else UNKNOWN


def is_local(scope: Scope) -> bool:
    """Whether a request was made on this machine, and not by a web page of somewhere else.

    What a proxy passes on is never local: its client's address is only what a header says, and uvicorn believes that
    header from anyone if told to (`FORWARDED_ALLOW_IPS=*`). The host is compared because a browser here can be led to
    us under a name of the attacker's (DNS rebinding), and then his page reads the answers.
    """
    if scope.get("client") is None:  # a Unix socket
        return True
    if _header(scope, b"x-forwarded-for") is not None or _header(scope, b"forwarded") is not None:
        return False
    return is_loopback(scope["client"][0]) and is_loopback(_host(_header(scope, b"host")))


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1, either in IPv6's spelling of IPv4, and the names that mean them."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _host(header: bytes | None) -> str:
    """The host of a Host header, without its port; only browsers matter here, and they always send one."""
    if header is None:
        return "localhost"
    host = header.decode("latin-1").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _bearer(header: bytes | None) -> bytes | None:
    scheme, _, key = (header or b"").partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _is_health(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["type"] == "http" and path.removeprefix(scope.get("root_path", "")) in HEALTH
