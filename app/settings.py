"""Every setting: its name in the environment, type, unit, default, and what an empty value means.

Settings come from the environment or a `.env` file in the working directory. `docs/settings.md` is generated from this
module by `caravan settings --markdown`.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import sys
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

CommaSeparated = Annotated[list[str], NoDecode]
CommaSeparatedSecrets = Annotated[list[SecretStr], NoDecode]

PRINCIPAL = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
"""The form of a principal's name, which stands in settings, in logs and in SQL."""

SEALING_KEY_BYTES = 32

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

_API_KEY = re.compile(f"{PRINCIPAL}:[0-9a-f]{{64}}")


class SettingsError(Exception):
    """A setting is missing or wrong. The message is one line and names the setting and the fix."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", env_file_encoding="utf-8", extra="ignore", env_ignore_empty=True)

    # Servers
    database_url: SecretStr = Field(
        description="Postgres, as `postgresql://user:password@host:5432/name`; `?sslmode=verify-full` and other libpq "
        "parameters work."
    )
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey for live events: `redis://`, `rediss://` (TLS) or "
        "`unix://`, with `user:password@`.",
    )
    celery_broker_url: SecretStr | None = Field(
        default=None, description="Celery's broker. Empty: the same as `REDIS_URL`."
    )

    # Models
    inference_url: str = Field(
        default="http://127.0.0.1:11434/v1",
        description="Base of an OpenAI-compatible server, with `/v1` (default: Ollama on this machine).",
    )
    inference_api_key: SecretStr | None = Field(
        default=None, description="Bearer key for `INFERENCE_URL`. Empty: none is sent."
    )
    inference_model: CommaSeparated = Field(
        default_factory=list,
        description="Model ids, comma-separated, as `INFERENCE_URL` knows them. Clients see exactly these ids. "
        "Required unless `LLAMA_STACK_CONFIG` is set.",
    )
    model_aliases: CommaSeparated = Field(
        default_factory=list,
        description="More ids for models, `alias=model`, comma-separated: programs that ask for `alias` get `model`, "
        "one of `INFERENCE_MODEL`, or `EMBEDDING_MODEL`. Clients see aliases beside the models.",
    )
    model_timeout_seconds: float = Field(
        default=300, gt=0, description="Seconds without a byte from the model after which an inference fails."
    )
    model_call_timeout_seconds: float = Field(
        default=1800, gt=0, description="Seconds that one inference may take in all; the turn fails beyond."
    )
    embedding_url: str = Field(
        default="http://127.0.0.1:8322/v1",
        description="Base of an OpenAI-compatible embeddings server, with `/v1` (default: `caravan embeddings` on this "
        "machine).",
    )
    embedding_api_key: SecretStr | None = Field(
        default=None, description="Bearer key for `EMBEDDING_URL`. Empty: none is sent."
    )
    embedding_model: str = Field(
        default=MINILM,
        description="Id of the embedding model, as `EMBEDDING_URL` knows it. Clients see it under this id, and vector "
        "stores take it if they name none. all-MiniLM-L6-v2 is known under its short name as well.",
    )
    embedding_dimension: int = Field(
        default=384, ge=1, le=16_000, description="Numbers in a vector of `EMBEDDING_MODEL`."
    )
    llama_stack_config: str | None = Field(
        default=None, description="Path of your own Llama Stack `run.yaml`, used in place of the built-in one."
    )

    # Turns
    max_queue_wait_seconds: float = Field(
        default=300,
        gt=0,
        description="Seconds that a turn (since it became claimable) or a tool request may wait for a worker.",
    )
    turn_timeout_seconds: float = Field(
        default=3600, gt=0, description="Seconds that one leg of a turn (create, or a resume) may take from its claim."
    )
    input_wait_seconds: float = Field(
        default=86400, gt=0, description="Seconds that a turn waits for a client's tool responses."
    )
    max_turns_per_session: int = Field(
        default=100, ge=1, description="Turns of one session that may be queued or running; 429 beyond."
    )
    max_turns_per_principal: int = Field(
        default=1000,
        ge=1,
        description="Turns of one principal that may be queued or running, and as many tool requests; 429 beyond.",
    )
    max_turns: int = Field(
        default=10_000,
        ge=1,
        description="Turns of everyone that may be queued or running, and as many tool requests; 429 beyond.",
    )
    max_worker_losses: int = Field(
        default=3, ge=1, description="Losses of a worker, with no step recorded in between, after which a turn fails."
    )
    event_log_max_bytes: int = Field(
        default=16_777_216, ge=65_536, description="Bytes of events that one turn may write; it fails beyond."
    )
    document_max_bytes: int = Field(
        default=10_485_760, ge=1, description="Bytes that a document may have, given or fetched."
    )
    document_text_max_bytes: int = Field(
        default=1_048_576, ge=1, description="Bytes that the text of a document may have, as UTF-8."
    )
    fetch_allowed: CommaSeparated = Field(
        default_factory=list,
        description="Where documents and images may be fetched from beside public addresses: hosts (`wiki.internal`, "
        "`127.0.0.1:9000`) and networks (`10.1.0.0/16`), comma-separated. Empty: from public addresses only.",
    )
    tool_timeout_seconds: float = Field(
        default=300, gt=0, description="Seconds that one server-side tool call may take."
    )
    tool_result_max_bytes: int = Field(
        default=1_048_576,
        ge=1024,
        description="Bytes that the result of a server-side tool call may have, as JSON; a larger one is an error.",
    )
    tools_safe_to_repeat: CommaSeparated = Field(
        default_factory=list,
        description="Server-side tools, comma-separated, as `tool` or `toolgroup/tool`: a call of theirs that was in "
        "flight when its worker died is made again, whatever their MCP server says of them.",
    )

    # Web search
    web_search_provider: Literal["tavily", "brave", "bing"] = Field(
        default="tavily", description="Who searches the web for the toolgroup `builtin::websearch`."
    )
    web_search_url: str | None = Field(
        default=None, description="Base of that provider's API, for a proxy or a compatible server. Empty: its own."
    )
    tavily_search_api_key: SecretStr | None = Field(
        default=None,
        description="Tavily's key; only workers need it. Empty: requests bring their own (`tavily_search_api_key` in "
        "`X-LlamaStack-Provider-Data`), which goes first anyway.",
    )
    brave_search_api_key: SecretStr | None = Field(default=None, description="The same of Brave.")
    bing_search_api_key: SecretStr | None = Field(default=None, description="The same of Bing.")

    # Code interpreter
    sandbox_timeout_seconds: float = Field(
        default=60, gt=0, description="Seconds that the code of one call may run; it is stopped beyond."
    )
    sandbox_memory_max_bytes: int = Field(
        default=1_073_741_824,
        ge=268_435_456,
        description="Bytes of memory that the code of one call may use: each of its processes, and all together.",
    )
    sandbox_max_processes: int = Field(
        default=32, ge=1, description="Processes and threads that the code of one call may have at once."
    )
    sandbox_files_max_bytes: int = Field(
        default=16_777_216,
        ge=65_536,
        description="Bytes that the files of a session's folder may have, all together. They are stored in Postgres, "
        "those that a call changed in one transaction, which may take 5 s.",
    )
    sandbox_output_max_bytes: int = Field(
        default=32_768,
        ge=1024,
        description="Bytes of standard output, and of standard error, that the model is told; the middle is left out.",
    )
    sandbox_max_at_once: int = Field(
        default=4, ge=1, description="Calls whose code one worker process runs at once; others wait."
    )

    # Leases
    lease_seconds: float = Field(
        default=6, gt=0, description="Seconds after its last renewal at which a worker counts as dead."
    )
    heartbeat_seconds: float = Field(default=2, gt=0, description="Seconds between two renewals of a worker's lease.")
    drain_seconds: float = Field(
        default=10, ge=0, description="Seconds that a stopping worker gives its turns to reach the end of their step."
    )
    upkeep_seconds: float = Field(
        default=2, gt=0, description="Seconds between two rounds of upkeep (give or take a fifth) in every process."
    )

    # Streams and requests
    ping_seconds: float = Field(
        default=10, gt=0, le=30, description="Seconds of silence after which a stream gets a comment."
    )
    silence_seconds: float = Field(
        default=3, gt=0, description="Seconds without an event after which a follower asks the log and Postgres."
    )
    stream_send_timeout_seconds: float = Field(
        default=60, gt=0, description="Seconds that a client may take to accept one event; then it is disconnected."
    )
    stream_buffer_bytes: int = Field(
        default=1_048_576,
        ge=1024,
        description="Bytes of events buffered per stream; a slower client is fed from the log instead.",
    )
    web_grace_seconds: float = Field(
        default=5,
        ge=0,
        description="Seconds that a stopping web process gives its open streams and requests; then it cuts them off.",
    )
    request_max_bytes: int = Field(
        default=10_485_760,
        ge=1024,
        description="Bytes that a request body to one of Caravan's own routes may have (413).",
    )
    cors_origins: CommaSeparated = Field(
        default_factory=list, description="Origins, comma-separated, that browsers may call from. Empty: none."
    )
    api_keys: CommaSeparated = Field(
        default_factory=list,
        description="Who may call: `name:sha256` of each key, comma-separated, as `caravan keys NAME` prints them; a "
        "name may have several. Empty: only this machine may, as `local`.",
    )
    sealing_keys: CommaSeparatedSecrets = Field(
        default_factory=list,
        description="Keys that seal the secrets of requests while their turns are queued, comma-separated, as `caravan "
        "keys --sealing` makes them; the same for all web and worker processes. The first seals, all open. Empty: "
        "requests that bring secrets are refused.",
    )

    # Resources of one process
    database_pool_size: int = Field(
        default=5, ge=2, description="Postgres connections that a process's requests or turns share (see operations)."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least level logged.")
    log_format: Literal["text", "json"] = Field(default="text", description="`text`, or `json`: one object a line.")

    @field_validator(
        "inference_model",
        "model_aliases",
        "cors_origins",
        "api_keys",
        "sealing_keys",
        "tools_safe_to_repeat",
        "fetch_allowed",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("fetch_allowed")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        for entry in value:
            if not _is_network(entry) and (entry.startswith(":") or "/" in entry or " " in entry):
                raise ValueError(
                    f"must be hosts (`wiki.internal`, `127.0.0.1:9000`) and networks (`10.1.0.0/16`), comma-separated; "
                    f"{entry!r} is neither"
                )
        return value

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, value: list[str]) -> list[str]:
        wrong = [number for number, entry in enumerate(value, 1) if not _API_KEY.fullmatch(entry)]
        if wrong:  # which one, but never its text: it may be a key
            raise ValueError(
                f"must be name:sha256 entries, comma-separated, as `caravan keys NAME` prints them; entry {wrong[0]} "
                "is none"
            )
        return value

    @field_validator("sealing_keys")
    @classmethod
    def _base64(cls, value: list[SecretStr]) -> list[SecretStr]:
        for number, key in enumerate(value, 1):
            try:
                length = len(base64.b64decode(key.get_secret_value(), validate=True))
            except ValueError:
                length = 0
            if length != SEALING_KEY_BYTES:  # which one, but never its text
                raise ValueError(
                    f"must be base64 of {SEALING_KEY_BYTES} bytes each, comma-separated, as `caravan keys --sealing` "
                    f"makes them; entry {number} is not"
                )
        return value

    @field_validator("inference_url", "embedding_url", "web_search_url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value.rstrip("/") if value else None

    @field_validator("tavily_search_api_key", "brave_search_api_key", "bing_search_api_key")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not re.fullmatch(r"[!-~]+", value.get_secret_value()):
            raise ValueError("must be printable ASCII without spaces")
        return value

    @field_validator("database_url")
    @classmethod
    def _postgres(cls, value: SecretStr) -> SecretStr:
        sqlalchemy_url(value.get_secret_value())
        return value

    @field_validator("redis_url", "celery_broker_url")
    @classmethod
    def _redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("LEASE_SECONDS must be at least twice HEARTBEAT_SECONDS")
        if self.llama_stack_config and not os.path.isfile(self.llama_stack_config):
            raise ValueError(f"LLAMA_STACK_CONFIG: there is no file {self.llama_stack_config}")
        models = {*self.inference_model, self.embedding_model}
        if self.embedding_model in self.inference_model:
            raise ValueError(f"EMBEDDING_MODEL must not be one of INFERENCE_MODEL; {self.embedding_model} is both")
        for alias, model in self.aliases.items():
            if not alias or model not in models or alias in models:
                raise ValueError(
                    "MODEL_ALIASES must be alias=model entries, comma-separated, each of a model of INFERENCE_MODEL "
                    f"or of EMBEDDING_MODEL, and under an id of its own; {alias}={model} is none"
                )
        return self

    @property
    def aliases(self) -> dict[str, str]:
        """`model_aliases` as model ids by alias."""
        return {
            alias.strip(): model.strip() for alias, _, model in (each.partition("=") for each in self.model_aliases)
        }

    @property
    def sqlalchemy_url(self) -> URL:
        return sqlalchemy_url(self.database_url.get_secret_value())

    @property
    def broker_url(self) -> str:
        """The broker's URL in Celery's spelling (`redis+socket://` for a Unix socket)."""
        url = (self.celery_broker_url or self.redis_url).get_secret_value()
        return url.replace("unix://", "redis+socket://", 1) if url.startswith("unix://") else url


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def sqlalchemy_url(text: str) -> URL:
    """A Postgres URL in SQLAlchemy's spelling. Raises ValueError: it is none."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError("is not a URL such as postgresql://user:password@host:5432/name") from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"must be a postgresql:// URL, not {url.get_backend_name()}://")
    return url.set(drivername="postgresql+psycopg2")


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once.

    Raises SettingsError: a setting is missing or wrong.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None


def settings_or_exit() -> Settings:
    """`get_settings` for the start of a process: a missing or wrong setting is one line and exit status 2."""
    try:
        return get_settings()
    except SettingsError as error:
        print(f"caravan: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        name = "_".join(str(part) for part in problem["loc"]).upper()
        if problem["type"] == "missing":
            problems.append(f"{name} is not set: give it in the environment or in .env")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{name} {message}" if name else message)
    return "; ".join(problems)
