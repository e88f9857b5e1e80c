"""A server process ends with the process that started it, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support import ROOT, wait_until
from tests.support.scripted_model import ScriptedModel

# Starts a server, forks a process that keeps its pipe open, tells both ids, and waits to be killed.
PARENT = """
import os, time
from tests.support.scripted_model import ScriptedModel
model = ScriptedModel()
model.start()
fork = os.fork()
if fork:
    print(model.pid, fork, flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_killed_parent_takes_its_server_along() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    server, fork = map(int, parent.stdout.readline().split())
    try:
        assert is_alive(server)
        parent.kill()
        wait_until(lambda: not is_alive(server))
        assert is_alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        parent.communicate()


def test_the_end_of_the_starting_thread_is_not_the_end_of_the_server() -> None:
    model = ScriptedModel()
    thread = threading.Thread(target=model.start)
    thread.start()
    thread.join()
    try:
        for _ in range(20):
            assert model.open_streams() == 0
    finally:
        model.kill()


def test_the_ready_line_ends_with_the_url() -> None:
    for module, path in (("scripted_model", "v1"), ("mcp_server", "mcp")):
        command = [sys.executable, "-m", f"tests.support.{module}", "--port", "0"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            ready, url = server.stdout.readline().split()
            server.kill()
        assert ready == "ready"
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith(f"/{path}")
