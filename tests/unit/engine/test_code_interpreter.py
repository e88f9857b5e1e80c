"""One call of the code interpreter: what the model is told, and what is to be recorded."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import psutil
import pytest
import uvloop

from app.settings import Settings
from app.store.session_files import Changes
from tasks.tools import jail
from tasks.tools.code_interpreter import CodeInterpreter
from tasks.tools.sandbox import Limits, Sandbox
from tests.support import wait_until

SETTINGS = Settings(_env_file=None, database_url="postgresql://unused", sandbox_files_max_bytes=65_536)
linux = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's alone")


class Recorded(CodeInterpreter):
    """Whose folder is recorded after each call."""

    def __init__(self, **files: bytes) -> None:
        super().__init__(Sandbox(Limits.of(SETTINGS), 1), self.folder, "/turn")
        self.files = files
        self.recorded: Changes = {}

    async def folder(self) -> dict[str, bytes]:
        return dict(self.files)

    async def said(self, code: str) -> str:
        result = await self.run({"code": code})
        self.recorded = self.take_changes()
        folder = {**self.files, **self.recorded}
        self.files = {name: content for name, content in folder.items() if content is not None}
        return str(result.content)


@linux
async def test_what_a_call_changed_is_told_once() -> None:
    """New, changed and removed files; hidden ones are kept, and not shown."""
    code = Recorded(old=b"1", gone=b"1", same=b"1")
    program = "import os\nos.remove('gone')\nfor n in 'old', 'new', '.hidden':\n    open(n, 'w').write('2')"
    result = await code.run({"code": program})
    assert result.content == "completed\nFiles made or changed, which the user is shown: new, old"
    assert [each["content"]["uri"] for each in result.metadata["attachments"]] == [
        "/turn/attachments/new",
        "/turn/attachments/old",
    ]
    assert code.take_changes() == {"old": b"2", "new": b"2", ".hidden": b"2", "gone": None}
    assert code.take_changes() == {}


@linux
async def test_the_next_call_has_what_was_recorded() -> None:
    code = Recorded(old=b"1", gone=b"1")
    await code.said("import os\nos.remove('gone')\nopen('.hidden', 'w').write('2')")
    assert await code.said("sorted(__import__('os').listdir())") == (
        "completed\n[stdout]\n['.hidden', 'old']\n[/stdout]"
    )


@linux
async def test_a_folder_that_is_too_large_is_not_kept() -> None:
    """And the next call has the one before."""
    code = Recorded(a=b"1")
    fill = "for n in range(3):\n    open(f'f{n}', 'w').write('x' * 30_000)"
    assert await code.said(fill) == (
        "error: nothing of the folder is kept: its files have more than 65536 bytes (SANDBOX_FILES_MAX_BYTES)"
    )
    assert code.recorded == {}
    assert await code.said("__import__('os').listdir()") == "completed\n[stdout]\n['a']\n[/stdout]"


@linux
async def test_a_folder_of_many_small_files_can_be_restored() -> None:
    """Though each takes a page of memory."""
    code = Recorded(**{f"f{n}": b"x" * 60 for n in range(900)})
    assert await code.said("len(__import__('os').listdir())") == "completed\n[stdout]\n900\n[/stdout]"


@linux
async def test_a_folder_of_too_many_files_is_not_kept() -> None:
    """Whether the code was stopped there or had ended: the next call would have no room in it."""
    code = Recorded(a=b"1")
    for more in ("", "\nimport time\ntime.sleep(60)"):
        said = await code.said(f"for n in range(1001):\n    open(f'f{{n}}', 'w').close(){more}")
        assert said.startswith("error: nothing of the folder is kept: it made more than 1000 files")
    assert await code.said("__import__('os').listdir()") == "completed\n[stdout]\n['a']\n[/stdout]"
    full = Recorded(**{f"f{n}": b"" for n in range(998)})
    assert (await full.said("len(__import__('os').listdir())")).startswith("completed")


@linux
async def test_code_that_is_no_text_is_run_as_far_as_it_is() -> None:
    assert "[stdout]\n?\n[/stdout]" in await Recorded().said("print('\ud800')")


CANCELLED_AFTER = (0, 0.003, 0.01, 0.03, 0.06, 0.09, 0.12, 0.2)


@linux
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_call_can_be_cancelled_at_any_time(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """While it starts, runs, or answers with more than a pipe holds: it ends at once, and no process is left."""

    async def cancel_each() -> None:
        code = Recorded()
        await code.said("1")
        for program in ("import time\ntime.sleep(600)", "open('f', 'w').write('x' * 60_000)"):
            for seconds in CANCELLED_AFTER:
                call = asyncio.create_task(code.run({"code": program}))
                await asyncio.sleep(seconds)
                call.cancel()
                assert (await asyncio.wait([call], timeout=60))[0]

    before = {*psutil.Process().children(recursive=True)}
    run(cancel_each())
    wait_until(lambda: {*psutil.Process().children(recursive=True)} <= before)


async def test_where_there_is_no_sandbox_nothing_is_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is told what is missing; the log says it once."""
    monkeypatch.setattr(jail, "bubblewrap", lambda: "/bin/false")
    code = Recorded()
    with caplog.at_level(logging.WARNING):
        told = {await code.said("1 + 1"), await code.said("1 + 1")}
    [only] = told
    assert only.startswith("The code interpreter cannot be used. The worker cannot make a sandbox: ")
    assert [record.message for record in caplog.records if "cannot be used" in record.message] != []
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1


@pytest.mark.parametrize("arguments", [{}, {"code": 1}, {"query": "1"}])
async def test_without_code_the_model_is_told_what_is_missing(arguments: dict[str, object]) -> None:
    result = await Recorded().run(arguments)
    assert result.content == "The argument `code` is missing: give the Python code, as text."
