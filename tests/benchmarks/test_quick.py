"""The benchmark itself works: both systems start, take every load, are reported, and are gone. No time is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.client import Job, Turn, request_bytes
from tests.benchmarks.loads import QUICK
from tests.support import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_reports_every_load_and_leaves_no_process(tmp_path: Path) -> None:
    """Its exit status is 0 only if every turn of both systems ended with turn_complete."""
    document = tmp_path / "benchmarks.md"
    document.write_text("Before.\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nAfter.\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--quick", "--output", str(document)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for load in QUICK:
        assert done.stdout.count(load.name) > 1
    text = document.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "\nold\n" not in text
    assert "Caravan / llama-stack" in text
    assert _processes_in(tmp_path) == []
    assert list(tmp_path.glob("caravan-bench-*")) == []


async def test_a_stream_is_counted_however_it_is_cut() -> None:
    """Events, the first progress and the end are found across the borders of what one read gives."""
    body = (
        b'5\r\ndata: {"event_type": "step_progress"}\n\n\r\n5\r\nid: 1\ndata: {"event_type": "turn_complete"}\n\n\r\n'
    )
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + body.replace(b'": "', b'":"').replace(b"event_type", b"e") + b"0\r\n\r\n"
    for size in (1, 7, 1000):
        turn = Turn(request_bytes(Job(1, [], "{}", 1), "/turn"))
        for at in range(0, len(answer), size):
            turn.data_received(answer[at : at + size])
        turn.connection_lost(None)
        assert (turn.events, turn.problem()) == (2, None)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "refused"),
        (b'HTTP/1.1 200 OK\r\n\r\n\ndata: {"error": 1}\n\n0\r\n\r\n', "not completed after 1 events"),
        (b'HTTP/1.1 200 OK\r\n\r\n\ndata: "step_progress"\n\n\ndata: "turn_complete"\n\n', "cut off"),
    ],
)
async def test_a_turn_that_did_not_end_well_is_a_failure(answer: bytes, problem: str) -> None:
    turn = Turn(b"")
    turn.data_received(answer)
    turn.connection_lost(None)
    assert (turn.problem() or "").startswith(problem)


def _processes_in(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd().startswith(str(folder)) or str(folder) in " ".join(process.cmdline()):
                found.append(str(process))
    return found
