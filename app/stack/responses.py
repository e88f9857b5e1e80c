"""llama_stack's agents provider, for its Responses routes only; the agents routes are Caravan's own.

Differs from the original: vector_io is optional, since a database without pgvector must not cost the Responses API, and
no store for agents is opened.
"""

from __future__ import annotations

from typing import Any

from llama_stack.core.datatypes import AccessRule
from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.agents.meta_reference.agents import MetaReferenceAgentsImpl
from llama_stack.providers.inline.agents.meta_reference.config import MetaReferenceAgentsImplConfig
from llama_stack.providers.inline.agents.meta_reference.responses.openai_responses import OpenAIResponsesImpl
from llama_stack.providers.utils.responses.responses_store import ResponsesStore


class ResponsesOnly(MetaReferenceAgentsImpl):
    async def initialize(self) -> None:
        self.responses_store = ResponsesStore(self.config.persistence.responses, self.policy)
        await self.responses_store.initialize()
        self.openai_responses_impl = OpenAIResponsesImpl(
            inference_api=self.inference_api,
            tool_groups_api=self.tool_groups_api,
            tool_runtime_api=self.tool_runtime_api,
            responses_store=self.responses_store,
            vector_io_api=self.vector_io_api,
            safety_api=self.safety_api,
            conversations_api=self.conversations_api,
        )


async def get_provider_impl(
    config: MetaReferenceAgentsImplConfig, deps: dict[Api, Any], policy: list[AccessRule]
) -> ResponsesOnly:
    provider = ResponsesOnly(
        config=config,
        inference_api=deps[Api.inference],
        vector_io_api=deps.get(Api.vector_io),
        safety_api=deps[Api.safety],
        tool_runtime_api=deps[Api.tool_runtime],
        tool_groups_api=deps[Api.tool_groups],
        conversations_api=deps[Api.conversations],
        policy=policy,
    )
    await provider.initialize()
    return provider
