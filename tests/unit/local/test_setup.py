"""`.ci/setup` finds a Python, and the locks hold what pyproject.toml asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT

REQUIREMENTS = ROOT / ".ci" / "requirements"
REAL = getattr(sys, "_base_executable", sys.executable)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder, and a PATH with nothing but what every machine has, and an old python3."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "cat", "cksum", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    write(tools / "python3", "#!/bin/sh\nexit 1\n")
    return tmp_path


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


def put_python(path: Path) -> None:
    write(path, f'#!/bin/sh\nexec "{REAL}" "$@"\n')


def found(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [home / "bin" / "sh", ROOT / ".ci" / "setup", "python"]
    variables = {"PATH": str(home / "bin"), "HOME": str(home), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3.12",
        "bin/python3.13",
        ".pyenv/versions/3.12.7/bin/python",
        ".pyenv/versions/3.13.0/bin/python",
        ".local/share/uv/python/cpython-3.12.8-linux-x86_64-gnu/bin/python3",
        ".asdf/installs/python/3.13.1/bin/python",
        ".local/share/mise/installs/python/3.12.1/bin/python",
    ],
)
def test_python_is_found_on_the_path_and_under_version_managers(home: Path, place: str) -> None:
    put_python(home / place)
    result = found(home)
    assert (result.returncode, result.stderr) == (0, "")
    assert Path(result.stdout.strip()).samefile(REAL)


def test_a_shim_that_does_not_work_is_passed_over(home: Path) -> None:
    """As pyenv's `python3.12` is, where no version is chosen."""
    write(home / "bin/python3.12", "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    put_python(home / ".pyenv/versions/3.12.1/bin/python")
    assert Path(found(home).stdout.strip()).samefile(REAL)


def test_a_python_can_be_named(home: Path) -> None:
    put_python(home / "own/python")
    assert Path(found(home, CARAVAN_PYTHON=str(home / "own/python")).stdout.strip()).samefile(REAL)
    refused = found(home, CARAVAN_PYTHON=str(home / "bin/python3"))
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "is not Python 3.12 or 3.13" in refused.stderr


@pytest.mark.skipif(any(Path("/opt/homebrew/opt").glob("python@3.1[23]")), reason="Homebrew has one at a fixed place")
def test_no_python_is_one_clear_line(home: Path) -> None:
    result = found(home)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "no Python 3.12 or 3.13" in result.stderr


def test_the_lock_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", (REQUIREMENTS / "all.txt").read_text(), re.MULTILINE))
    for text in [*project["dependencies"], *extras["local"], *extras["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked.get(wanted.name, "none")), f"{text}: run `make lock`"


def test_no_lock_names_an_index_or_a_host() -> None:
    for lock in REQUIREMENTS.iterdir():
        assert not re.search(r"://|^-|--(extra-)?index|--find-links", lock.read_text(), re.MULTILINE), lock.name
