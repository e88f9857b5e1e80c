"""One installation for all programs: web, a worker, a scripted model, and the servers that tools ask."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from app.local.embeddings import Embeddings
from app.local.valkey import Valkey
from tests.compat.sdks import install
from tests.demos.running import EXAMPLES, SEED_SDK, Run, run_demo, run_example
from tests.support.nodes import TURN_POOL, web_process, worker_process
from tests.support.scripted_model import ScriptedModel
from tests.support.search_server import SearchServer

WORKERS_KEY = "tvly-of-the-worker"


@dataclass(frozen=True)
class Installation:
    """`documents`: the URL of docs/examples/resources, on the loopback."""

    url: str
    model: ScriptedModel
    search: SearchServer
    documents: str


@pytest.fixture(scope="package")
def documents() -> Iterator[str]:
    """The URL of docs/examples/resources."""
    with served(EXAMPLES / "resources") as url:
        yield url


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves the files of a folder on the loopback; gives its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture(scope="package")
def running(
    migrated_database: Callable[[str], str], documents: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("demos")
    with ExitStack() as servers:
        model = servers.enter_context(ScriptedModel())
        search = servers.enter_context(SearchServer())
        environment = {
            "DATABASE_URL": migrated_database("caravan_demos"),
            "REDIS_URL": servers.enter_context(Valkey(folder)).url,
            "INFERENCE_URL": model.url,
            "INFERENCE_MODEL": "scripted",
            "EMBEDDING_URL": servers.enter_context(Embeddings(folder)).url,
            "WEB_SEARCH_URL": search.url,
            "TAVILY_SEARCH_API_KEY": WORKERS_KEY,
            "FETCH_ALLOWED": documents.removeprefix("http://"),
            "SEALING_KEYS": base64.b64encode(bytes(32)).decode(),
            "UPKEEP_SECONDS": "0.5",
            "XDG_DATA_HOME": str(folder),
        }
        url, web = web_process(environment, folder / "web.log")
        worker = worker_process(TURN_POOL, environment, folder / "worker.log")
        for process in (web, worker):
            servers.callback(process.stop)
            process.start()
        for process in (web, worker):
            process.wait_ready()
        yield Installation(url, model, search, documents)


@pytest.fixture
def installation(running: Installation) -> Installation:
    """The servers that stand in remember nothing of earlier tests."""
    running.model.reset()
    running.search.reset()
    return running


@pytest.fixture(scope="package")
def seed_sdk() -> None:
    """The SDK of the seed's demos is installed."""
    install([SEED_SDK])


@pytest.fixture
def demo(installation: Installation, seed_sdk: None) -> Callable[..., Run]:
    """Runs a demo of the seed, while the model says what was rehearsed."""

    def run(name: str, scripts: dict[str, str], **env: str) -> Run:
        installation.model.rehearse(scripts)
        return run_demo(name, installation.url, installation.documents, env=env)

    return run


@pytest.fixture
def example(installation: Installation, tmp_path: Path) -> Callable[..., Run]:
    """Runs one of our examples, while the model says what was rehearsed."""

    def run(name: str, scripts: dict[str, str], *options: str, **env: str) -> Run:
        installation.model.rehearse(scripts)
        return run_example(name, installation.url, *options, env=env, folder=tmp_path)

    return run
