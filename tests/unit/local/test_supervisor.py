"""The supervisor with real child processes: all up, or all down."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from app.local.server import LocalError
from app.local.supervisor import LogFiles, Stopped, Supervisor, Terminal
from tests.support import ROOT, wait_until
from tests.unit.local.fake import SERVES, Fake

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVES
WITH_GRANDCHILD = "import subprocess, sys; subprocess.Popen(['sleep', '600']); " + SERVES

SUPERVISE = """
import sys
from pathlib import Path
from app.local.supervisor import Stopped, Supervisor, Terminal
from tests.unit.local.fake import Fake
folder = Path(sys.argv[1])
try:
    with Supervisor(Terminal()) as supervisor:
        supervisor.start(Fake("one", folder), Fake("two", folder))
        print("all ready", flush=True)
        supervisor.wait()
except Stopped:
    print("stopped", flush=True)
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(folder: Path) -> list[int]:
    return [int((folder / f"{name}.ready").read_text()) for name in ("one", "two")]


def supervise(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "all ready\n"
    return process


def test_start_returns_when_all_are_ready_and_leaving_stops_all(tmp_path: Path) -> None:
    with Supervisor(LogFiles()) as supervisor:
        supervisor.start(Fake("one", tmp_path), Fake("two", tmp_path))
        started = pids(tmp_path)
        assert all(lives(pid) for pid in started)
    assert not any(lives(pid) for pid in started)


def test_a_child_that_dies_stops_all_and_is_named(tmp_path: Path) -> None:
    with Supervisor(LogFiles()) as supervisor:
        supervisor.start(Fake("one", tmp_path), Fake("two", tmp_path))
        one, two = pids(tmp_path)
        os.kill(two, signal.SIGKILL)
        with pytest.raises(LocalError, match="two ended by SIGKILL"):
            supervisor.wait()
    assert not lives(one)


def test_a_child_that_ends_before_it_is_ready_is_named_with_its_status(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="one ended with status 3"), Supervisor(LogFiles()) as supervisor:
        supervisor.start(Fake("one", tmp_path, "raise SystemExit(3)"))


def test_a_child_that_is_not_ready_in_time_is_named(tmp_path: Path) -> None:
    slow = Fake("slow", tmp_path, "import time; time.sleep(600)")
    slow.ready_seconds = 0.2
    with pytest.raises(LocalError, match=r"slow was not ready within 0\.2 s"), Supervisor(LogFiles()) as supervisor:
        supervisor.start(slow)


def test_a_child_that_ignores_its_signal_is_killed_after_its_grace(tmp_path: Path) -> None:
    stubborn = Fake("one", tmp_path, STUBBORN)
    stubborn.grace_seconds = 0.2
    with Supervisor(LogFiles()) as supervisor:
        supervisor.start(stubborn)
        pid = stubborn.pid
        assert pid
    assert not lives(pid)


def test_what_a_child_has_started_ends_with_it(tmp_path: Path) -> None:
    with Supervisor(LogFiles()) as supervisor:
        supervisor.start(Fake("one", tmp_path, WITH_GRANDCHILD))
        (grandchild,) = psutil.Process(int((tmp_path / "one.ready").read_text())).children()
    wait_until(lambda: not lives(grandchild.pid))


def test_each_line_stands_behind_its_servers_name(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Supervisor(Terminal(shown)) as supervisor:
        supervisor.start(Fake("one", tmp_path, "print('hello\\nworld'); " + SERVES))
    assert shown.getvalue() == "one      | hello\none      | world\n"


def test_work_beside_the_servers_gives_its_result_or_its_error(tmp_path: Path) -> None:
    with Supervisor(LogFiles()) as supervisor:
        assert supervisor.run(lambda: 42) == 42
        with pytest.raises(ZeroDivisionError):
            supervisor.run(lambda: 1 // 0)


def test_work_beside_the_servers_is_left_when_one_dies(tmp_path: Path) -> None:
    def never() -> None:
        wait_until(lambda: False, timeout=30)

    with Supervisor(LogFiles()) as supervisor:
        supervisor.start(Fake("one", tmp_path))
        os.kill(int((tmp_path / "one.ready").read_text()), signal.SIGKILL)
        with pytest.raises(LocalError, match="one ended"):
            supervisor.run(never)


def test_a_signal_is_an_orderly_end(tmp_path: Path) -> None:
    with Supervisor(LogFiles()) as supervisor:
        supervisor.start(Fake("one", tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            supervisor.wait()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_supervisor_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    process = supervise(tmp_path)
    started = pids(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert output == "stopped\n"
    assert not any(lives(pid) for pid in started)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel tells a child that its parent was killed")
def test_a_supervisor_that_is_killed_leaves_no_child(tmp_path: Path) -> None:
    process = supervise(tmp_path)
    started = pids(tmp_path)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(lives(pid) for pid in started))
