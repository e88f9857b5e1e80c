"""llama_stack's RAG tools, with the files API optional: a worker searches, only the web process inserts documents."""

from __future__ import annotations

from typing import Any

from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.tool_runtime.rag.config import RagToolRuntimeConfig
from llama_stack.providers.inline.tool_runtime.rag.memory import MemoryToolRuntimeImpl


async def get_provider_impl(config: RagToolRuntimeConfig, deps: dict[Api, Any]) -> MemoryToolRuntimeImpl:
    provider = MemoryToolRuntimeImpl(config, deps[Api.vector_io], deps[Api.inference], deps.get(Api.files))
    await provider.initialize()
    return provider
