"""Builds the web application: lifespan, middleware, our routes, and the Llama Stack's own routes behind them."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app.api import agents, attachments, conversations, documentation, errors, inference, responses, sessions, turns
from app.api.compat import inference as compat_inference
from app.api.compat import models, tools, vectors
from app.api.compat.paths import CurrentPaths
from app.api.service import Service, StoreRecords
from app.api.shutdown import GracefulStop, Requests
from app.api.tool_requests import ToolRequests
from app.dispatch import Doorbell
from app.domain.errors import Unavailable
from app.endings import Endings
from app.events.follow import Relay
from app.events.log import EventLog, SyncLog
from app.identity import Identification, Keys
from app.settings import Settings, SettingsError
from app.stack.config import stack_run_config
from app.stack.mounted import StackApp, create_stack_app, stack_lifespan
from app.store import Store, migrate, workers
from app.telemetry import settle_memory
from app.upkeep import Upkeep

logger = logging.getLogger(__name__)


def create_main(settings: Settings) -> FastAPI:
    """The application that `uvicorn app:main` serves. Exits with one line if Postgres or its schema is missing."""
    try:
        migrate.require_head(settings.sqlalchemy_url)
        stack_run_config(settings)
    except (SettingsError, Unavailable) as error:
        sys.exit(f"caravan: {error}")
    return create_app(settings)


def create_app(settings: Settings) -> FastAPI:
    """The application for given settings; the lifespan opens and closes everything."""
    store = Store(settings.sqlalchemy_url, pool_size=settings.database_pool_size, name="web")

    async def registry_changed() -> None:
        await store.run(workers.bump_registry_version)

    stack = create_stack_app(settings, registry_changed, lambda: registry.keep_current())
    registry = _Registry(store, stack)
    stop = GracefulStop(settings.web_grace_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as opened:
            app.state.service = service = await _open(settings, store, opened)
            tools = ToolRequests(service)
            opened.push_async_callback(tools.close)
            await opened.enter_async_context(stack_lifespan(stack, tools.run))
            settle_memory()
            with stop.on_signals():
                yield

    app = FastAPI(
        title="Caravan",
        version=version("caravan-agents"),
        lifespan=lifespan,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    documentation.install(app)
    for prefix in ("/v1", "/v1alpha"):
        for module in (agents, sessions, turns, attachments):
            app.include_router(
                module.router,
                prefix=prefix,
                include_in_schema=prefix == "/v1alpha",
                max_body_size=settings.request_max_bytes,
            )
    for module in (conversations, inference, responses):
        app.include_router(module.router, prefix="/v1", max_body_size=settings.request_max_bytes)
    # As the Llama Stack's own routes, which they stand for, these are not described.
    for module in (models, tools, compat_inference):
        app.include_router(
            module.router, prefix="/v1", include_in_schema=False, max_body_size=settings.request_max_bytes
        )
    # Documents have no limit of their own there; requests to the tool runtime do (app.api.tool_requests).
    app.include_router(vectors.router, prefix="/v1", include_in_schema=False)
    app.add_middleware(CurrentPaths)
    errors.install(app, settings.request_max_bytes)
    app.add_middleware(Identification, keys=Keys(settings.api_keys))
    app.add_middleware(Requests, stop=stop)
    # Added last, so asked first: a browser's preflight brings no key, and it may read why it was refused.
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Location", "Retry-After", "X-Should-Retry", "X-Turn-Id", "X-Turn-Status"],
        )
    app.state.stack = stack
    app.mount("/", stack)
    return app


class _Registry:
    """Makes what clients registered through other web processes known to this one, before a request that may use it."""

    def __init__(self, store: Store, stack: StackApp) -> None:
        self._store = store
        self._stack = stack
        self._seen: int | None = None
        self._lock = asyncio.Lock()

    async def keep_current(self) -> None:
        """Raises what Postgres's failure raises: what was known stays."""
        version = await self._store.run(workers.registry_version_now)
        async with self._lock:
            if version != self._seen:
                await self._stack.refresh_registry()
                self._seen = version


async def _open(settings: Settings, store: Store, opened: AsyncExitStack) -> Service:
    opened.callback(store.close)
    log = EventLog(settings.redis_url.get_secret_value())
    opened.push_async_callback(log.close)
    sync_log = SyncLog(settings.redis_url.get_secret_value())
    opened.callback(sync_log.close)
    doorbell = Doorbell()
    opened.callback(doorbell.close)
    upkeep_store = Store(
        settings.sqlalchemy_url, pool_size=1, name="web-upkeep", transaction_seconds=Upkeep.TRANSACTION_SECONDS
    )
    opened.callback(upkeep_store.close)
    upkeep = Upkeep(settings, Endings(upkeep_store, sync_log, doorbell))
    upkeep.start()
    opened.callback(upkeep.stop)
    relay = await opened.enter_async_context(
        Relay(
            log,
            StoreRecords(store),
            silence_seconds=settings.silence_seconds,
            buffer_bytes=settings.stream_buffer_bytes,
        )
    )
    return Service(settings, store, relay, doorbell, Endings(store, sync_log, doorbell))
