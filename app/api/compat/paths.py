"""Older paths of routes that have others now."""

from __future__ import annotations

from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

_OPENAI = "/v1/openai/v1/"
_RENAMED = {"/v1/inspect/providers": "/v1/providers"}


def current_path(path: str) -> str:
    """`/v1/openai/v1/…` (0.2, and 0.3's deprecated routes) is `/v1/…`; `/v1/inspect/providers` (0.1.4 to 0.1.6) is
    `/v1/providers`."""
    if path.startswith(_OPENAI):
        path = "/v1/" + path.removeprefix(_OPENAI)
    return _RENAMED.get(path, path)


class CurrentPaths:
    """ASGI middleware: everything inside sees current paths only, be it routes, access checks or the registry."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = scope.get("root_path", "")  # of a proxy, if the server was told of one
            path = prefix + current_path(scope["path"].removeprefix(prefix))
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self.app(scope, receive, send)
