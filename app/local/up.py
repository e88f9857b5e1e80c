"""`caravan up`: a whole installation on this machine, for development. Everything listens on the loopback only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.local import program
from app.local.embeddings import Embeddings
from app.local.minilm import DIMENSION
from app.local.minilm import MODEL_ID as MINILM
from app.local.model import MODEL_ID, Model
from app.local.postgres import SYSTEM_FOLDER, Postgres, first_closed
from app.local.program import Pool
from app.local.server import HOST, LocalError, port_in_use
from app.local.supervisor import Stopped, Supervisor, Terminal
from app.local.valkey import Valkey

FOLDER = Path(".caravan")


@dataclass(frozen=True)
class Options:
    """What `caravan up` can be told. None: no Flower; the embedded model; all models that `model_url` lists; the
    embedded embeddings server."""

    data: Path
    port: int = 8321
    flower_port: int | None = 5555
    model_url: str | None = None
    models: list[str] = field(default_factory=list)
    embedding_url: str | None = None
    embedding_model: str = MINILM
    embedding_dimension: int = DIMENSION
    pool: Pool = "turns"


class Installation:
    """The parts that `options` ask for, and where they are found once `start` has returned."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.data = options.data.resolve()
        self.url = f"http://{HOST}:{options.port}"
        self.flower_url = f"http://{HOST}:{options.flower_port}" if options.flower_port else None
        self.valkey = Valkey(self.data, persistent=True)
        self.postgres = Postgres(self.data)
        self.model = None if options.model_url else Model(self.data)
        self.model_url = (self.model.url if self.model else options.model_url or "").rstrip("/")
        self.models = options.models or ([MODEL_ID] if self.model else [])
        self.embeddings = None if options.embedding_url else Embeddings(self.data)

    def start(self, supervisor: Supervisor, tell: Callable[[str], None]) -> None:
        """Starts one after the other what needs each other, and the rest at once. Raises LocalError, Stopped."""
        self._require_ports()
        embedded = [self.valkey, self.postgres, *(server for server in (self.model, self.embeddings) if server)]
        tell(f"starting {_listed([server.name for server in embedded])}")
        supervisor.launch(*embedded)
        supervisor.wait_ready(self.valkey, self.postgres)
        tell("bringing the database to the newest schema")
        supervisor.run(self._migrate)
        supervisor.wait_ready(*embedded)
        self.models = self.models or supervisor.run(lambda: listed_models(self.model_url))
        self._write_environment()
        programs = self._programs()
        tell(f"starting {_listed([server.name for server in programs])}")
        supervisor.start(*programs)

    def environment(self) -> dict[str, str]:
        """The settings that web, worker and Flower share."""
        return {
            "DATABASE_URL": self.postgres.url,
            "REDIS_URL": self.valkey.url,
            "CELERY_BROKER_URL": self.valkey.url,
            "INFERENCE_URL": self.model_url,
            "INFERENCE_MODEL": ",".join(self.models),
            "EMBEDDING_URL": self.embeddings.url if self.embeddings else self._options.embedding_url or "",
            "EMBEDDING_MODEL": self._options.embedding_model,
            "EMBEDDING_DIMENSION": str(self._options.embedding_dimension),
            "SEALING_KEYS": sealing_key(self.data),
        }

    @property
    def environment_file(self) -> Path:
        return self.data / "environment"

    def _require_ports(self) -> None:
        for option, port in (("--port", self._options.port), ("--flower-port", self._options.flower_port)):
            if port and port_in_use(port):
                raise LocalError(f"port {port} is in use: name another one with {option}")

    def _write_environment(self) -> None:
        """For other commands: `set -a; . .caravan/environment`."""
        lines = [
            f"{name}={shlex.quote(value)}\n" for name, value in (self.environment() | {"CARAVAN_URL": self.url}).items()
        ]
        self.environment_file.touch(mode=0o600)
        self.environment_file.write_text("".join(lines))

    def _migrate(self) -> None:
        from app.settings import sqlalchemy_url
        from app.store import migrate

        migrate.upgrade(sqlalchemy_url(self.postgres.url))

    def _programs(self) -> list[program.Program]:
        environment = self.environment()
        port = self._options.flower_port
        return [
            program.web(self.data, self._options.port, environment),
            program.worker(self.data, self._options.pool, self._worker_ready(), environment),
            *([program.flower(self.data, port, environment)] if port else []),
        ]

    def _worker_ready(self) -> Callable[[], bool]:
        """Whether a worker has a lease that was not there before: one that was killed keeps its own for a while."""
        before = self._live_workers()
        return lambda: bool(self._live_workers() - before)

    def _live_workers(self) -> set[str]:
        from app.settings import sqlalchemy_url
        from app.store import Store
        from app.store.workers import live_workers

        store = Store(sqlalchemy_url(self.postgres.url), pool_size=1, name="up")
        try:
            return {worker.worker_id for worker in store.transact(live_workers)}
        finally:
            store.close()


def up(options: Options) -> None:
    """Runs until Ctrl-C or SIGTERM. Raises LocalError: something is in the way, or a part died."""
    with locked(options.data), contextlib.suppress(Stopped), Supervisor(Terminal()) as supervisor:
        installation = Installation(options)
        began = time.monotonic()
        installation.start(supervisor, lambda what: print(f"caravan: {what}", flush=True))
        print(f"caravan: ready after {time.monotonic() - began:.1f} s\n{_where(installation)}", flush=True)
        supervisor.wait()


def default_folder(name: str = "") -> Path:
    """`.caravan` here; for root, whose own folders Postgres's account cannot enter, one of this place elsewhere."""
    folder = FOLDER.resolve() / name
    if os.geteuid() != 0 or first_closed(folder.parent) is None:
        return folder
    place = hashlib.sha256(str(FOLDER.resolve()).encode()).hexdigest()[:12]
    return SYSTEM_FOLDER / place / name


@contextlib.contextmanager
def locked(data: Path) -> Iterator[None]:
    """One installation at a time in a data folder, which is made if it is missing. Raises LocalError."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / "lock").open("a+")
    except OSError as error:
        raise LocalError(f"the data folder {data} cannot be used: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise LocalError(f"the data folder {data} is in use by process {lock.read().strip()}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def sealing_key(data: Path) -> str:
    """The data folder's key for SEALING_KEYS, made on the first start."""
    from app.identity.sealing import make_sealing_key

    file = data / "sealing-key"
    if not file.exists():
        new = file.with_suffix(".new")
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)
        new.write_text(make_sealing_key())
        new.rename(file)
    return file.read_text()


def listed_models(model_url: str) -> list[str]:
    """The ids that an OpenAI-compatible server lists. Raises LocalError: it does not answer, or lists none."""
    try:
        with urllib.request.urlopen(f"{model_url}/models", timeout=10) as response:  # noqa: S310  # the user's own URL
            ids = [str(model["id"]) for model in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LocalError(f"the model server does not answer at {model_url}/models: {error}") from None
    if not ids:
        raise LocalError(f"the model server lists no models at {model_url}/models: name one with --model")
    return ids


def _where(installation: Installation) -> str:
    environment = installation.environment()
    lines = [
        f"  API       {installation.url}/v1",
        f"  API docs  {installation.url}/docs",
        f"  health    {installation.url}/v1/health",
        *([f"  Flower    {installation.flower_url}"] if installation.flower_url else []),
        f"  model     {', '.join(installation.models)} at {installation.model_url}",
        f"  vectors   of {environment['EMBEDDING_MODEL']} at {environment['EMBEDDING_URL']}",
        f"  data      {installation.data}",
        f"  settings  set -a; . {shlex.quote(str(installation.environment_file))}; set +a",
        "Ctrl-C stops everything.",
    ]
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
