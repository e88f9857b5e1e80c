"""Whose a Llama Stack resource is. llama_stack asks its policy at some doors only; the others are closed here.

Every resource, and every row of its SQL stores, is its principal's alone; to others it does not exist. What nobody owns
(the configuration's models and toolgroups) is everyone's to read and use, and only `local`'s to change. So are models,
whoever registered one, save that he may remove it: the names are the model server's, for all to use, and a private
entry would keep others from registering the one embedding model that there may be. What the original lets through, and
is replaced here:

- Rows of files are changed and deleted by their id alone, whoever asks.
- Vector stores, shields and the like are looked up without the policy when they are used, not only described.
- A tool is found by its name among everyone's, the last one listed first.
- Prompts have no owner. (File batches neither: `app.stack.vector_io`. Stored completions: `app.stack.library`.)
- A provider that cannot read a request's provider data logs them, keys of other providers included.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

from llama_stack.apis.common.errors import ResourceNotFoundError
from llama_stack.core.access_control.datatypes import AccessRule, Action, Scope
from llama_stack.core.datatypes import AuthenticationRequiredError, User
from llama_stack.core.request_headers import (
    PROVIDER_DATA_VAR,
    NeedsRequestProviderData,
    RequestProviderDataContext,
    get_authenticated_user,
)
from llama_stack.core.routers.vector_io import VectorIORouter
from llama_stack.core.routing_tables.benchmarks import BenchmarksRoutingTable
from llama_stack.core.routing_tables.common import CommonRoutingTableImpl
from llama_stack.core.routing_tables.datasets import DatasetsRoutingTable
from llama_stack.core.routing_tables.scoring_functions import ScoringFunctionsRoutingTable
from llama_stack.core.routing_tables.shields import ShieldsRoutingTable
from llama_stack.core.routing_tables.toolgroups import ToolGroupsRoutingTable, parse_toolgroup_from_toolgroup_name_pair
from llama_stack.core.routing_tables.vector_stores import VectorStoresRoutingTable
from llama_stack.core.utils.dynamic import instantiate_class_type
from llama_stack.providers.utils.kvstore.api import KVStore
from llama_stack.providers.utils.sqlstore.authorized_sqlstore import AuthorizedSqlStore
from pydantic import ValidationError

from app.identity import LOCAL_PRINCIPAL

log = logging.getLogger(__name__)

LIST_SECONDS = 10
"""For a toolgroup's list of tools, when one is called by its name alone."""

_OWNERS = "principals"
# llama_stack has no condition for "nobody owns it"; this one holds for that, and for one's own.
_OWN_OR_NOBODYS = f"user in owners {_OWNERS}"
POLICY = [
    AccessRule(permit=Scope(actions=[Action.CREATE])),
    AccessRule(permit=Scope(actions=list(Action)), when="user is owner"),
    AccessRule(permit=Scope(actions=[Action.READ]), when=_OWN_OR_NOBODYS),
    AccessRule(permit=Scope(actions=[Action.READ], resource="model::*")),
    AccessRule(permit=Scope(actions=list(Action), principal=LOCAL_PRINCIPAL), when=_OWN_OR_NOBODYS),
]

_KINDS: dict[type, str] = {
    ShieldsRoutingTable: "shield",
    VectorStoresRoutingTable: "vector_store",
    ToolGroupsRoutingTable: "tool_group",
    DatasetsRoutingTable: "dataset",
    ScoringFunctionsRoutingTable: "scoring_function",
    BenchmarksRoutingTable: "benchmark",
}
_CHANGES_OF_VECTOR_STORES = (
    "insert_chunks",
    "openai_update_vector_store",
    "openai_attach_file_to_vector_store",
    "openai_update_vector_store_file",
    "openai_delete_vector_store_file",
    "openai_create_vector_store_file_batch",
    "openai_cancel_vector_store_file_batch",
)


def attributes(principal: str) -> dict[str, list[str]]:
    """What `POLICY` compares of a principal; as ASGI's `user_attributes`, and stored with what it owns."""
    return {_OWNERS: [principal]}


def acting_as(principal: str, provider_data: Mapping[str, Any] = MappingProxyType({})) -> AbstractContextManager[Any]:
    """Whatever is asked of the stack inside is asked by this principal; tasks that are started inside too.

    `provider_data`: what its providers read of the request (`app.identity.secrets`).
    """
    user = User(principal, attributes(principal))
    manager: AbstractContextManager[Any] = RequestProviderDataContext(dict(provider_data), user)
    return manager


def acting_principal() -> str | None:
    """None: this process itself."""
    user = get_authenticated_user()
    return user.principal if user else None


def enforce() -> None:
    """Replace, once in a process, what llama_stack leaves open."""
    if CommonRoutingTableImpl.get_provider_impl is _provider_of:
        return
    CommonRoutingTableImpl.get_provider_impl = _provider_of
    ToolGroupsRoutingTable.get_provider_impl = _provider_of_tool
    ToolGroupsRoutingTable.get_tool = _tool
    ToolGroupsRoutingTable.unregister_toolgroup = _unregister_toolgroup
    NeedsRequestProviderData.get_request_provider_data = _provider_data
    for name in _CHANGES_OF_VECTOR_STORES:
        setattr(VectorIORouter, name, _changing(getattr(VectorIORouter, name)))
    AuthorizedSqlStore.fetch_all = _fetch_all
    AuthorizedSqlStore.update = _update
    AuthorizedSqlStore.delete = _delete


# --- what is registered -----------------------------------------------------------------------------------------------

_provider_of_anyones = CommonRoutingTableImpl.get_provider_impl
_unregister_toolgroup_only = ToolGroupsRoutingTable.unregister_toolgroup


async def _provider_of(self: Any, routing_key: str, provider_id: str | None = None) -> Any:
    """Raises ResourceNotFoundError: there is no such resource, or it is another's."""
    kind = _KINDS[type(self)]
    if await self.get_object_by_identifier(kind, routing_key) is None:
        name = kind.replace("_", " ").title()
        raise ResourceNotFoundError(routing_key, name, f"client.{kind}s.list()")
    return await _provider_of_anyones(self, routing_key, provider_id)


async def _provider_of_tool(self: Any, routing_key: str, provider_id: str | None = None) -> Any:
    """`routing_key`: a toolgroup, one of its tools (`group/tool`), or the name of a tool."""
    group = parse_toolgroup_from_toolgroup_name_pair(routing_key) or routing_key
    if await self.get_object_by_identifier("tool_group", group) is None:
        group = await _group_with(self, routing_key) or group
    return await _provider_of(self, group, provider_id)


async def _tool(self: Any, tool_name: str) -> Any:
    group = await _group_with(self, tool_name)
    if group is None:
        raise ResourceNotFoundError(tool_name, "Tool", "client.tools.list()")
    return next(tool for tool in self.toolgroups_to_tools[group] if tool.name == tool_name)


async def _group_with(table: Any, tool_name: str) -> str | None:
    """The toolgroup, of those that the principal sees, that offers this tool; its own before nobody's.

    llama_stack knows only the tools that this very process was asked to list. Raises AuthenticationRequiredError: an
    MCP server that may have it lets nobody see its tools without headers of the request.
    """
    groups = sorted(await table.get_all_with_type("tool_group"), key=lambda group: group.owner is None)
    names = [group.identifier for group in groups]
    if found := _offering(table, names, tool_name):
        return found
    listed = await asyncio.gather(*(_list(table, name) for name in names), return_exceptions=True)
    found = _offering(table, names, tool_name)
    if found is None and (refused := [error for error in listed if isinstance(error, AuthenticationRequiredError)]):
        raise refused[0]
    return found


async def _list(table: Any, group: str) -> None:
    async with asyncio.timeout(LIST_SECONDS):
        await table.list_tools(group)


def _offering(table: Any, groups: Sequence[str], tool_name: str) -> str | None:
    lists = ((group, table.toolgroups_to_tools.get(group, ())) for group in groups)
    return next((group for group, tools in lists if any(tool.name == tool_name for tool in tools)), None)


async def _unregister_toolgroup(self: Any, toolgroup_id: str) -> None:
    await _unregister_toolgroup_only(self, toolgroup_id)
    # The next group of this name may be another's, with another server.
    self.toolgroups_to_tools.pop(toolgroup_id, None)


def _changing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the router, whose first argument names the vector store that it changes."""

    @functools.wraps(method)
    async def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        store = args[0] if args else kwargs.get("vector_store_id") or kwargs["vector_db_id"]
        await _provider_of(self.routing_table, store)
        await self.routing_table.assert_action_allowed("update", "vector_store", store)
        return await method(self, *args, **kwargs)

    return checked


# --- rows of SQL stores -----------------------------------------------------------------------------------------------


async def _fetch_all(
    self: Any,
    table: str,
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
    order_by: Any = None,
    cursor: tuple[str, str] | None = None,
) -> Any:
    """The principal's rows. Raises ValueError: `cursor` names none of them."""
    if cursor and not (await _fetch_all(self, table, {cursor[0]: cursor[1]}, limit=1)).data:
        raise ValueError(f"Record with {cursor[0]}='{cursor[1]}' not found in table '{table}'")
    return await self.sql_store.fetch_all(
        table=table, where=where, where_sql=_own_rows(), limit=limit, order_by=order_by, cursor=cursor
    )


def _own_rows() -> str:
    """Rows without an owner were stored before there were principals, so they are the local one's."""
    principal = acting_principal() or ""
    owners = "'', 'local'" if principal == LOCAL_PRINCIPAL else f"'{principal}'"  # of the form settings.PRINCIPAL
    return f"coalesce(owner_principal, '') IN ({owners})"


async def _update(self: Any, table: str, data: Mapping[str, Any], where: Mapping[str, Any]) -> None:
    """Raises ResourceNotFoundError: the principal has no such row."""
    await _require(self, table, where)
    await self.sql_store.update(table, data, where)


async def _delete(self: Any, table: str, where: Mapping[str, Any]) -> None:
    """Raises ResourceNotFoundError: the principal has no such row."""
    await _require(self, table, where)
    await self.sql_store.delete(table, where)


async def _require(store: Any, table: str, where: Mapping[str, Any]) -> None:
    """Every change is of one row, by its primary key, so that what is seen here is what is changed."""
    if not (await _fetch_all(store, table, where, limit=1)).data:
        kind = table.removeprefix("openai_").rstrip("s").replace("_", " ").title()
        raise ResourceNotFoundError(str(next(iter(where.values()))), kind, f"client.{kind.lower()}s.list()")


# --- provider data ----------------------------------------------------------------------------------------------------


def _provider_data(self: Any) -> Any:
    """What this provider reads of the request's provider data; None: they are not for it, or there are none."""
    given = PROVIDER_DATA_VAR.get()
    validator = self.__provider_spec__.provider_data_validator
    if not validator:
        raise ValueError(f"Provider {self.__provider_spec__.provider_type} does not have a validator")
    try:
        return instantiate_class_type(validator)(**given) if given else None
    except ValidationError as error:
        # The error shows its input, which is everything that the request brought.
        fields = sorted({".".join(map(str, each["loc"][:1])) for each in error.errors()})
        log.debug("%s reads no provider data: %s", self.__provider_spec__.provider_type, ", ".join(fields))
        return None


# --- prompts ----------------------------------------------------------------------------------------------------------


class OwnKeys(KVStore):
    """A key-value store in which each principal sees keys of its own; the local one those without a principal."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @property
    def _prefix(self) -> str:
        principal = acting_principal()
        return "" if principal in (None, LOCAL_PRINCIPAL) else f"{principal}:"

    async def get(self, key: str) -> str | None:
        value: str | None = await self._store.get(self._prefix + key)
        return value

    async def set(self, key: str, value: str, expiration: Any = None) -> None:
        await self._store.set(self._prefix + key, value, expiration)

    async def delete(self, key: str) -> None:
        await self._store.delete(self._prefix + key)

    async def values_in_range(self, start_key: str, end_key: str) -> list[str]:
        values: list[str] = await self._store.values_in_range(self._prefix + start_key, self._prefix + end_key)
        return values

    async def keys_in_range(self, start_key: str, end_key: str) -> list[str]:
        keys = await self._store.keys_in_range(self._prefix + start_key, self._prefix + end_key)
        return [key.removeprefix(self._prefix) for key in keys]
