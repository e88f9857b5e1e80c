"""llama_stack's HTTP routes as an application to mount behind ours: everything of its API but agents,
responses, conversations and completions.

Its own `create_app` is not used: it reads a file, dumps the configuration to the log, takes over logging, refuses
clients of other versions, and initializes the stack on another loop (see `app.stack.library`). The routes and their
handlers are the original ones, save for those of older versions (`app.stack.vector_dbs`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import llama_stack.core.server.server as server
import psycopg2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from llama_stack.core.datatypes import StackRunConfig
from llama_stack.core.distribution import builtin_automatically_routed_apis
from llama_stack.core.external import load_external_apis
from llama_stack.core.server.routes import get_all_api_routes
from llama_stack.core.stack import refresh_registry_task
from llama_stack.providers.datatypes import Api
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.domain.error_bodies import error_body, invalid_body, is_openai
from app.domain.errors import InvalidRequest, Unavailable
from app.identity.secrets import HEADER, provider_data
from app.settings import Settings
from app.stack import access, completions, library, postgres, registry
from app.stack.config import stack_run_config
from app.stack.fetching import Rules
from app.stack.files import with_status
from app.stack.tool_requests import METHODS, NoAnswer, RunOnWorker, on_worker
from app.stack.vector_dbs import ROUTES as VECTOR_DB_ROUTES
from app.stack.vector_dbs import VectorDBs, with_known_provider

log = logging.getLogger(__name__)

KeepCurrent = Callable[[], Awaitable[None]]
RegistryHook = Callable[[], Awaitable[None] | None]

_OURS = re.compile(r"/v1(alpha)?/(openai/v1/)?(agents|responses|conversations)(/|$)")
_OUR_POSTS = re.compile(r"/v1/(openai/v1/)?(chat/completions|completions|embeddings)$")
_REGISTRY = re.compile(
    r"/v1(alpha|beta)?/(openai/v1/)?(eval/)?"
    r"(?P<noun>models|toolgroups|shields|vector-dbs|vector_dbs|vector_stores|scoring-functions|benchmarks|datasets)"
    r"(/(?P<rest>.*))?$"
)
# A search is a POST below a vector store, and a file below it changes its content, which is not cached.
_CONTENT = re.compile(r"[^/]+/(search|files|file_batches)(/|$)")
_NEEDS_NO_REGISTRY = re.compile(r"/v1/(health|version|inspect|providers|files|prompts)(/|$)")
_ALWAYS_SERVED = {"inspect", "providers", "prompts"}


class StackApp(FastAPI):
    """llama_stack's routes. Has none, and answers 404, until `stack_lifespan` has started the stack."""

    def __init__(
        self, settings: Settings, on_registry_change: RegistryHook | None, keep_current: KeepCurrent | None
    ) -> None:
        super().__init__(title="Llama Stack", docs_url=None, redoc_url=None, openapi_url=None)
        self._keep_current = keep_current
        self.settings = settings
        self.impls: library.Impls = {}
        self.add_exception_handler(RequestValidationError, _failed)
        self.add_exception_handler(HTTPException, _refused)
        self.add_exception_handler(Exception, _failed)
        if on_registry_change is not None:
            self.add_middleware(RegistryChanges, on_change=on_registry_change)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if principal := scope.get("principal"):
            scope["user_attributes"] = access.attributes(principal)
        if scope["type"] == "http":
            try:
                provider_data(Headers(scope=scope).get(HEADER))  # of which llama_stack takes anything
            except InvalidRequest as error:
                await JSONResponse(_body(scope["path"], 400, str(error)), 400)(scope, receive, send)
                return
            if not _NEEDS_NO_REGISTRY.match(scope["path"]):
                await self._see_changes()
        await super().__call__(scope, receive, send)

    async def _see_changes(self) -> None:
        """What other web processes registered or removed: clients do not know which of them they talk to."""
        if self._keep_current is None:
            return
        try:
            await self._keep_current()
        except Exception as error:
            log.warning("the Llama Stack's registry cannot be read, this request goes by what was known: %s", error)

    async def complete(
        self, endpoint: completions.Endpoint, body: completions.JSON, *, principal: str, headers: Mapping[str, str]
    ) -> bytes | completions.Begun:
        """A completion or embeddings (`app.stack.completions.ask`)."""
        if await self.impls[Api.models].get_object_by_identifier("model", str(body.get("model"))) is None:
            await self._see_changes()
        return await completions.ask(self.impls, endpoint, body, principal=principal, headers=headers)

    async def missing_shields(self, names: Sequence[str], principal: str) -> list[str]:
        """Those that are not registered, or are another's; what another process has just registered is there.

        Raises Unavailable: Postgres cannot be read.
        """
        missing = await self._missing_shields(names, principal)
        if missing and Api.shields in self.impls:
            try:
                await self.refresh_registry()
            except psycopg2.Error as error:
                raise Unavailable("Postgres cannot be reached (DATABASE_URL)") from error
            missing = await self._missing_shields(names, principal)
        return missing

    async def _missing_shields(self, names: Sequence[str], principal: str) -> list[str]:
        table = self.impls.get(Api.shields)
        if table is None:
            return list(names)
        with access.acting_as(principal):
            return [name for name in names if await table.get_object_by_identifier("shield", name) is None]

    async def refresh_registry(self) -> None:
        """See what other processes registered or removed (`app.stack.registry.refresh`)."""
        await registry.refresh(self.impls)


def create_stack_app(
    settings: Settings, on_registry_change: RegistryHook | None = None, keep_current: KeepCurrent | None = None
) -> StackApp:
    """The application to mount; touches no network. Enter `stack_lifespan` on the loop that serves it.

    `on_registry_change` is called, and awaited, after a request has changed what is registered and before the client
    hears of it. If it raises, that is logged and the client still gets its answer. `keep_current` is awaited before a
    request that may use what is registered; it calls `refresh_registry` if others have changed that.
    """
    return StackApp(settings, on_registry_change, keep_current)


@asynccontextmanager
async def stack_lifespan(app: StackApp, run_on_worker: RunOnWorker | None = None) -> AsyncIterator[None]:
    """Runs the stack behind `app` on the running loop. Raises SettingsError, or what a provider raises on its start.

    `run_on_worker` calls the tool runtime's methods; without it, they are called here.
    """
    config = await asyncio.to_thread(stack_run_config, app.settings)
    # Never llama_stack's: it formats every request body for a debug message, whether or not that is logged.
    server.log_request_pre_validation = _log_nothing
    parameters = postgres.libpq_parameters(app.settings.sqlalchemy_url)
    lock = postgres.tables_lock(parameters)
    await asyncio.to_thread(lock.__enter__)
    try:
        app.impls = await library.start(config, Rules.of(app.settings), whole=True)
    finally:
        await asyncio.to_thread(lock.__exit__, None, None, None)
    try:
        app.router.routes[:] = []
        for method, path, api, name in routes(config, app.impls):
            implementation = getattr(app.impls[api], name)
            if api == Api.files:
                implementation = with_status(implementation)
            if api == Api.tool_runtime and name in METHODS and run_on_worker is not None:
                implementation = on_worker(implementation, name, run_on_worker)
            if name == "openai_create_vector_store":
                implementation = with_known_provider(implementation, app.impls[Api.vector_stores])
            _add_route(app, method, path, implementation)
        if Api.vector_io in app.impls:
            vector_dbs = VectorDBs(app.impls[Api.vector_io], lambda: postgres.tables_lock(parameters))
            for method, path, name in VECTOR_DB_ROUTES:
                _add_route(app, method, path, getattr(vector_dbs, name))
        async with _model_listing(app):
            yield
    finally:
        await library.stop(app.impls)


@asynccontextmanager
async def _model_listing(app: StackApp) -> AsyncIterator[None]:
    """Lists the models of a user's own providers every 5 minutes, as llama_stack's server does; ours are fixed."""
    if not app.settings.llama_stack_config:
        yield
        return
    listing = asyncio.create_task(refresh_registry_task(app.impls))
    try:
        yield
    finally:
        listing.cancel()
        with suppress(asyncio.CancelledError):
            await listing


def routes(config: StackRunConfig, impls: library.Impls) -> Iterator[tuple[str, str, Api, str]]:
    """Every route to serve, in the order in which they are to be matched: method, path, API and name of its method.

    `impls`: of which only the keys matter, and these only if the configuration names no APIs.
    """
    all_routes = get_all_api_routes(load_external_apis(config))
    for api in sorted(_served(config, impls), key=lambda api: api.value):
        for route, _ in all_routes[api]:
            method = next(method for method in route.methods if method != "HEAD").lower()
            if _OURS.match(route.path) or (method == "post" and _OUR_POSTS.match(route.path)):
                continue
            yield method, route.path, api, route.name


def _served(config: StackRunConfig, impls: library.Impls) -> set[Api]:
    names = set(config.apis) or {api.value for api in impls}
    for routed in builtin_automatically_routed_apis():
        if routed.router_api.value in names:
            names.add(routed.routing_table_api.value)
    return {Api(name) for name in names | _ALWAYS_SERVED}


def _add_route(app: FastAPI, method: str, path: str, implementation: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="pydantic._internal._fields")
        handler = server.create_dynamic_typed_route(implementation, method, path)
        app.add_api_route(path, handler, methods=[method.upper()], response_model=None)


async def _log_nothing(request: Request) -> None:
    pass


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """llama_stack's error body, without its printing of a traceback for every wrong request."""
    path = request.url.path
    if isinstance(error, RequestValidationError):
        return JSONResponse(invalid_body(path, error.errors(), error.body), 400)
    translated = server.translate_exception(error)
    status = translated.status_code
    if status >= 500:
        log.error("%s %s failed", request.method, path, exc_info=error)
    body = error_body(path, status, translated.detail) if is_openai(path) else {"error": {"detail": translated.detail}}
    return JSONResponse(body, status)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's error body. A path that names nothing, or something of another's, is 404; llama_stack often has 400."""
    assert isinstance(error, HTTPException)
    status, detail = error.status_code, error.detail
    cause = error.__cause__
    named = [str(value) for value in request.path_params.values()]
    if type(cause) is ValueError and "not found" in str(cause) and any(name in str(cause) for name in named):
        status, detail = 404, str(cause)
    if isinstance(cause, NoAnswer):
        return JSONResponse(_body(request.url.path, status, cause.detail), status, cause.headers)
    return JSONResponse(_body(request.url.path, status, detail), status, error.headers)


def _body(path: str, status: int, detail: Any) -> dict[str, Any]:
    """`detail` is a text, or what llama_stack makes of a ValidationError: `{"errors": [{"loc", "msg", "type"}]}`."""
    if not is_openai(path):
        return {"detail": detail}
    if isinstance(detail, dict):
        return invalid_body(path, detail["errors"], None)
    return error_body(path, status, str(detail))


class RegistryChanges:
    """ASGI middleware: calls the hook when a request has changed the registry, before its answer begins."""

    def __init__(self, app: ASGIApp, on_change: RegistryHook) -> None:
        self.app = app
        self.on_change = on_change

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not changes_registry(scope["method"], _path(scope)):
            await self.app(scope, receive, send)
            return

        async def send_after_hook(message: Message) -> None:
            if message["type"] == "http.response.start" and 200 <= message["status"] < 300:
                await self._tell()
            await send(message)

        await self.app(scope, receive, send_after_hook)

    async def _tell(self) -> None:
        try:
            told = self.on_change()
            if inspect.isawaitable(told):
                await told
        except Exception:
            log.exception("Workers could not be told of a change of the registry")


def _path(scope: Scope) -> str:
    """Without the prefix of a proxy, if the server was told of one."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def changes_registry(method: str, path: str) -> bool:
    """Whether a request of this method to this path changes what is registered, if it succeeds."""
    found = _REGISTRY.match(path)
    if not found or method in ("GET", "HEAD", "OPTIONS"):
        return False
    return not (found["noun"].startswith("vector") and _CONTENT.match(found["rest"] or ""))
