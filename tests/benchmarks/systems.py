"""The systems that are compared. Each starts its servers, names them by role, and takes turns over HTTP."""

from __future__ import annotations

import http.client
import json
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from sqlalchemy.engine import make_url

from app.local.server import free_port
from app.store import migrate
from tests.benchmarks.processes import Process, create_database, start_postgres, start_redis
from tests.support import ROOT

START_SECONDS = 90.0
MODEL = "scripted"
DATABASE = "benchmark"


class System(ABC):
    """Start it with `with`; its data servers start once, its own processes as often as `restart` is called.

    `processes` are its servers by role. `start_seconds`: from nothing but data servers to the end of a first turn.
    """

    name: ClassVar[str]
    model: ClassVar[str]
    data_roles: ClassVar[tuple[str, ...]]
    most_slow_turns: ClassVar[int] = 10_000  # more at once would take the benchmark too long on it

    def __init__(self, folder: Path, model_url: str, log_level: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, Process] = {}
        self.start_seconds: list[float] = []
        self._model_url = model_url
        self._log_level = log_level
        self._open = ExitStack()
        self._agent_id = ""

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        try:
            self._start_data()
            self.restart()
        except BaseException:
            self._show_logs()
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and kind is not SystemExit:
            self._show_logs()
        self._stop()

    def restart(self) -> None:
        """Stops and starts its own processes, and takes the time until a first turn has ended."""
        self._stop_own()
        began = time.monotonic()
        self._start_own()
        self._agent_id = self._create_agent()
        self.run_one_turn()
        self.start_seconds.append(time.monotonic() - began)

    def pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in self.processes.items()}

    def new_turn_paths(self, count: int) -> list[str]:
        """Paths to post one turn each to: every turn has a session of its own, so that no history adds to its cost."""
        for process in self.processes.values():
            process.lives()
        return [f"{self._sessions_path()}/{self._create_session()}/turn" for _ in range(count)]

    def run_one_turn(self) -> None:
        connection = self._connection()
        body = turn_body("SAY hello")
        connection.request("POST", self.new_turn_paths(1)[0], body, {"Content-Type": "application/json"})
        answer = connection.getresponse().read()
        connection.close()
        if b"turn_complete" not in answer:
            raise RuntimeError(f"{self.name}: the first turn did not complete: {answer[-500:]!r}")

    @abstractmethod
    def _start_data(self) -> None: ...

    @abstractmethod
    def _start_own(self) -> None: ...

    def _show_logs(self) -> None:
        for role, process in self.processes.items():
            print(f"--- {self.name}: {role}, {process.state()}\n{process.log_tail()}", file=sys.stderr)

    def _stop(self) -> None:
        self._stop_own()
        self._open.close()

    def _stop_own(self) -> None:
        for role in reversed(self._own_roles()):
            self.processes.pop(role).stop()

    def _own_roles(self) -> list[str]:
        return [role for role in self.processes if role not in self.data_roles]

    def _keep(self, role: str, process: Process) -> None:
        self.processes[role] = process
        if role in self.data_roles:
            self._open.enter_context(process)

    def _create_agent(self) -> str:
        config = {"model": self.model, "instructions": "Do as you are told.", "enable_session_persistence": False}
        return str(self._post("/v1alpha/agents", {"agent_config": config})["agent_id"])

    def _sessions_path(self) -> str:
        return f"/v1alpha/agents/{self._agent_id}/session"

    def _create_session(self) -> str:
        return str(self._post(self._sessions_path(), {"session_name": "benchmark"})["session_id"])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        connection = self._connection()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{self.name}: POST {path}: {response.status} {text!r}")
        return json.loads(text)

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)


class Monolith(System):
    """llama-stack's own server, as `llama stack run` starts it."""

    name = "llama-stack"
    model = f"vllm/{MODEL}"
    data_roles = ("postgres",)

    def _start_data(self) -> None:
        port = free_port()
        self._keep("postgres", start_postgres(self.folder, port))
        create_database(port, DATABASE)
        run = run_yaml(self._model_url, port)
        (self.folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))

    def _start_own(self) -> None:
        env = {
            "LLAMA_STACK_LOGGING": f"all={self._log_level.lower()}",
            "LLAMA_STACK_DISABLE_VERSION_CHECK": "1",
            "SQLITE_STORE_DIR": str(self.folder),
        }
        command: list[str | Path] = [
            Path(sys.executable).parent / "llama",
            "stack",
            "run",
            "run.yaml",
            "--port",
            str(self.port),
        ]
        self._keep("server", Process("server", command, self.folder, env=env))
        self.processes["server"].wait_until_listening(self.port, START_SECONDS)


class Caravan(System):
    """The web process and one worker with the turn pool."""

    name = "Caravan"
    model = MODEL
    data_roles = ("redis", "postgres")
    worker_options: ClassVar[tuple[str, ...]] = ("-P", "custom", "--autoscale=500,10")

    def _start_data(self) -> None:
        redis_port, postgres_port = free_port(), free_port()
        self._keep("redis", start_redis(self.folder, redis_port))
        self._keep("postgres", start_postgres(self.folder, postgres_port))
        database_url = create_database(postgres_port, DATABASE)
        migrate.upgrade(make_url(database_url).set(drivername="postgresql+psycopg2"))
        self._env = {
            "PYTHONPATH": str(ROOT),
            "CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TurnPool",
            "XDG_DATA_HOME": str(self.folder),
            "DATABASE_URL": database_url,
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "INFERENCE_URL": self._model_url,
            "INFERENCE_MODEL": MODEL,
            "LOG_LEVEL": self._log_level,
        }

    def _start_own(self) -> None:
        level = self._log_level.lower()
        programs = Path(sys.executable).parent
        web: list[str | Path] = [programs / "uvicorn", "app:main", "--port", str(self.port), "--log-level", level]
        worker: list[str | Path] = [programs / "celery", "-A", "tasks", "worker", "-l", level, *self.worker_options]
        self._keep("web", Process("web", web, self.folder, env=self._env))
        self._keep("worker", Process("worker", worker, self.folder, env=self._env))
        self.processes["web"].wait_until_listening(self.port, START_SECONDS)


class CaravanPrefork(Caravan):
    """The same with Celery's own pool: two processes, a turn at a time in each."""

    name = "Caravan prefork"
    most_slow_turns = 64
    worker_options = ("--autoscale=2,2",)


def turn_body(script: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": script}], "stream": True})


def run_yaml(model_url: str, postgres_port: int) -> dict[str, Any]:
    """What 0.3.5's agents need and nothing else: Postgres stores, no telemetry exporter, no vector database.

    Its provider makes a new HTTP client for each inference. With `tls_verify: true`, the default, each one loads the
    certificate store (19 ms of CPU), which plain http:// has no use for; an operator who looks at a profile turns it
    off, so it is off here.
    """
    vllm = {"url": model_url, "api_token": "unused", "tls_verify": False}
    postgres = {"host": "127.0.0.1", "port": postgres_port, "db": DATABASE, "user": "postgres", "password": "unused"}
    agents_config = {
        "persistence": {
            "agent_state": {"namespace": "agents", "backend": "kv_default"},
            "responses": {"table_name": "responses", "backend": "sql_default"},
        }
    }
    return {
        "version": 2,
        "image_name": "benchmark",
        "apis": ["agents", "inference", "safety", "tool_runtime", "vector_io"],
        "providers": {
            "inference": [_provider("vllm", "remote::vllm", vllm)],
            "safety": [_provider("llama-guard", "inline::llama-guard", {"excluded_categories": []})],
            "agents": [_provider("meta-reference", "inline::meta-reference", agents_config)],
            "tool_runtime": [_provider("model-context-protocol", "remote::model-context-protocol", {})],
            "vector_io": [],
        },
        "storage": {
            "backends": {
                "kv_default": {"type": "kv_postgres", **postgres},
                "sql_default": {"type": "sql_postgres", **postgres},
            },
            "stores": {
                "metadata": {"namespace": "registry", "backend": "kv_default"},
                "inference": {"table_name": "inference_store", "backend": "sql_default"},
                "conversations": {"table_name": "openai_conversations", "backend": "sql_default"},
            },
        },
        "registered_resources": {
            "models": [
                {"model_id": MODEL, "provider_id": "vllm", "provider_model_id": MODEL, "model_type": "llm"},
            ]
        },
        "telemetry": {"enabled": False},
    }


def _provider(provider_id: str, provider_type: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"provider_id": provider_id, "provider_type": provider_type, "config": config}
