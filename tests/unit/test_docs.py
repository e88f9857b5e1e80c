"""The documents: links lead somewhere, commands exist, the page of settings is the generated one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [path for path in (ROOT / "docs").rglob("*.md") if "resources" not in path.parts]
"""What the examples are about (docs/examples/resources) is no page."""
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|`|; )caravan ([a-z]+)(?: ([a-z]+))?", re.MULTILINE)
MAKE = re.compile(r"(?:^|`)make ([a-z]+)", re.MULTILINE)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as they are made on GitHub."""
    headings = HEADING.findall(CODE_BLOCK.sub("", path.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _help(*command: str) -> str:
    program = "from app.cli import main; main()"
    environment = {"COLUMNS": "200", "PATH": "", "NO_COLOR": "1", "TERM": "dumb"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return finished.stdout


def _commands(listing: str) -> set[str]:
    return set(re.findall(r"^[│ ]*([a-z]+)  ", listing, re.MULTILINE))


def _named() -> set[tuple[str, str]]:
    return {found for path in DOCUMENTS for found in COMMAND.findall(path.read_text())}


def test_there_are_documents() -> None:
    names = {_name(path) for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md"} <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_relative_links_resolve(path: Path) -> None:
    for link in LINK.findall(CODE_BLOCK.sub("", path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        if anchor:
            assert anchor in _anchors(there), link


def test_each_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for path in PAGES:
        assert path.name == "index.md" or f"({path.relative_to(ROOT / 'docs')})" in index, path


def test_each_command_named_exists() -> None:
    commands = _commands(_help())
    named = _named()
    assert {"up", "demo", "chat", "turns", "migrate", "doctor", "settings"} <= {name for name, _ in named}
    assert {name for name, _ in named} <= commands
    assert {second for name, second in named if name == "turns" and second} <= _commands(_help("turns"))


def test_each_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for path in DOCUMENTS for target in MAKE.findall(path.read_text())} <= targets


def test_the_page_of_settings_is_the_generated_one() -> None:
    """`caravan settings --markdown > docs/settings.md` writes it."""
    from app.cli.settings import _markdown

    assert (ROOT / "docs" / "settings.md").read_text() == _markdown()


def test_decisions_are_numbered_and_say_what_a_decision_must() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(path.name[:4]) for path in pages] == list(range(1, len(pages) + 1))
    for path in pages:
        headings = HEADING.findall(path.read_text())
        assert headings[1:5] == ["Context", "Decision", "Alternatives", "Consequences"], path.name


def test_each_test_named_exists() -> None:
    """What docs/guarantees.md says is proven, is."""
    named = {each for path in DOCUMENTS for each in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text())}
    assert len(named) > 50
    for path, test in sorted(named):
        assert re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{test}"
