"""The code interpreter through the SDK: files in and out, a folder that outlives its worker, code that ends with its
turn."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import psutil
import pytest
from llama_stack_client import LlamaStackClient

from app.local.valkey import Valkey
from tests.acceptance.test_cancel import cancelled
from tests.support import wait_until
from tests.support.nodes import PREFORK, TURN_POOL, Process, web_process, worker_process
from tests.support.scripted_model import ScriptedModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's alone")

GROUP = "builtin::code_interpreter"
CSV = "Year,Jan,Feb\n2021,1.4,1.7\n2022,7.5,7.9\n"


def call(code: str) -> str:
    return f"CALL code_interpreter {json.dumps({'code': code})}"


class System:
    """A web process and workers, on servers of their own."""

    def __init__(self, env: dict[str, str], logs: Path) -> None:
        self.env, self._logs = env, logs
        self.url, self._web = web_process(env, logs / "web.log")
        self._web.start()
        self.worker = self.start_worker()
        self._web.wait_ready()
        self.sdk = LlamaStackClient(base_url=self.url, max_retries=0)
        self._posting = ThreadPoolExecutor(4)

    def start_worker(self, pool: tuple[str, ...] = TURN_POOL, **env: str) -> Process:
        """The one worker from now on."""
        self.worker = worker_process(pool, self.env | env, self._logs / "worker.log")
        self.worker.start()
        self.worker.wait_ready()
        return self.worker

    def stop(self) -> None:
        for process in (self.worker, self._web):
            process.kill_all()
        self._posting.shutdown()

    def agent(self) -> Agent:
        config: Any = {"model": "scripted", "instructions": "", "toolgroups": [GROUP]}
        agent_id = self.sdk.alpha.agents.create(agent_config=config).agent_id
        return Agent(self, agent_id, self.sdk.alpha.agents.session.create(agent_id, session_name="s").session_id)

    def code(self) -> psutil.Process:
        """The process that runs code for this worker, once there is one."""
        found: list[psutil.Process] = []

        def one() -> bool:
            found[:] = self.codes()
            return len(found) == 1

        wait_until(one)
        return found[0]

    def codes(self) -> list[psutil.Process]:
        found = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.worker.pid).children(recursive=True):
                with suppress(psutil.Error):
                    found += [process] if "/opt/caravan/execute.py" in process.cmdline() else []
        return found


class Agent:
    """An agent with one session."""

    def __init__(self, system: System, agent_id: str, session_id: str) -> None:
        self.system, self.agent_id, self.session_id = system, agent_id, session_id
        self.path = f"/v1/agents/{agent_id}/session/{session_id}"

    def turn(self, script: str, **more: Any) -> Any:
        """The turn of the last event."""
        stream = self.system.sdk.alpha.agents.turn.create(
            self.session_id,
            agent_id=self.agent_id,
            messages=[{"role": "user", "content": script}],
            stream=True,
            timeout=90,
            **more,
        )
        *_, last = stream
        assert last.event is not None, last
        return last.event.payload.turn

    def begin(self, script: str) -> Future[Any]:
        return self.system._posting.submit(self.turn, script)

    def turns(self) -> list[Any]:
        turns: list[Any] = httpx.get(self.system.url + self.path, timeout=60).json()["turns"]
        return turns


def results(turn: Any) -> list[str]:
    """What the model was told of each call."""
    return [step.tool_responses[0].content for step in turn.steps if step.step_type == "tool_execution"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a web server that has inflation.csv."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "inflation.csv").write_text(CSV)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def system(
    environment: dict[str, str],
    migrated_database: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[System]:
    with Valkey(tmp_path_factory.mktemp("code-valkey")) as valkey:
        env = environment | {
            "DATABASE_URL": migrated_database("caravan_code"),
            "REDIS_URL": valkey.url,
            "FETCH_ALLOWED": "127.0.0.1",
        }
        running = System(env, tmp_path_factory.mktemp("code"))
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture
def agent(system: System, model: ScriptedModel) -> Agent:
    return system.agent()


def test_attached_files_are_read_by_their_names(agent: Agent, served: str, model: ScriptedModel) -> None:
    """The model is told the names, and none of the text."""
    code = "import pandas as pd\nprint(pd.read_csv('inflation.csv').Jan.max())\nopen('document.csv').read()"
    documents = [
        {"content": {"uri": f"{served}/inflation.csv"}, "mime_type": "text/csv"},
        {"content": "a,b\n1,2\n", "mime_type": "text/csv"},
    ]
    turn = agent.turn(f"{call(code)} | SAY done", documents=documents)
    assert results(turn) == ["completed\n[stdout]\n7.5\n'a,b\\n1,2\\n'\n[/stdout]"]
    asked = model.requests()[0]["body"]["messages"][-1]["content"]
    assert asked.endswith('in its current folder:\n- "inflation.csv" (39 bytes)\n- "document.csv" (8 bytes)')


def test_a_plot_is_an_attachment_that_the_client_fetches(system: System, agent: Agent) -> None:
    """In the stream's last event as in the stored turn; what it shows is what the file was at the turn's end."""
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()\nopen('notes.svg', 'w').write('<svg/>')"
    turn = agent.turn(f"{call(code)} | SAY done")
    assert results(turn) == [
        "completed\n[stdout]\n6\n[/stdout]\nFiles made or changed, which the user is shown: figure-1.png, notes.svg"
    ]
    plot, drawing = turn.output_attachments
    assert (plot.mime_type, drawing.mime_type) == ("image/png", "application/octet-stream")
    assert plot.content.uri == f"{agent.path}/turn/{turn.turn_id}/attachments/figure-1.png"
    assert agent.turns()[0]["output_attachments"] == [each.to_dict() for each in turn.output_attachments]
    agent.turn(f"{call('import os; os.remove("figure-1.png")')} | SAY done")
    fetched = system.sdk.get(plot.content.uri, cast_to=httpx.Response)
    assert fetched.content.startswith(b"\x89PNG")
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert fetched.headers["content-disposition"] == "attachment"
    assert (
        httpx.get(urljoin(system.url, drawing.content.uri), timeout=60).headers["content-type"]
        == "application/octet-stream"
    )


def test_what_is_no_attachment_is_not_found(system: System, agent: Agent) -> None:
    turn = agent.turn(f"{call('open("ü .txt", "w").write("x")')} | SAY done")
    [made] = turn.output_attachments
    assert httpx.get(system.url + made.content.uri, timeout=60).text == "x"
    path = f"{system.url}{agent.path}/turn/{turn.turn_id}/attachments"
    for name in ("other.txt", "%00", "..%2Fx"):
        assert httpx.get(f"{path}/{name}", timeout=60).status_code == 404
    assert (
        httpx.get(f"{system.url}{agent.path}/turn/{agent.session_id}/attachments/%C3%BC%20.txt", timeout=60).status_code
        == 404
    )


def test_calls_of_one_message_run_in_order(agent: Agent) -> None:
    """The second finds what the first left, however long that took."""
    first = "import time\ntime.sleep(0.5)\nopen('log', 'a').write('1')"
    second = "open('log', 'a').write('2'); open('log').read()"
    turn = agent.turn(f"{call(first)} & {call(second)} & {call('open("log").read()')} | SAY done")
    assert [result.splitlines()[2] for result in results(turn)] == ["1", "'12'", "'12'"]


def test_errors_are_told_and_the_turn_goes_on(agent: Agent) -> None:
    script = " | ".join([call("1 / 0"), "CALL code_interpreter {}", "CALLBAD code_interpreter {", "SAY done"])
    failed, missing, bad = results(agent.turn(script))
    assert failed.startswith("error: it ended with exit 1\n[stderr]\nTraceback (most recent call last):\n")
    assert failed.endswith("\nZeroDivisionError: division by zero\n[/stderr]")
    assert missing == "The argument `code` is missing: give the Python code, as text."
    assert "not valid JSON" in bad


def test_cancelling_a_turn_kills_its_code(system: System, agent: Agent) -> None:
    running = agent.begin(f"{call('import time; open("left", "w"); time.sleep(600)')} | SAY done")
    code = system.code()
    with httpx.Client(base_url=system.url, timeout=60) as http:
        assert cancelled(http, f"{agent.path}/turn/{agent.turns()[0]['turn_id']}") == "cancelled"
    wait_until(lambda: not code.is_running())
    with pytest.raises(AssertionError, match="cancelled"):
        running.result(60)
    assert results(agent.turn(f"{call('import os; os.listdir()')} | SAY done")) == [
        "completed\n[stdout]\n[]\n[/stdout]"
    ]


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.thorough)])
def test_the_folder_and_the_call_outlive_the_worker(system: System, agent: Agent, how: str) -> None:
    """What an earlier call left is there on the next worker, of another pool; the call in flight is made again there,
    as if it had never been made; the lost worker's code is dead."""
    agent.turn(f"{call('open("log", "w").write("earlier ")')} | SAY done")
    slow = call("import time\nopen('log', 'a').write('again ')\ntime.sleep(3)\nopen('log').read()")
    running = agent.begin(f"{slow} | {call('open("log").read()')} | SAY done")
    code = system.code()
    lost = system.worker
    if how == "killed":
        os.kill(lost.pid, signal.SIGKILL)
        wait_until(lambda: not code.is_running())
    else:
        lost.signal(signal.SIGTERM)
    system.start_worker(PREFORK if how == "killed" else TURN_POOL, DRAIN_SECONDS="0.1")
    said = "completed\n[stdout]\n'earlier again '\n[/stdout]"
    again, after = results(running.result(90))
    assert (again.startswith(said), after) == (True, said)
    lost.wait_ended()


def test_the_web_process_lists_the_tool_and_runs_nothing(system: System) -> None:
    [tool] = httpx.get(f"{system.url}/v1/tools?toolgroup_id={GROUP}", timeout=60).json()["data"]
    assert (tool["name"], tool["input_schema"]["required"]) == ("code_interpreter", ["code"])
    body = {"tool_name": "code_interpreter", "kwargs": {"code": "1 + 1"}}
    answer = httpx.post(f"{system.url}/v1/tool-runtime/invoke", json=body, timeout=60).json()
    assert answer["error_code"] == 1
    assert "in turns of agents only" in answer["error_message"]
