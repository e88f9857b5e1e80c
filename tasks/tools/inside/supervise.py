"""The first process of the sandbox: lays out the files, runs the code in a child, stops it at its limits, and gathers
what it left.

It is process 1 of its namespace: no signal from there reaches it, and whatever is left goes with it.

Standard input: one line of JSON, then the contents of its `files` in order. It stays open: its end means that the
worker is gone. Standard output: one line of JSON, then the contents of its `files`.

    {"code", "filter", "files": [[name, size]], "seconds", "memory_bytes", "processes", "files_bytes", "max_files",
     "output_bytes"}
    {"ended", "stdout", "stderr", "files": [[name, size]], "left_out": [name]}

`ended`: "exit <status>", "signal <number>", or the limit that stopped it: "seconds"; "max_files", "files_bytes", with
which no file is kept.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

NOBODY = 65533
"""Who the code runs as if the worker is root; nobody else is, by Debian's and systemd's lists."""

FOLDER = "/session"
TEMPORARY = "/tmp"  # noqa: S108 — the sandbox's own
EXECUTE = "/opt/caravan/execute.py"
TICK_SECONDS = 0.1
MAX_PATH_BYTES = 512
READ_BYTES = 65536

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

Request = dict[str, Any]


class Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    # What the worker let slip: one of these would be a way to write the answer.
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    as_root = os.getuid() == 0
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user has cleared it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if line:
        request = json.loads(line)
        lay_out(request["files"], sys.stdin.buffer)
        reply(request, *run(request, as_root))


def prctl(option: int, value: int = 0, pointer: Any = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def lay_out(files: list[tuple[str, int]], source: BinaryIO) -> None:
    for name, size in files:
        path = os.path.join(FOLDER, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            file.write(source.read(size))


def run(request: Request, as_root: bool) -> tuple[str, list[str]]:
    """How it ended, and its standard output and standard error."""
    with open(os.memfd_create("code"), "w+b") as code:
        code.write(request["code"].encode(errors="replace"))
        code.seek(0)
        out, err = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            become_the_code(request, as_root, [code.fileno(), out[1], err[1]])
    os.close(out[1])
    os.close(err[1])
    outputs = {out[0]: Kept(request["output_bytes"]), err[0]: Kept(request["output_bytes"])}
    ended = watch(child, outputs, request)
    kill_all()
    for descriptor, kept in outputs.items():
        while data := os.read(descriptor, READ_BYTES):
            kept.add(data)
    if used_inodes() > request["max_files"]:  # made since it was last looked, and too many for the next call's folder
        ended = "max_files"
    return ended, [kept.text() for kept in outputs.values()]


def become_the_code(request: Request, as_root: bool, standard: list[int]) -> None:
    """Never returns. No privilege is left after it, nor a way to any."""
    try:
        os.chdir(FOLDER)
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
        if as_root:
            # So that the limit of processes counts these and no other sandbox's (setrlimit(2), user_namespaces(7)).
            # The capabilities that come with it go in execve.
            os.unshare(os.CLONE_NEWUSER)
        os.nice(19)  # the worker and its other turns go first
        set_limits(request, beside=0 if as_root else 1)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        set_filter(base64.b64decode(request["filter"]))
        os.execv(sys.executable, [sys.executable, "-I", "-B", EXECUTE])  # noqa: S606 — no shell is meant
    except BaseException as error:
        os.write(2, f"the sandbox failed: {error!r}\n".encode())
    finally:
        os._exit(70)


def set_limits(request: Request, beside: int) -> None:
    """`beside`: processes of the same user namespace that are not the code's."""
    limits = {
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_NPROC: request["processes"] + beside,
        resource.RLIMIT_FSIZE: request["files_bytes"],
        resource.RLIMIT_CPU: int(request["seconds"]) + 1,
        resource.RLIMIT_NOFILE: 64,  # each socket or pipe may hold 200 KB of the kernel's memory
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))


def set_filter(lines: bytes) -> None:
    program = Program(len(lines) // 8, lines)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def watch(child: int, outputs: dict[int, Kept], request: Request) -> str:
    """Until the code ends or is to be stopped: how that was."""
    ending = os.pidfd_open(child)
    deadline = time.monotonic() + request["seconds"]
    poll = select.poll()
    for descriptor in (0, ending, *outputs):
        poll.register(descriptor, select.POLLHUP if descriptor == 0 else select.POLLIN)
    while True:
        for descriptor, _ in poll.poll(TICK_SECONDS * 1000):
            if descriptor == 0:
                os._exit(1)  # the worker is gone; all other processes go with this one
            if descriptor == ending:
                return how(os.waitpid(child, 0)[1])
            data = os.read(descriptor, READ_BYTES)
            outputs[descriptor].add(data)
            if not data:
                poll.unregister(descriptor)
        if time.monotonic() > deadline:
            return "seconds"
        if used_inodes() > request["max_files"]:
            return "max_files"
        reap(child)


def how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit {code}" if code >= 0 else f"signal {-code}"


def used_inodes() -> int:
    """Empty files take memory that no size of a tmpfs counts."""
    return sum(found.f_files - found.f_ffree for found in map(os.statvfs, (FOLDER, TEMPORARY)))


def reap(child: int) -> None:
    """Takes up what orphans leave behind, which counts as processes."""
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == child:
                return
            os.waitpid(found.si_pid, 0)


def kill_all() -> None:
    """Everything but this process, in the background too. What forks at that moment dies as well."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


class Kept:
    """The beginning and the end of what a program prints, in `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.half = limit // 2
        self.first = b""
        self.last = b""
        self.left_out = 0

    def add(self, data: bytes) -> None:
        room = self.half - len(self.first)
        self.first += data[:room]
        self.last += data[room:]
        surplus = max(0, len(self.last) - self.half)
        self.left_out += surplus
        self.last = self.last[surplus:]

    def text(self) -> str:
        if self.left_out:
            gap = f"\n[… {self.left_out} bytes left out …]\n".encode()
            return (self.first + gap + self.last).decode(errors="replace")
        return (self.first + self.last).decode(errors="replace")


def reply(request: Request, ended: str, outputs: list[str]) -> None:
    files: list[tuple[str, bytes]] = []
    left_out: list[str] = []
    room = request["files_bytes"]
    for name, content in gather(room) if ended != "max_files" else ():
        if content is None:
            left_out.append(repr(name)[:100])
            continue
        room -= len(content)
        if room < 0:  # by holes in files, or several names of one
            ended, files = "files_bytes", []
            break
        files.append((name, content))
    head = {
        "ended": ended,
        "stdout": outputs[0],
        "stderr": outputs[1],
        "files": [[name, len(content)] for name, content in files],
        "left_out": left_out[:20],
    }
    sys.stdout.buffer.write(json.dumps(head, ensure_ascii=False).encode() + b"\n")
    for _, content in files:
        sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def gather(most: int) -> Iterator[tuple[str, bytes | None]]:
    """Each regular file of the folder, up to `most` bytes and one more; None: it is none, or cannot be kept.

    Nothing is followed: each folder and file is opened from the one above it, and looked at once it is open.
    """
    for folder, _, names, descriptor in os.fwalk(FOLDER, follow_symlinks=False):
        for name in sorted(names):
            path = os.path.relpath(os.path.join(folder, name), FOLDER)
            yield path, read(name, descriptor, most + 1) if good_name(path) else None


def good_name(path: str) -> bool:
    """That everyone who shows it can write, and that means one file everywhere."""
    with contextlib.suppress(UnicodeEncodeError):
        return len(path.encode()) <= MAX_PATH_BYTES and path.isprintable() and "\\" not in path
    return False


def read(name: str, folder: int, most: int) -> bytes | None:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        return file.read(most) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


if __name__ == "__main__":
    main()
