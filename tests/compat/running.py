"""One running Caravan, and the SDKs' programs against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from app.local.valkey import Valkey
from tests.compat.sdks import Sdk
from tests.compat.table import Outcomes, outcome
from tests.support.mcp_server import McpServer
from tests.support.nodes import TURN_POOL, web_process, worker_process
from tests.support.scripted_model import DIMENSIONS, ScriptedModel

MODELS = "meta-llama/Llama-3.2-3B-Instruct,scripted"
EMBEDDING_MODEL = "embedder"
PROGRAM_SECONDS = 300.0
AT_ONCE = 4
"""Programs at once: they mostly wait, for each other's CPU too, and a check has a time limit."""


class ProgramFailed(Exception):
    """A program ended before its last check; the message is what it printed."""


@dataclass(frozen=True)
class System:
    """Where a Caravan, its scripted model and an MCP server listen."""

    url: str
    model_url: str
    mcp_url: str


@contextmanager
def running_system(database_url: str, folder: Path) -> Iterator[System]:
    """A web process and a turn-pool worker on a migrated database, and what they need besides; logs in the folder."""
    with ExitStack() as servers:
        model = servers.enter_context(ScriptedModel())
        mcp = servers.enter_context(McpServer())
        environment = {
            "DATABASE_URL": database_url,
            "REDIS_URL": servers.enter_context(Valkey(folder)).url,
            "INFERENCE_URL": model.url,
            "INFERENCE_MODEL": MODELS,
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
        _register_embedding_model(url)
        yield System(url, model.url, mcp.url)


def _register_embedding_model(url: str) -> None:
    model = {"model_id": EMBEDDING_MODEL, "model_type": "embedding", "provider_id": "model-server"}
    body = {**model, "metadata": {"embedding_dimension": DIMENSIONS}}
    httpx.post(f"{url}/v1/models", json=body, timeout=60).raise_for_status()


def run_sdks(sdks: Sequence[Sdk], system: System) -> dict[str, Outcomes]:
    """What came of each SDK's checks, by the SDK's name. Raises ProgramFailed."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip([sdk.name for sdk in sdks], pool.map(lambda sdk: run_sdk(sdk, system), sdks), strict=True))


def run_sdk(sdk: Sdk, system: System, checks: Sequence[str] = (), stderr: int = subprocess.PIPE) -> Outcomes:
    """What came of its checks, or of those named, by program. Raises ProgramFailed."""
    return {program: _run_program(sdk, program, system, checks, stderr) for program in sdk.programs}


def _run_program(sdk: Sdk, program: str, system: System, checks: Sequence[str], stderr: int) -> dict[str, str]:
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "LANG": "C.UTF-8",
        "CARAVAN_URL": system.url,
        "MCP_URL": system.mcp_url,
        "MODEL_CONTROL_URL": system.model_url.removesuffix("/v1") + "/control",
        "SDK_HOME": str(sdk.home),
        "SDK_PACKAGE": sdk.package,
    }
    process = subprocess.Popen(
        [*sdk.command(program), *checks],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=PROGRAM_SECONDS)
    except subprocess.TimeoutExpired as expired:
        raise ProgramFailed(f"{sdk.name}: {program}: no end within {PROGRAM_SECONDS:g} s") from expired
    finally:
        _kill_group(process)
    if process.returncode:
        raise ProgramFailed(f"{sdk.name}: {program} ended with {process.returncode}:\n{errors}")
    lines = [json.loads(line) for line in output.splitlines()]
    return {line["check"]: outcome(sdk.name, line) for line in lines}


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Node runs below a launcher."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
