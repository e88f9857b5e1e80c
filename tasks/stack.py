"""Llama Stack as a library in a worker: starts it on the worker's loop and hands out its APIs.

A worker has no agents, conversations or files API. It holds one Postgres connection for the stack (psycopg2, used in
threads: registry and pgvector) and no pool; see `app.stack.library` for the web process.
"""

from __future__ import annotations

import asyncio
from typing import Any, Self

from llama_stack.apis.models import ModelType
from llama_stack.apis.tools import ToolInvocationResult
from llama_stack.providers.datatypes import Api

from app.settings import Settings
from app.stack import library, registry
from app.stack.config import stack_run_config, worker_run_config
from app.stack.fetching import Rules

MCP_PROVIDER = "remote::model-context-protocol"


class LlamaStack:
    """The started stack; one in a process, used on the loop that it was started on.

    `inference`, `models`, `tool_runtime`, `tool_groups`, `safety`, `vector_io` are llama_stack's APIs of these names;
    the last two are None if the configuration does not have them (`vector_io`: a database without pgvector).
    """

    def __init__(self, impls: library.Impls, default_embedding_model: str | None = None) -> None:
        self._impls = impls
        self._default_embedding_model = default_embedding_model
        self.inference: Any = impls[Api.inference]
        self.models: Any = impls[Api.models]
        self.tool_runtime: Any = impls[Api.tool_runtime]
        self.tool_groups: Any = impls[Api.tool_groups]
        self.safety: Any = impls.get(Api.safety)
        self.vector_io: Any = impls.get(Api.vector_io)

    @classmethod
    async def start(cls, settings: Settings) -> Self:
        """Start on the running loop; makes no call to the model server, and logs nothing but warnings.

        Raises SettingsError: Postgres cannot be reached, or `LLAMA_STACK_CONFIG` is wrong.
        """
        config = await asyncio.to_thread(stack_run_config, settings)
        impls = await library.start(worker_run_config(config), Rules.of(settings), whole=False)
        default = config.vector_stores and config.vector_stores.default_embedding_model
        return cls(impls, f"{default.provider_id}/{default.model_id}" if default else None)

    async def refresh_registry(self) -> None:
        """See what the web process has registered or removed since; safe while turns run.

        Opens the connection to Postgres again if it was lost. Raises psycopg2.Error: Postgres cannot be read; what was
        known stays usable.
        """
        await registry.refresh(self._impls)

    async def mcp_endpoint(self, toolgroup_id: str) -> str | None:
        """The URL of the MCP server that a toolgroup stands for; None: its provider is of another kind.

        Raises ValueError: there is no such toolgroup.
        """
        group = await self.tool_groups.get_tool_group(toolgroup_id)
        provider = self.tool_groups.impls_by_provider_id.get(group.provider_id)
        if group.mcp_endpoint is None or provider is None or provider.__provider_spec__.provider_type != MCP_PROVIDER:
            return None
        return str(group.mcp_endpoint.uri)

    async def embedding_model(self) -> str | None:
        """The default (`EMBEDDING_MODEL`), or else the first of a run.yaml that has no default; None: there is none."""
        if self._default_embedding_model:
            return self._default_embedding_model
        models = (await self.models.list_models()).data
        return min((model.identifier for model in models if model.model_type == ModelType.embedding), default=None)

    async def call_tool(self, toolgroup_id: str, name: str, arguments: dict[str, Any]) -> ToolInvocationResult:
        """Of this toolgroup: `tool_runtime` calls what has the name in any that the principal sees.

        Raises ValueError: there is no such toolgroup; and what its provider raises.
        """
        provider = await self.tool_groups.get_provider_impl(toolgroup_id)
        result: ToolInvocationResult = await provider.invoke_tool(tool_name=name, kwargs=arguments)
        return result

    async def close(self) -> None:
        """Close every connection; trouble is logged. The stack cannot be used afterwards."""
        await library.stop(self._impls)
