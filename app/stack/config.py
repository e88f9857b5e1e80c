"""The configuration of the Llama Stack that Caravan runs: a user's `run.yaml`, or our own, built from the settings.

Ours is never written to a file, since it holds secrets. It needs no network but Postgres: it can be built, and a stack
started from it, while the model server is down.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg2
import yaml
from llama_stack.core.configure import parse_and_maybe_upgrade_config
from llama_stack.core.datatypes import (
    Provider,
    QualifiedModel,
    RegisteredResources,
    StackRunConfig,
    ToolGroupInput,
    VectorStoresConfig,
)
from llama_stack.core.storage.datatypes import (
    InferenceStoreReference,
    KVStoreReference,
    ServerStoresConfig,
    SqlStoreReference,
    StorageConfig,
)
from pydantic import SecretStr

from app.settings import MINILM, Settings, SettingsError
from app.stack import code_interpreter, postgres

MODULE = "app.stack"  # llama_stack asks `app.stack.provider` for the specs of providers that name this module
MODEL_SERVER = "model-server"
EMBEDDINGS_SERVER = "embeddings-server"
KEY_VALUE = "kv_default"
SQL = "sql_default"


def stack_run_config(settings: Settings) -> StackRunConfig:
    """The configuration of the whole stack, as the web process runs it.

    Blocking: connects to Postgres to find out whether it has pgvector, and to create the extension if it may.
    Raises SettingsError: `LLAMA_STACK_CONFIG` is no valid run.yaml, or asks for what Caravan does itself; or Postgres
    cannot be reached.
    """
    if settings.llama_stack_config:
        return _own_run_yaml(settings.llama_stack_config)
    if not settings.inference_model:
        raise SettingsError("INFERENCE_MODEL is not set: name the model ids that INFERENCE_URL serves")
    try:
        vectors = postgres.prepare_database(postgres.libpq_parameters(settings.sqlalchemy_url))
    except psycopg2.Error as error:
        raise SettingsError(f"DATABASE_URL: {' '.join(str(error).split())}") from error
    return build_run_config(settings, vectors=vectors)


def worker_run_config(config: StackRunConfig) -> StackRunConfig:
    """The part of a stack's configuration that a worker needs: what turns call, not what only HTTP clients call."""
    kept = {"inference", "safety", "tool_runtime", "vector_io"}
    if _needs_files(config):
        kept.add("files")
    return config.model_copy(
        update={
            "apis": [api for api in config.apis if api in kept] or sorted(kept & set(config.providers)),
            "providers": {api: providers for api, providers in config.providers.items() if api in kept},
        }
    )


def _needs_files(config: StackRunConfig) -> bool:
    # llama_stack's own rag-runtime does not start without files; ours does (`app.stack.retrieval`).
    return any(
        provider.provider_type == "inline::rag-runtime" and provider.module != MODULE
        for provider in config.providers.get("tool_runtime", ())
    )


def _own_run_yaml(path: str) -> StackRunConfig:
    try:
        config = parse_and_maybe_upgrade_config(yaml.safe_load(Path(path).read_text()))
    except Exception as error:  # yaml, pydantic, OSError, EnvVarError: each means that the file is wrong
        raise SettingsError(f"LLAMA_STACK_CONFIG: {path}: {' '.join(str(error).split())}") from error
    if config.server.auth or config.server.quota:
        raise SettingsError(
            f"LLAMA_STACK_CONFIG: {path}: server.auth and server.quota have no effect here; Caravan identifies callers "
            "itself. Remove them."
        )
    return config


def build_run_config(settings: Settings, *, vectors: bool) -> StackRunConfig:
    """Our own configuration; `vectors`: whether the database has pgvector. Touches no network."""
    key_value, sql = postgres.backends(settings.sqlalchemy_url, settings.database_pool_size)
    providers = {
        "inference": [_model_server(settings), _embeddings_server(settings)],
        "safety": [_ours("llama-guard", "inline::llama-guard")],
        "files": [_files()],
        "tool_runtime": [
            Provider(provider_id="model-context-protocol", provider_type="remote::model-context-protocol", config={}),
            *_web_search(settings),
            _ours("code-interpreter", "inline::code-interpreter"),
        ],
    }
    search = f"{settings.web_search_provider}-search"
    tool_groups = [
        ToolGroupInput(toolgroup_id="builtin::websearch", provider_id=search),
        ToolGroupInput(toolgroup_id=code_interpreter.TOOLGROUP, provider_id="code-interpreter"),
    ]
    vector_stores = None
    if vectors:
        providers["vector_io"] = [_pgvector(settings)]
        providers["tool_runtime"].append(_rag(settings))
        tool_groups.append(ToolGroupInput(toolgroup_id="builtin::rag", provider_id="rag-runtime"))
        vector_stores = VectorStoresConfig(default_embedding_model=_default_embedding_model(settings))
    return StackRunConfig(
        image_name="caravan",
        apis=sorted(providers),
        providers=providers,
        storage=StorageConfig(backends={KEY_VALUE: key_value, SQL: sql}, stores=_stores()),
        registered_resources=RegisteredResources(tool_groups=tool_groups),
        vector_stores=vector_stores,
        telemetry={"enabled": False},
    )


def _stores() -> ServerStoresConfig:
    return ServerStoresConfig(
        metadata=KVStoreReference(backend=KEY_VALUE, namespace="registry"),
        # Required by llama_stack's router; `app.stack.library` sees to it that nothing is ever stored there.
        inference=InferenceStoreReference(backend=SQL, table_name="inference_store"),
        # Required to start, and never opened: conversations are ours.
        conversations=SqlStoreReference(backend=SQL, table_name="openai_conversations"),
    )


def _ours(provider_id: str, provider_type: str, **config: Any) -> Provider:
    return Provider(provider_id=provider_id, provider_type=provider_type, module=MODULE, config=config)


def _model_server(settings: Settings) -> Provider:
    key = settings.inference_api_key
    return _ours(
        MODEL_SERVER,
        "remote::caravan",
        url=settings.inference_url,
        api_key=key.get_secret_value() if key else None,
        models=settings.inference_model,
        aliases={alias: model for alias, model in settings.aliases.items() if model != settings.embedding_model},
        timeout_seconds=settings.model_timeout_seconds,
    )


def _embeddings_server(settings: Settings) -> Provider:
    key = settings.embedding_api_key
    model = settings.embedding_model
    names = [
        _qualified(settings),
        *([MINILM, MINILM.rpartition("/")[2]] if model in (MINILM, MINILM.rpartition("/")[2]) else []),
        *(alias for alias, named in settings.aliases.items() if named == model),
    ]
    return _ours(
        EMBEDDINGS_SERVER,
        "remote::caravan",
        url=settings.embedding_url,
        api_key=key.get_secret_value() if key else None,
        models=[model],
        aliases={name: model for name in names if name != model},
        embedding_dimension=settings.embedding_dimension,
        settings="EMBEDDING",
        timeout_seconds=settings.model_timeout_seconds,
    )


def _qualified(settings: Settings) -> str:
    """llama_stack puts a provider and a slash before the id of the default embedding model, so it needs a slash."""
    model = settings.embedding_model
    return model if "/" in model.strip("/") else f"{EMBEDDINGS_SERVER}/{model}"


def _default_embedding_model(settings: Settings) -> QualifiedModel:
    """Of vector stores that name none. Not necessarily a provider: what stands before the id's first slash."""
    before, _, after = _qualified(settings).partition("/")
    return QualifiedModel(provider_id=before, model_id=after)


def _pgvector(settings: Settings) -> Provider:
    persistence = {"backend": KEY_VALUE, "namespace": "vector_io::pgvector"}
    return _ours("pgvector", "remote::pgvector", persistence=persistence, file_max_bytes=settings.document_max_bytes)


def _rag(settings: Settings) -> Provider:
    return _ours(
        "rag-runtime",
        "inline::rag-runtime",
        fetch_allowed=settings.fetch_allowed,
        document_max_bytes=settings.document_max_bytes,
    )


def _web_search(settings: Settings) -> list[Provider]:
    """All three, so that a process with an older setting can use the toolgroup as a newer one has registered it."""
    found = []
    for name in ("tavily", "brave", "bing"):
        key: SecretStr | None = getattr(settings, f"{name}_search_api_key")
        url = settings.web_search_url if name == settings.web_search_provider else None
        config = {"api_key": key.get_secret_value() if key else None} | ({"url": url} if url else {})
        found.append(_ours(f"{name}-search", f"remote::{name}-search", **config))
    return found


def _files() -> Provider:
    return Provider(
        provider_id="localfs",
        provider_type="inline::localfs",
        config={
            "storage_dir": str(files_folder()),
            "metadata_store": {"backend": SQL, "table_name": "openai_files"},
        },
    )


def files_folder() -> Path:
    """Where uploaded files are kept: `$XDG_DATA_HOME/caravan/files`, by default `~/.local/share/caravan/files`.

    Web processes on several machines must share this folder. A relative `$XDG_DATA_HOME` counts as none
    (https://specifications.freedesktop.org/basedir-spec/).
    """
    home = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".local" / "share") / "caravan" / "files"
