"""Code in a bubblewrap sandbox: its own view of the files, no network, no other process, limits on all that it takes.

Nothing here ever runs code outside. What it sees: this Python and its standard library, pandas, numpy, matplotlib and
what these need, and the system's shared libraries, all read-only; three devices; its own `/session` and `/tmp`, which
are memory of a limited size. What it does not: the machine's other files, `/proc`, the environment, the project.

That all this holds is tried, not assumed, before anything else is run: `Sandbox.trial`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import BaseModel, NonNegativeInt

from app.settings import Settings
from tasks.tools import jail, seccomp
from tasks.tools.jail import Unsandboxed as Unsandboxed

logger = logging.getLogger(__name__)

MAX_FILES = 1000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
"""A file in memory takes whole pages."""

GRACE_SECONDS = 10
"""For starting, and for gathering what was left, beside the time that the code has."""

WATCH_SECONDS = 0.2
COMPLAINT_BYTES = 4096
REPLY_BYTES = 1_048_576
"""For all but the contents of files and what was printed."""

ESCAPES = """
import errno, json, os, socket, time
def refused(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno
def forks():
    for number in range(100):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
print(json.dumps({
    "files": any(map(os.path.exists, ("/etc/passwd", "/home", "/proc", "/root", "/run", "/sys", "/var"))),
    "user": os.geteuid() == 0,
    "network": refused(lambda: socket.socket(socket.AF_INET)) != errno.EPERM,
    "namespaces": refused(lambda: os.unshare(os.CLONE_NEWUSER)) != errno.EPERM,
    "processes": refused(forks) != errno.EAGAIN,
}))
"""
"""Prints which of its attempts to break out succeeded: none may."""


class Broken(Exception):
    """The sandbox gave no answer. The message says why, as far as that is known."""


@dataclass(frozen=True)
class Limits:
    """Of one run. `memory_bytes`: of each process, and of all together. `output_bytes`: kept of each output."""

    seconds: float
    memory_bytes: int
    processes: int
    files_bytes: int
    output_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            seconds=settings.sandbox_timeout_seconds,
            memory_bytes=settings.sandbox_memory_max_bytes,
            processes=settings.sandbox_max_processes,
            files_bytes=settings.sandbox_files_max_bytes,
            output_bytes=settings.sandbox_output_max_bytes,
        )


@dataclass(frozen=True)
class Ran:
    """How a run ended (see `inside/supervise.py`), what it printed, all files of its folder, and what was left out."""

    ended: str
    stdout: str
    stderr: str
    files: dict[str, bytes] = field(repr=False)
    left_out: list[str]


class Sandbox:
    """Of one worker process. `places`: for `at_once` runs beside each other; others wait."""

    def __init__(self, limits: Limits, at_once: int) -> None:
        self.limits = limits
        self.places = asyncio.Semaphore(at_once)
        self._tried = False
        self._told = ""
        self._trying = asyncio.Lock()

    async def run(self, code: str, files: Mapping[str, bytes]) -> Ran:
        """Runs Python code in a folder that has these files; whoever calls it has one of the `places`. A cancellation
        kills the code with all that it has started.

        Raises Unsandboxed, Broken.
        """
        await self.trial()
        return await _run(code, files, self.limits)

    async def trial(self) -> None:
        """Until it has gone well once, runs what must fail in a sandbox.

        Raises Unsandboxed: there is none here, or it would not hold.
        """
        async with self._trying:
            if not self._tried:
                try:
                    await _try(self.limits)
                except Unsandboxed as missing:
                    if str(missing) != self._told:
                        self._told = str(missing)
                        logger.warning("the code interpreter cannot be used: %s", missing)
                    raise
                self._tried = True


async def _try(limits: Limits) -> None:
    try:
        ran = await _run(ESCAPES, {}, limits)
    except Broken as broken:
        raise Unsandboxed(f"The worker cannot make a sandbox: {broken} {_advice()}") from broken
    if ran.ended != "exit 0":
        raise Unsandboxed(f"The worker's sandbox does not work: {ran.ended} {ran.stderr}. {_advice()}")
    succeeded = [what for what, held in json.loads(ran.stdout).items() if held]
    if succeeded:
        raise Unsandboxed(f"The worker's sandbox does not hold ({', '.join(succeeded)}). {_advice()}")


def _advice() -> str:
    if os.geteuid() == 0:
        return "As root it needs CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID; or run the worker as another user."
    return "It needs unprivileged user namespaces, and leave to mount in them: see `The sandbox` in docs/operations.md."


async def _run(code: str, files: Mapping[str, bytes], limits: Limits) -> Ran:
    """Raises Unsandboxed, Broken."""
    request = _request(code, files, limits)
    starting = asyncio.create_task(_start(limits))
    try:
        return await _converse(await asyncio.shield(starting), request, limits)
    finally:
        await _end(await starting)


async def _start(limits: Limits) -> Process:
    """Raises Unsandboxed, Broken."""
    try:
        return await asyncio.create_subprocess_exec(
            *jail.command(limits.files_bytes + MAX_FILES * PAGE_BYTES), stdin=PIPE, stdout=PIPE, stderr=PIPE, env={}
        )
    except OSError as error:
        raise Broken(f"bubblewrap cannot be started: {error}.") from error


async def _end(process: Process) -> None:
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018
    process.stdin.close()
    if process.returncode is None:  # else its number may be another's by now
        _kill(process.pid)
    # Read to their ends, without which asyncio does not take a process for ended.
    await asyncio.gather(_read(process.stdout, 0), _read(process.stderr, 0))
    await process.wait()


def _kill(pid: int) -> None:
    """bubblewrap, and first the supervisor, whose end is that of all others in there.

    The supervisor of a worker that is root is another user, whom bubblewrap's --die-with-parent does not reach: while
    it watches the code it ends with its standard input, at other times with its standard output, or by this.
    """
    for each in (*_children(pid), pid):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _request(code: str, files: Mapping[str, bytes], limits: Limits) -> bytes:
    """Raises Unsandboxed: the calls to be refused are not known on this machine."""
    machine = os.uname().machine
    try:
        filtered = seccomp.program(machine)
    except KeyError:
        raise Unsandboxed(f"There is no sandbox on {machine}, only on {', '.join(seccomp.MACHINES)}.") from None
    head = {
        "code": code,
        "filter": base64.b64encode(filtered).decode(),
        "files": [[name, len(content)] for name, content in files.items()],
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "processes": limits.processes,
        "files_bytes": limits.files_bytes,
        "max_files": MAX_FILES,
        "output_bytes": limits.output_bytes,
    }
    return b"".join([json.dumps(head).encode(), b"\n", *files.values()])


async def _converse(process: Process, request: bytes, limits: Limits) -> Ran:
    """Raises Broken. Standard input stays open: its end would stop the run."""
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018
    with suppress(OSError, RuntimeError):  # it has ended; its standard error says why
        process.stdin.write(request)
    most = limits.files_bytes + 8 * limits.output_bytes + REPLY_BYTES
    answering = asyncio.create_task(_read(process.stdout, most))
    complaining = asyncio.create_task(_read(process.stderr, COMPLAINT_BYTES))
    watching = asyncio.create_task(_watch_memory(process.pid, limits.memory_bytes))
    tasks = [answering, complaining, watching]
    try:
        async with asyncio.timeout(limits.seconds + GRACE_SECONDS):
            await asyncio.wait([answering, watching], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                megabytes = limits.memory_bytes // 2**20
                raise Broken(f"It used more than {megabytes} MiB of memory (SANDBOX_MEMORY_MAX_BYTES), and was killed.")
            return _reply(answering.result()) or await _fail(complaining)
    except TimeoutError:
        raise Broken("It could not be stopped in time, and was killed.") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(stream: asyncio.StreamReader, most: int) -> bytes:
    """All of it; what is more than `most` is read as well, and dropped."""
    found = bytearray()
    while data := await stream.read(65536):
        found += data[: most - len(found)]
    return bytes(found)


async def _fail(complaining: asyncio.Task[bytes]) -> Ran:
    said = " ".join((await complaining).decode(errors="replace").split())
    raise Broken(f"It ended without an answer{f': {said}' if said else ''}.")


class _Head(BaseModel):
    ended: str
    stdout: str
    stderr: str
    files: list[tuple[str, NonNegativeInt]]
    left_out: list[str]


def _reply(answer: bytes) -> Ran | None:
    """None: it is not whole. Whoever broke out of the child could have written it: it is looked at like any input."""
    line, _, contents = answer.partition(b"\n")
    try:
        head = _Head.model_validate_json(line)
        files = dict(_files(head.files, contents))
    except ValueError:
        return None
    return Ran(head.ended, head.stdout, head.stderr, files, head.left_out)


def _files(listed: list[tuple[str, int]], contents: bytes) -> Iterator[tuple[str, bytes]]:
    """Raises ValueError: it is no list of files that may be kept."""
    start = 0
    for name, size in listed:
        if start + size > len(contents) or not name.isprintable() or {"", ".", ".."} & {*name.split("/")}:
            raise ValueError("no file")
        yield name, contents[start : start + size]
        start += size


async def _watch_memory(pid: int, most: int) -> None:
    """Returns when the process and its descendants have more memory of their own than they may."""
    while _own_bytes(pid) <= most:  # noqa: ASYNC110 — nobody says when
        await asyncio.sleep(WATCH_SECONDS)


def _own_bytes(pid: int) -> int:
    """Of a process and its descendants: memory that is no file's. proc(5)."""
    pages, waiting = 0, [pid]
    while waiting:
        each = waiting.pop()
        waiting += _children(each)
        with suppress(OSError):
            _, resident, shared, *_ = Path(f"/proc/{each}/statm").read_text().split()
            pages += int(resident) - int(shared)
    return pages * PAGE_BYTES
