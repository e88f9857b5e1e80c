"""Sandboxes made by a process of their own, as a worker makes them: by this user, or by `nobody` if this one is root.

`python -m tests.support.sandboxed` answers each line of JSON with one: {"code", "files", "limits"} with what
`Sandbox.run` gives, or {"error"}.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MIB = 2**20
FILES_BYTES, OUTPUT_BYTES, PROCESSES = 4 * MIB, 4096, 16
LIMITS: dict[str, Any] = {
    "seconds": 100,  # the code waits while anything else on the machine wants to run
    "memory_bytes": 512 * MIB,
    "processes": PROCESSES,
    "files_bytes": FILES_BYTES,
    "output_bytes": OUTPUT_BYTES,
}
SECRET = "caravan-test-secret"
USERS = ["this-user", "nobody"] if os.geteuid() == 0 else ["this-user"]


@dataclass(frozen=True)
class Ran:
    """As `tasks.tools.sandbox.Ran`. Importing `tasks` would make its application pytest-celery's."""

    ended: str
    stdout: str
    stderr: str
    files: dict[str, bytes] = field(repr=False)
    left_out: list[str]


class Jailer:
    """The process that makes sandboxes. `process.pid` has them as its descendants."""

    def __init__(self, user: str) -> None:
        self.user = user
        command = [sys.executable, "-m", "tests.support.sandboxed"]
        self.process = subprocess.Popen(
            as_nobody(command) if user == "nobody" else command,
            cwd=ROOT,
            env={**os.environ, "SECRET": SECRET},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def begin(self, code: str, files: dict[str, bytes] | None = None, **limits: Any) -> None:
        assert self.process.stdin
        encoded = {name: base64.b64encode(content).decode() for name, content in (files or {}).items()}
        job = {"code": code, "files": encoded, "limits": LIMITS | limits}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Ran:
        """Raises AssertionError: there is none, with why."""
        assert self.process.stdout
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        files = {name: base64.b64decode(content) for name, content in answer.pop("files").items()}
        return Ran(**answer, files=files)

    def run(self, code: str, files: dict[str, bytes] | None = None, **limits: Any) -> Ran:
        self.begin(code, files, **limits)
        return self.answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def descendants(self) -> list[psutil.Process]:
        """The sandboxes' processes, as this machine sees them."""
        return psutil.Process(self.process.pid).children(recursive=True)


def as_nobody(command: list[str]) -> list[str]:
    """The command as user `nobody`, who may enter the folders above what it needs, in mounts of its own."""
    needed = {Path(sys.base_prefix).resolve(), ROOT}
    closed = {path: folder for path in needed if (folder := _closed(path))}
    lines = ["set -e", "mount --make-rprivate /", "aside=$(mktemp -d)", "mount -t tmpfs -o mode=755 tmpfs $aside"]
    for number, path in enumerate(closed):
        lines += [f"mkdir $aside/{number}", f"mount --bind {shlex.quote(str(path))} $aside/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(folder))}" for folder in {*closed.values()}]
    for number, path in enumerate(closed):
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind $aside/{number} {shlex.quote(str(path))}"]
    user = ["setpriv", "--reuid=nobody", "--regid=65534", "--clear-groups"]
    lines += [f"cd {shlex.quote(str(ROOT))}", f"exec {shlex.join([*user, *command])}"]
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines)]


def _closed(path: Path) -> Path | None:
    """The first folder on the way to `path` that others may not enter."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)


async def _serve() -> None:
    from tasks.tools.sandbox import Broken, Limits, Sandbox, Unsandboxed

    loop = asyncio.get_running_loop()
    sandbox = Sandbox(Limits(**LIMITS), 1)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        job = json.loads(line)
        files = {name: base64.b64decode(content) for name, content in job["files"].items()}
        sandbox.limits = Limits(**job["limits"])
        try:
            ran = await sandbox.run(job["code"], files)
            answer = {**asdict(ran), "files": {name: base64.b64encode(it).decode() for name, it in ran.files.items()}}
        except (Broken, Unsandboxed) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
