"""Our Llama Stack configuration, and how a database URL becomes connection parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from psycopg2.extensions import make_dsn, parse_dsn
from sqlalchemy.engine import make_url

from app.settings import Settings, SettingsError
from app.stack.config import build_run_config, files_folder, stack_run_config, worker_run_config
from app.stack.mounted import RegistryChanges, changes_registry
from app.stack.postgres import asyncpg_dsn, backends, libpq_parameters


def settings(**values: Any) -> Settings:
    given = {"database_url": "postgresql://u:p@db:5432/name", "inference_model": ["meta/m1", "m2"], **values}
    return Settings(_env_file=None, **given)


@pytest.mark.parametrize(
    ("url", "parameters"),
    [
        (
            "postgresql://user:p%40ss%2F%3A%25+w@db.example:6432/name",
            {"host": "db.example", "port": "6432", "user": "user", "password": "p@ss/:%+w", "dbname": "name"},
        ),
        (
            "postgresql://postgres@/postgres?host=/tmp/some%20dir",
            {"host": "/tmp/some dir", "user": "postgres", "dbname": "postgres"},
        ),
        (
            "postgresql://u:p@h/n?sslmode=verify-full&sslrootcert=/etc/ca.pem&application_name=a%20b",
            {
                "host": "h",
                "user": "u",
                "password": "p",
                "dbname": "n",
                "sslmode": "verify-full",
                "sslrootcert": "/etc/ca.pem",
                "application_name": "a b",
            },
        ),
        ("postgresql://u@/n?host=a:1&host=b:2", {"host": "a,b", "port": "1,2", "user": "u", "dbname": "n"}),
        ("postgresql://u@/n?host=a&host=b:2", {"host": "a,b", "port": "5432,2", "user": "u", "dbname": "n"}),
    ],
)
def test_url_becomes_the_same_parameters_for_both_drivers(url: str, parameters: dict[str, str]) -> None:
    found = libpq_parameters(make_url(url))
    assert found == parameters
    assert parse_dsn(make_dsn(**found)) == parameters
    assert {name: values[0] for name, values in parse_qs(urlsplit(asyncpg_dsn(found)).query).items()} == parameters


@pytest.mark.parametrize(
    ("url", "host", "port", "asyncpg_host"),
    [
        ("postgresql+psycopg2://u@[::1]:5/n", "::1", "5", "[::1]"),
        ("postgresql://u@[fe80::1]/n", "fe80::1", None, "[fe80::1]"),
        ("postgresql://u@/n?host=[::1]:3&host=[::2]", "::1,::2", "3,5432", "[::1],[::2]"),
    ],
)
def test_ipv6_addresses_stand_in_brackets_for_asyncpg_only(
    url: str, host: str, port: str | None, asyncpg_host: str
) -> None:
    found = libpq_parameters(make_url(url))
    assert (found["host"], found.get("port")) == (host, port)
    assert parse_qs(urlsplit(asyncpg_dsn(found)).query)["host"] == [asyncpg_host]


def test_asyncpg_is_not_given_parameters_that_it_would_send_to_the_server() -> None:
    assert "keepalives" not in asyncpg_dsn({"host": "h", "keepalives_idle": "30", "connect_timeout": "5"})


def test_backends_survive_llama_stacks_own_validation_and_copies() -> None:
    config = build_run_config(settings(database_url="postgresql://u:p%2F@h/n?sslmode=require"), vectors=False)
    key_value, sql = config.storage.backends["kv_default"], config.storage.backends["sql_default"]
    assert key_value.model_copy().parameters["password"] == "p/"
    assert sql.model_copy().parameters["sslmode"] == "require"


def test_a_host_may_be_missing() -> None:
    key_value, _ = backends(make_url("postgresql://u@/n"), 5)
    assert "host" not in key_value.parameters


def test_no_secret_stands_where_the_providers_route_shows_it() -> None:
    from llama_stack.core.utils.config import redact_sensitive_fields

    config = build_run_config(settings(inference_api_key="sk-secret", tavily_search_api_key="sk-secret"), vectors=True)
    shown = redact_sensitive_fields({"providers": config.model_dump()["providers"]})
    assert "sk-secret" not in str(shown)
    assert "p@db" not in str(shown)


def test_without_pgvector_there_is_no_vector_io_and_no_rag() -> None:
    config = build_run_config(settings(), vectors=False)
    assert "vector_io" not in config.apis
    searches = ["tavily-search", "brave-search", "bing-search"]
    served = [provider.provider_id for provider in config.providers["tool_runtime"]]
    assert served == ["model-context-protocol", *searches, "code-interpreter"]
    groups = config.registered_resources.tool_groups
    assert [(group.toolgroup_id, group.provider_id) for group in groups] == [
        ("builtin::websearch", "tavily-search"),
        ("builtin::code_interpreter", "code-interpreter"),
    ]


def test_web_search_is_served_by_whom_the_settings_name() -> None:
    """Where they say; all three can serve, and have their keys."""
    given = settings(web_search_provider="brave", web_search_url="http://proxy/", tavily_search_api_key="t-key")
    config = build_run_config(given, vectors=False)
    assert config.registered_resources.tool_groups[0].provider_id == "brave-search"
    found = {provider.provider_id: provider.config for provider in config.providers["tool_runtime"]}
    assert found["brave-search"] == {"api_key": None, "url": "http://proxy"}
    assert found["tavily-search"] == {"api_key": "t-key"}


def test_worker_has_only_what_turns_call() -> None:
    config = build_run_config(settings(), vectors=True)
    assert set(worker_run_config(config).apis) == {"inference", "safety", "tool_runtime", "vector_io"}
    assert set(worker_run_config(config).providers) == {"inference", "safety", "tool_runtime", "vector_io"}
    assert "files" in config.apis


OWN = """
version: 2
image_name: own
apis: [inference, agents{files}]
providers:
  inference:
  - provider_id: openai
    provider_type: remote::openai
    config: {{api_key: "${{env.STACK_TEST_KEY:=none}}"}}
{more}
storage:
  backends: {{kv: {{type: kv_sqlite, db_path: /tmp/kv.db}}, sql: {{type: sql_sqlite, db_path: /tmp/sql.db}}}}
  stores:
    metadata: {{backend: kv, namespace: r}}
    inference: {{backend: sql, table_name: i}}
"""


def own(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "run.yaml").write_text(text)
    return settings(llama_stack_config=str(tmp_path / "run.yaml"))


def test_own_run_yaml_is_read_with_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_TEST_KEY", "from-env")
    config = stack_run_config(own(tmp_path, OWN.format(files="", more="")))
    assert config.providers["inference"][0].config["api_key"] == "from-env"
    assert worker_run_config(config).apis == ["inference"]


def test_own_rag_runtime_keeps_its_files_in_a_worker(tmp_path: Path) -> None:
    more = "  tool_runtime: [{provider_id: rag, provider_type: 'inline::rag-runtime'}]"
    config = stack_run_config(own(tmp_path, OWN.format(files=", files", more=more)))
    assert worker_run_config(config).apis == ["inference", "files"]


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "image_name: x",
        OWN.format(files="", more="") + "server: {quota: {kvstore: {backend: kv, namespace: q}}}",
    ],
)
def test_wrong_run_yaml_is_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="LLAMA_STACK_CONFIG") as raised:
        stack_run_config(own(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_unreachable_postgres_is_one_clear_line_without_the_password() -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL") as raised:
        stack_run_config(settings(database_url="postgresql://u:hidden@127.0.0.1:1/n"))
    assert "hidden" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data_home", "folder"),
    [
        ("/data", "/data/caravan/files"),
        ("relative", "/me/.local/share/caravan/files"),
        ("", "/me/.local/share/caravan/files"),
    ],
)
def test_files_are_kept_in_the_data_home(monkeypatch: pytest.MonkeyPatch, data_home: str, folder: str) -> None:
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setenv("XDG_DATA_HOME", data_home)
    assert files_folder() == Path(folder)


@pytest.mark.parametrize(
    ("method", "path", "changes"),
    [
        ("POST", "/v1/models", True),
        ("DELETE", "/v1/models/meta-llama/Llama-3", True),
        ("POST", "/v1/toolgroups", True),
        ("DELETE", "/v1/toolgroups/mcp::x", True),
        ("POST", "/v1/shields", True),
        ("POST", "/v1/openai/v1/vector_stores", True),
        ("DELETE", "/v1/vector_stores/vs_1", True),
        ("POST", "/v1beta/datasets", True),
        ("POST", "/v1alpha/eval/benchmarks", True),
        ("POST", "/v1/scoring-functions", True),
        ("POST", "/v1/vector_stores/vs_1/search", False),
        ("POST", "/v1/vector_stores/vs_1/files", False),
        ("POST", "/v1/vector_stores/vs_1", True),
        ("DELETE", "/v1/models/my-vector/files", True),
        ("GET", "/v1/models", False),
        ("POST", "/v1/chat/completions", False),
        ("POST", "/v1/modelsque", False),
    ],
)
def test_only_changes_of_the_registry_are_told(method: str, path: str, changes: bool) -> None:
    assert changes_registry(method, path) is changes


@pytest.mark.parametrize("path", ["/v1/toolgroups", "/behind/v1/toolgroups"])
async def test_a_change_behind_a_proxys_prefix_is_told(path: str) -> None:
    """Workers would not know of what is registered."""
    told: list[str] = []

    async def answers(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        raise AssertionError("nothing is asked for")

    async def send(message: Any) -> None:
        pass

    changes = RegistryChanges(answers, lambda: told.append(path))
    await changes({"type": "http", "method": "POST", "path": path, "root_path": "/behind"}, receive, send)
    assert told == [path]
