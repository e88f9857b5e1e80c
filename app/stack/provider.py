"""The specs of our providers, which llama_stack asks for by `module: app.stack` (its "external providers").

`remote::caravan` and `inline::code-interpreter` are new; the others stand in for llama_stack's provider of the same
type, and say why there.
"""

from __future__ import annotations

from llama_stack.providers.datatypes import Api, InlineProviderSpec, ProviderSpec, RemoteProviderSpec


def get_provider_spec() -> list[ProviderSpec]:
    """All specs; llama_stack takes the one of the type that its configuration names."""
    return [
        RemoteProviderSpec(
            api=Api.inference,
            adapter_type="caravan",
            provider_type="remote::caravan",
            module="app.stack.inference",
            config_class="app.stack.inference.ModelServerConfig",
            description="Any OpenAI-compatible server, by INFERENCE_URL.",
        ),
        RemoteProviderSpec(
            api=Api.vector_io,
            adapter_type="pgvector",
            provider_type="remote::pgvector",
            module="app.stack.vector_io",
            config_class="app.stack.vector_io.VectorConfig",
            api_dependencies=[Api.inference],
            optional_api_dependencies=[Api.files, Api.models],
        ),
        InlineProviderSpec(
            api=Api.safety,
            provider_type="inline::llama-guard",
            module="app.stack.safety",
            config_class="llama_stack.providers.inline.safety.llama_guard.config.LlamaGuardConfig",
            api_dependencies=[Api.inference],
        ),
        InlineProviderSpec(
            api=Api.tool_runtime,
            provider_type="inline::rag-runtime",
            module="app.stack.retrieval",
            config_class="app.stack.retrieval.RagConfig",
            api_dependencies=[Api.vector_io, Api.inference],
            optional_api_dependencies=[Api.files],
        ),
        *(_web_search(name) for name in ("Tavily", "Brave", "Bing")),
        InlineProviderSpec(
            api=Api.tool_runtime,
            provider_type="inline::code-interpreter",
            module="app.stack.code_interpreter",
            config_class="app.stack.code_interpreter.Config",
        ),
    ]


def _web_search(name: str) -> RemoteProviderSpec:
    """In place of llama_stack's: see `app.stack.web_search`."""
    kind = name.lower()
    return RemoteProviderSpec(
        api=Api.tool_runtime,
        adapter_type=f"{kind}-search",
        provider_type=f"remote::{kind}-search",
        module="app.stack.web_search",
        config_class=f"app.stack.web_search.{name}Config",
        provider_data_validator=f"llama_stack.providers.remote.tool_runtime.{kind}_search"
        f".{name}SearchToolProviderDataValidator",
    )
