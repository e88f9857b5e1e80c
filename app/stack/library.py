"""Starts and stops llama_stack as a library on the running event loop, and holds every internal of it that we replace.

llama_stack's own ways to start do not fit: its server initializes the stack on a loop of another thread, to which
asyncpg's connections stay bound, and dumps its configuration; its library client takes over logging and starts every
API.

Postgres connections of a process, with our own configuration: the web process holds 1 (psycopg2: registry, prompts,
pgvector) and up to `DATABASE_POOL_SIZE` (asyncpg: files), opened as needed. A worker holds 1
(psycopg2) and no asyncpg pool. Each start takes one or two more for a moment.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any

import llama_stack.core.routers as routers
import llama_stack.log
import llama_stack.providers.inline.tool_runtime.rag.memory as rag
import llama_stack.providers.utils.inference.openai_mixin as openai_mixin
import llama_stack.providers.utils.inference.prompt_adapter as prompt_adapter
import llama_stack.providers.utils.kvstore.postgres as kvstore_postgres
import llama_stack.providers.utils.telemetry.trace_protocol as trace_protocol
from llama_stack.apis.tools import ToolGroup
from llama_stack.core.datatypes import Provider, StackRunConfig
from llama_stack.core.distribution import get_provider_registry
from llama_stack.core.resolver import resolve_impls
from llama_stack.core.routers.inference import InferenceRouter
from llama_stack.core.routing_tables.common import CommonRoutingTableImpl
from llama_stack.core.stack import (
    _initialize_storage,
    add_internal_implementations,
    refresh_registry_once,
    register_resources,
    validate_vector_stores_config,
)
from llama_stack.core.store.registry import create_dist_registry
from llama_stack.providers.datatypes import Api
from llama_stack.providers.remote.tool_runtime.model_context_protocol.model_context_protocol import (
    ModelContextProtocolToolRuntimeImpl,
)
from llama_stack.providers.utils.sqlstore.sqlalchemy_sqlstore import SqlAlchemySqlStoreImpl

from app.stack import access, fetching, postgres, registry
from app.stack.config import MODULE
from app.stack.fetching import Rules

log = logging.getLogger(__name__)

Impls = dict[Api, Any]
SHUTDOWN_SECONDS = 5.0


async def start(config: StackRunConfig, rules: Rules, *, whole: bool) -> Impls:
    """Start the stack on the running loop; one stack at a time in a process.

    `rules`: what llama_stack's own code may fetch. `whole`: with the APIs that only HTTP clients use (prompts, inspect,
    providers), and with a user's own inference store. Raises whatever a provider raises; nothing is left open then.
    """
    _prepare()
    _fetch_under(rules)
    try:
        return await _start(config, whole=whole)
    except BaseException:
        await postgres.close_connections()
        raise


async def stop(impls: Impls) -> None:
    """Shut every API down, each within 5 s, and close all connections; trouble is logged, never raised."""
    for api, impl in impls.items():
        if not hasattr(impl, "shutdown"):
            continue
        try:
            await asyncio.wait_for(impl.shutdown(), SHUTDOWN_SECONDS)
        except Exception:
            log.warning("Llama Stack's %s API did not shut down cleanly", api.value, exc_info=True)
    await postgres.close_connections()


async def _start(config: StackRunConfig, *, whole: bool) -> Impls:
    """What `llama_stack.core.stack.Stack.initialize` does, save for what the arguments leave out."""
    _initialize_storage(config)
    dist_registry, _ = await create_dist_registry(config.storage.stores.metadata, config.image_name)
    internal: Impls = {}
    if whole:
        add_internal_implementations(internal, _with_our_apis(config))
    with _inference_store_kept() if whole and not _is_ours(config) else _no_inference_store():
        impls: Impls = await resolve_impls(
            config, get_provider_registry(config), dist_registry, access.POLICY, internal
        )
    if whole:
        await impls[Api.prompts].initialize()
        impls[Api.prompts].kvstore = access.OwnKeys(impls[Api.prompts].kvstore)
        if impls[Api.inference].store:
            # The tasks that work its queue off would store everyone's completions as those of its first caller.
            impls[Api.inference].store.enable_write_queue = False
    registry.own_caches(impls)
    if _is_ours(config):
        await registry.give_way(config, impls)
    await register_resources(config, impls)
    await refresh_registry_once(impls)
    await registry.publish_models(config, impls)
    await validate_vector_stores_config(config.vector_stores, impls)
    if not config.telemetry.enabled:
        _untrace(impls)
    return impls


def _with_our_apis(config: StackRunConfig) -> StackRunConfig:
    """As clients are told of it: agents and responses are served, by us, and so `/v1/inspect/routes` lists them."""
    ours = [Provider(provider_id="caravan", provider_type="remote::caravan", config={})]
    return config.model_copy(update={"providers": {**config.providers, "agents": ours}})


def _is_ours(config: StackRunConfig) -> bool:
    return any(provider.module == MODULE for providers in config.providers.values() for provider in providers)


_stream_chat = InferenceRouter.stream_tokens_and_compute_metrics_openai_chat


def _prepare() -> None:
    """Replace, once in a process, what does not depend on a stack's configuration."""
    quiet_logging()
    access.enforce()
    # The original holds a connection for each store, blocks the loop with it, and never opens it again.
    kvstore_postgres.PostgresKVStoreImpl = postgres.KeyValueStore
    InferenceRouter.stream_tokens_and_compute_metrics_openai_chat = _closing_stream
    ModelContextProtocolToolRuntimeImpl.register_toolgroup = _require_endpoint
    # The original makes an engine for every table it creates, each of which leaves a connection open for good.
    if SqlAlchemySqlStoreImpl.create_engine.__module__ != postgres.__name__:
        SqlAlchemySqlStoreImpl.create_engine = postgres.shared_engine(SqlAlchemySqlStoreImpl.create_engine)


def _fetch_under(rules: Rules) -> None:
    """Replace what downloads whatever a user names: a document or an image of a user's own providers."""

    async def raw_data_from_doc(document: Any) -> tuple[bytes, str]:
        found = await fetching.fetch(document.content, document.mime_type, rules)
        return found.data, found.mime_type

    async def localize_image_content(uri: str) -> tuple[bytes, str]:
        found = await fetching.fetch_url(uri, rules)
        return found.data, found.mime_type.rpartition("/")[2]

    rag.raw_data_from_doc = raw_data_from_doc
    openai_mixin.localize_image_content = prompt_adapter.localize_image_content = localize_image_content


async def close_stream(stream: Any) -> None:
    """Hangs up on the model. The openai SDK's stream, which some providers hand out, has no `aclose`."""
    await (stream.aclose() if hasattr(stream, "aclose") else stream.close())


async def _closing_stream(
    self: InferenceRouter, response: AsyncIterator[Any], *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    # The original leaves the provider's stream to the garbage collector, and with it the connection.
    try:
        async with aclosing(_stream_chat(self, response, *args, **kwargs)) as chunks:
            async for chunk in chunks:
                yield chunk
    finally:
        await close_stream(response)


async def _require_endpoint(self: Any, toolgroup: ToolGroup) -> None:
    # The original takes any, and fails when the toolgroup is stored already.
    if toolgroup.mcp_endpoint is None:
        raise ValueError('mcp_endpoint is required, as {"uri": "https://…"}')


def quiet_logging() -> None:
    """Make llama_stack's loggers ordinary ones: the logger `llama_stack` decides for all of them, by default WARNING.

    llama_stack gives each of its loggers the level INFO. Its `setup_logging`, which replaces the handlers of the root
    and of uvicorn, is never called here.
    """
    for category in [*llama_stack.log.CATEGORIES, "root"]:
        llama_stack.log._category_levels[category] = logging.NOTSET
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("llama_stack."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    if logging.getLogger("llama_stack").level == logging.NOTSET:
        logging.getLogger("llama_stack").setLevel(logging.WARNING)


class _NoInferenceStore:
    """Takes the place of llama_stack's store of every completion; false, so that the router never asks it."""

    def __init__(self, reference: object, policy: object) -> None:
        pass

    async def initialize(self) -> None:
        pass

    def __bool__(self) -> bool:
        return False


@contextmanager
def _no_inference_store() -> Iterator[None]:
    # The router demands a store, and the store creates its table and writes each completion, which turns record anyway.
    original = routers.InferenceStore
    routers.InferenceStore = _NoInferenceStore
    try:
        yield
    finally:
        routers.InferenceStore = original


_inference_store_kept = nullcontext


def _untrace(impls: Impls) -> None:
    """Undo llama_stack's tracing of its own classes, where telemetry is off.

    The wrappers serialize all arguments of each call, such as a turn's whole history, even if nobody traces.
    """
    tables = [impl for impl in impls.values() if isinstance(impl, CommonRoutingTableImpl)]
    providers = [provider for table in tables for provider in table.impls_by_provider_id.values()]
    for cls in {cls for impl in [*impls.values(), *providers] for cls in type(impl).__mro__}:
        for name, function in list(vars(cls).items()):
            if inspect.isfunction(function) and function.__globals__ is vars(trace_protocol):
                setattr(cls, name, inspect.unwrap(function, stop=lambda f: f.__globals__ is not vars(trace_protocol)))
