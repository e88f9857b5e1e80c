"""llama_stack's registry of models, tool groups, shields and vector stores: what is shared, what each process caches.

The registry is in Postgres; each process reads it once and then only sees its own changes. `refresh` reads it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from llama_stack.apis.models import ModelType
from llama_stack.apis.resource import ResourceType
from llama_stack.core.datatypes import (
    ModelWithOwner,
    Provider,
    RegistryEntrySource,
    RoutableObjectWithProvider,
    StackRunConfig,
)
from llama_stack.core.routing_tables.common import CommonRoutingTableImpl
from llama_stack.core.routing_tables.toolgroups import ToolGroupsRoutingTable
from llama_stack.core.store.registry import CachedDiskDistributionRegistry, _get_registry_key_range
from llama_stack.providers.datatypes import Api
from llama_stack.providers.remote.vector_io.pgvector.pgvector import PGVectorVectorIOAdapter
from pydantic import TypeAdapter, ValidationError

from app.stack.config import MODULE
from app.stack.vector_io import VectorStores

log = logging.getLogger(__name__)

_OBJECT: TypeAdapter[Any] = TypeAdapter(RoutableObjectWithProvider)


class ToolLists(dict[str, list[Any]]):
    """The tools of each group. A stale list is listed anew by whoever asks `in`, but still serves calls under way.

    An MCP server's is stale at once: it changes without our hearing of it, and may depend on who asks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stale: set[str] = set()

    def expire(self) -> None:
        self._stale.update(self)

    def __contains__(self, group: object) -> bool:
        return super().__contains__(group) and group not in self._stale

    def __setitem__(self, group: str, tools: list[Any]) -> None:
        super().__setitem__(group, tools)
        if not tools or any("endpoint" in (tool.metadata or ()) for tool in tools):
            self._stale.add(group)
        else:
            self._stale.discard(group)


def own_caches(impls: dict[Api, Any]) -> None:
    """Give a stack caches of its own: llama_stack keeps these on the classes, for all stacks of a process."""
    if models := impls.get(Api.models):
        models.listed_providers = set()
    if tool_groups := impls.get(Api.tool_groups):
        tool_groups.toolgroups_to_tools = ToolLists()
        tool_groups.tool_to_toolgroup = {}


async def refresh(impls: dict[Api, Any]) -> None:
    """Make what other processes registered usable here, and forget what they removed; safe while turns run.

    The new content takes the place of the old at once: a running turn never finds a gap. Raises psycopg2.Error if
    Postgres cannot be read; what was known stays then.
    """
    tables = [impl for impl in impls.values() if isinstance(impl, CommonRoutingTableImpl)]
    if tables:
        await _reload(tables[0].dist_registry)
    for table in tables:
        if isinstance(table, ToolGroupsRoutingTable):
            table.toolgroups_to_tools.expire()
        for provider in table.impls_by_provider_id.values():
            _forget(provider)


async def _reload(registry: CachedDiskDistributionRegistry) -> None:
    """What this process registers or removes meanwhile is newer than what is read."""
    before = dict(registry.cache)
    values = await registry.kvstore.values_in_range(*_get_registry_key_range())
    objects = [parsed for value in values if (parsed := _parse(value)) is not None]
    async with registry._cache_lock:
        read = {(parsed.type, parsed.identifier): parsed for parsed in objects}
        newer = {key: value for key, value in registry.cache.items() if before.get(key) is not value}
        removed = before.keys() - registry.cache.keys()
        registry.cache = {key: value for key, value in (read | newer).items() if key not in removed}


def _parse(value: str) -> Any:
    try:
        return _OBJECT.validate_json(value)
    except ValidationError as error:
        log.warning("Skipping an entry of the registry that this version cannot read: %s", error)
        return None


def _forget(provider: Any) -> None:
    if isinstance(provider, VectorStores):
        provider.forget()
    elif isinstance(provider, PGVectorVectorIOAdapter):
        provider.cache.clear()


async def publish_models(config: StackRunConfig, impls: dict[Api, Any]) -> None:
    """Make the settings' models and `MODEL_ALIASES` those of our two servers; those that clients registered stay.

    llama_stack's own way, `list_models`, first deletes all of a provider's models from Postgres and then enters them
    again: a worker that reads the registry in between would miss them. This one writes only what differs.
    """
    servers = [provider for provider in config.providers.get("inference", ()) if provider.module == MODULE]
    if not servers:
        return
    wanted = {model.identifier: model for server in servers for model in _models(server)}
    registry = impls[Api.models].dist_registry
    ids = {server.provider_id for server in servers}
    existing = {entry.identifier: entry for entry in await registry.get_all() if _is_of(entry, ids)}
    for identifier, model in wanted.items():
        entry = existing.get(identifier)
        # A model that a principal registered becomes everyone's.
        if entry is None or entry.owner is not None or _differs(entry, model):
            # `update` and not `register`: an entry of a provider that is no longer configured must give way.
            await registry.update(model)
    for identifier, entry in existing.items():
        if identifier not in wanted and entry.source == RegistryEntrySource.listed_from_provider:
            await registry.delete(ResourceType.model.value, identifier)


async def give_way(config: StackRunConfig, impls: dict[Api, Any]) -> None:
    """Removes what has the name of a toolgroup of our configuration and is another one: a principal's, or served by the
    provider that was configured before. llama_stack would not start."""
    if Api.tool_groups not in impls:
        return
    registry = impls[Api.tool_groups].dist_registry
    for group in config.registered_resources.tool_groups:
        entry = await registry.get(ResourceType.tool_group.value, group.toolgroup_id)
        if entry is not None and (entry.owner is not None or entry.provider_id != group.provider_id):
            await registry.delete(ResourceType.tool_group.value, group.toolgroup_id)


def _models(server: Provider) -> Iterator[ModelWithOwner]:
    """A server's models by the ids that clients see."""
    dimension = server.config.get("embedding_dimension")
    known = {model: model for model in server.config["models"]} | server.config.get("aliases", {})
    for identifier, model in known.items():
        yield ModelWithOwner(
            identifier=identifier,
            provider_resource_id=model,
            provider_id=server.provider_id,
            metadata={"embedding_dimension": dimension} if dimension else {},
            model_type=ModelType.embedding if dimension else ModelType.llm,
            source=RegistryEntrySource.listed_from_provider,
        )


def _differs(entry: ModelWithOwner, model: ModelWithOwner) -> bool:
    told = ("provider_id", "provider_resource_id", "model_type", "metadata")
    return any(getattr(entry, name) != getattr(model, name) for name in told)


def _is_of(entry: Any, providers: set[str]) -> bool:
    return entry.type == ResourceType.model.value and entry.provider_id in providers
