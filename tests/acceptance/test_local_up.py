"""`caravan up` as a person runs it: it starts, serves, keeps its data, and leaves nothing running."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from llama_stack_client import LlamaStackClient

from tests.support import ROOT
from tests.support.caravan_up import CARAVAN, up
from tests.support.scripted_model import ScriptedModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _environment(process: psutil.Process) -> dict[str, str]:
    """Empty: it was a helper that has ended since."""
    try:
        return process.environ()
    except psutil.NoSuchProcess:
        return {}


def create_agent(url: str) -> str:
    answer = httpx.post(
        f"{url}/v1/agents", json={"agent_config": {"model": "scripted", "instructions": "Be brief."}}, timeout=60
    )
    answer.raise_for_status()
    return str(answer.json()["agent_id"])


def run_turn(url: str, agent_id: str) -> httpx.Response:
    created = httpx.post(
        f"{url}/v1/agents/{agent_id}/session", json={"session_name": "s"}, timeout=60
    ).raise_for_status()
    turn = {"messages": [{"role": "user", "content": "SAY from the caravan"}], "stream": False}
    path = f"{url}/v1/agents/{agent_id}/session/{created.json()['session_id']}/turn"
    return httpx.post(path, json=turn, timeout=120).raise_for_status()


def assert_finds_by_meaning(url: str) -> None:
    """A store that names no model, and a database as programs for Llama Stack name it, with the embedded MiniLM."""
    with LlamaStackClient(base_url=url) as client:
        databases = [client.vector_stores.create(name="s").id, "my-documents"]
        body = {"vector_db_id": databases[1], "embedding_model": "all-MiniLM-L6-v2", "embedding_dimension": 384}
        client.post("/v1/vector-dbs", body=body, cast_to=object)
        texts = ["Camels can go without water for weeks.", "Shares fell by two percent.", "Bread is made of flour."]
        for database in databases:
            chunks: Any = [
                {"content": text, "metadata": {"document_id": text}, "chunk_metadata": {"chunk_id": text}}
                for text in texts
            ]
            client.vector_io.insert(vector_db_id=database, chunks=chunks)
            found = client.vector_io.query(vector_db_id=database, query="Which animal is seldom thirsty?")
            assert found.chunks[0].content == texts[0]


def test_up_serves_keeps_its_data_and_leaves_nothing_running(open_path: Path) -> None:
    with ScriptedModel() as model:
        with up(open_path / "data", f"--model-url={model.url}") as first:
            assert httpx.get(f"{first.url}/v1/health", timeout=60).status_code == 200
            agent_id = create_agent(first.url)
            turn = run_turn(first.url, agent_id)
            assert turn.json()["output_message"]["content"].strip() == "from the caravan"
            assert turn.headers["X-Caravan-Worker"]
            assert_finds_by_meaning(first.url)
            assert first.interrupt() == 0
            assert first.left() == []
        sealing_key = open_path / "data" / "sealing-key"
        made = sealing_key.read_text()
        assert stat.S_IMODE(sealing_key.stat().st_mode) == 0o600
        with up(open_path / "data", f"--model-url={model.url}", "--no-flower") as second:
            assert httpx.get(f"{second.url}/v1/agents/{agent_id}", timeout=60).status_code == 200
            assert sealing_key.read_text() == made
            knowing = [_environment(child).get("SEALING_KEYS") == made for child in second.children]
            assert sum(knowing) >= 2, "web and worker have the key"
            second.process.kill()
            second.process.wait()
            _, alive = psutil.wait_procs(second.children, timeout=60)
            assert [child for child in alive if child in second.left()] == []


def test_a_port_in_use_is_one_clear_line(open_path: Path) -> None:
    with ScriptedModel() as model:
        command = [*CARAVAN, "up", f"--data={open_path}", f"--port={model.port}", "--no-flower"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"caravan: port {model.port} is in use: name another one with --port\n"
