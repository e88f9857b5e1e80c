"""The table, its page, its locks and its list of SDK bugs belong together."""

from __future__ import annotations

import re

from tests.compat.sdks import LOCKS, SDKS
from tests.compat.table import DOCUMENT, differences, outcome, page, read_results, sdk_bugs


def test_the_page_is_the_generated_one() -> None:
    """`make compat WRITE=1` writes it, also after `make lock`."""
    assert DOCUMENT.read_text() == page(read_results())


def test_the_table_has_every_sdk() -> None:
    assert list(read_results()) == [sdk.name for sdk in SDKS]


def test_each_sdk_bug_is_one_of_the_table() -> None:
    """A bug that does not show any more is taken out of the list."""
    results = read_results()
    shown = {
        (sdk, check)
        for sdk, outcomes in results.items()
        for checks in outcomes.values()
        for check, text in checks.items()
        if text.startswith("sdk: ")
    }
    assert shown == set(sdk_bugs())


def test_each_sdk_has_a_lock_with_hashes_that_names_no_registry() -> None:
    for sdk in SDKS:
        if sdk.npm:
            lock = (LOCKS / sdk.name / "package-lock.json").read_text()
            assert '"integrity"' in lock
            assert '"resolved"' not in lock, "see .ci/lock"
        else:
            lock = (LOCKS / f"{sdk.name}.txt").read_text()
            assert "--hash=sha256:" in lock
            assert not re.search(r"://|^-", lock, re.MULTILINE)


def test_differences_go_both_ways_and_do_not_mind_reasons() -> None:
    committed = {"sdk": {"p.py": {"a": "works", "b": "fails: x", "c": "fails: x", "d": "absent: x", "gone": "works"}}}
    now = {"sdk": {"p.py": {"a": "fails: y", "b": "works", "c": "fails: y", "d": "absent: x", "new": "works"}}}
    assert [line.split(": ")[2] for line in differences(now, committed)] == ["a", "b", "new", "gone"]
    assert not differences(committed, committed)
    assert len(differences({"other": {"p.py": {"a": "works"}}}, committed)) == 1


def test_reasons_are_the_same_in_every_run() -> None:
    """What is different in each run is left out, and lines are joined."""
    error = "no\n'9b0f2a52-9f0c-4a3a-a3f5-2ecb6ef0ce0d' at 127.0.0.1:40213 for resp_9b0f2a529f0c4a3aa3f5"
    line = {"check": "a", "ok": False, "error": error}
    assert outcome("openai", line) == "fails: no '…' at 127.0.0.1:… for resp_…"
    assert outcome("openai", {"check": "a", "ok": None, "error": "no a"}) == "absent: no a"
    bug = {"check": "turn_without_session_id", "ok": False, "error": "404"}
    assert outcome("llama-stack-client-0.2.23", bug).startswith("sdk: ")
    assert outcome("openai", bug) == "fails: 404"
