"""The sandbox's answer is looked at like any input: whoever broke out of the code's process could have written it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.tools import sandbox, seccomp

HEAD = {"ended": "exit 0", "stdout": "", "stderr": "", "files": [], "left_out": []}


def answer(contents: bytes = b"", **changes: Any) -> bytes:
    return json.dumps(HEAD | changes).encode() + b"\n" + contents


def test_a_good_answer_is_taken() -> None:
    ran = sandbox._reply(answer(b"abc", files=[["a", 1], ["b/c", 2]]))
    assert ran is not None
    assert ran.files == {"a": b"a", "b/c": b"bc"}


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"{}",
        b"{}\n",
        b"[]\n",
        answer(files=[["a", 1]]),
        answer(b"abc", files=[["a", -1], ["b", 1]]),
        answer(b"abc", files=[["../a", 1]]),
        answer(b"abc", files=[["/etc/a", 1]]),
        answer(b"abc", files=[["a/../b", 1]]),
        answer(b"abc", files=[["a//b", 1]]),
        answer(b"abc", files=[["a\nb", 1]]),
        answer(b"abc", files=[["", 1]]),
        answer(b"abc", files=[[1, 1]]),
        answer(b"abc", files={"a": 1}),
        answer(files=None),
    ],
)
def test_any_other_is_none(wrong: bytes) -> None:
    assert sandbox._reply(wrong) is None


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_of_each_machine_is_well_formed(machine: str) -> None:
    """Whole instructions, and no jump beyond the end; whether it refuses is tried in the sandbox, on this machine."""
    program = seccomp.program(machine)
    lines = [program[at : at + 8] for at in range(0, len(program), 8)]
    assert len(program) % 8 == 0
    assert all(number + 1 + max(line[2], line[3]) < len(lines) for number, line in enumerate(lines[:-1]))
