"""Attempts to get out of the sandbox, or to take more than it gives. Each runs in a real one."""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import wait_until
from tests.support.sandboxed import FILES_BYTES, OUTPUT_BYTES, PROCESSES, ROOT, SECRET, Jailer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's alone")

TRY = """
import errno, json, os
def outcome(attempt):
    try:
        return repr(attempt())
    except OSError as error:
        return errno.errorcode[error.errno]
"""
"""What an attempt gives, or the name of the error that refuses it."""


def outcomes(jailer: Jailer, *attempts: str, before: str = "", **limits: Any) -> list[str]:
    """Of expressions, each tried after the other in one sandbox."""
    tried = "".join(f"found.append(outcome(lambda: {attempt}))\n" for attempt in attempts)
    ran = jailer.run(f"{TRY}{before}\nfound = []\n{tried}print(json.dumps(found))", **limits)
    assert ran.ended == "exit 0", ran
    found: list[str] = json.loads(ran.stdout)
    return found


def test_no_file_of_the_machine_is_seen(jailer: Jailer) -> None:
    """Neither the system's, nor a home, nor the project's or its environment's, under their own names."""
    hidden = [
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hostname",
        "/proc/self/environ",
        "/proc/1/root",
        "/sys",
        "/var",
        "/run",
        "/usr/bin",
    ]
    hidden += ["/dev/shm", "/dev/tty", str(ROOT), str(ROOT / "pyproject.toml"), sys.prefix, str(Path.home())]
    assert {*outcomes(jailer, *(f"os.stat({path!r})" for path in hidden))} == {"ENOENT"}


def test_the_root_folder_holds_what_is_given(jailer: Jailer) -> None:
    [listed, packages] = outcomes(jailer, "sorted(os.listdir('/'))", "sorted(os.listdir('/opt/packages'))")
    assert {*eval(listed)} <= {"dev", "etc", "lib", "lib64", "opt", "session", "tmp", "usr"}
    assert not [name for name in eval(packages) if name.startswith(("app", "tasks", "caravan", "llama", "_"))]


def test_the_environment_is_the_sandboxs_own(jailer: Jailer) -> None:
    """Not the worker's, which holds its secrets."""
    ran = jailer.run("import os; print(dict(os.environ))")
    assert SECRET not in ran.stdout
    assert {*eval(ran.stdout)} <= {"HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "PWD", "LC_CTYPE"} | {
        "MPLBACKEND",
        "MPLCONFIGDIR",
        "OPENBLAS_NUM_THREADS",
        "OMP_NUM_THREADS",
    }


def test_nothing_but_its_own_folders_can_be_written_to(jailer: Jailer) -> None:
    places = [
        "/x",
        "/usr/lib/x",
        "/lib/x",
        "/opt/x",
        "/opt/python/lib/x",
        "/opt/packages/numpy/x",
        "/opt/caravan/x",
        "/etc/x",
        "/dev/x",
    ]
    assert {*outcomes(jailer, *(f"open({place!r}, 'w')" for place in places))} <= {"EROFS", "EACCES"}
    assert outcomes(jailer, "os.chmod('/opt/caravan/execute.py', 0o777)", "os.rename('/opt', '/tpo')") == ["EROFS"] * 2


def test_there_is_no_network(jailer: Jailer) -> None:
    """Neither the internet's, nor this machine's loopback or sockets without files, nor a way to a hypervisor."""
    families = ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG")
    opened = outcomes(jailer, *(f"socket.socket(socket.{family})" for family in families), before="import socket")
    assert {*opened} == {"EPERM"}
    ran = jailer.run("import urllib.request; urllib.request.urlopen('http://127.0.0.1:1/')")
    assert ran.ended == "exit 1"
    assert "URLError" in ran.stderr


SYSTEM_CALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def number(*arguments):
    if libc.syscall(*arguments) == -1:
        raise OSError(ctypes.get_errno(), str(arguments[0]))
"""


def test_other_processes_are_out_of_reach(jailer: Jailer) -> None:
    """Traced, read, signalled: the worker, its parent, whatever else runs here."""
    worker = jailer.process.pid
    found = outcomes(
        jailer,
        f"os.kill({worker}, 9)",
        f"os.kill({os.getpid()}, 0)",
        f"os.pidfd_open({worker})",
        "os.getppid()",
        f"call('ptrace', 16, {worker}, 0, 0)",
        "call('ptrace', 16, os.getppid(), 0, 0)",
        "call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)",
        before=SYSTEM_CALLS,
    )
    assert found == ["ESRCH", "ESRCH", "ESRCH", "1", "EPERM", "EPERM", "EPERM"]


def test_its_supervisor_cannot_be_killed(jailer: Jailer) -> None:
    """It lives on, answers, and keeps what was there."""
    ran = jailer.run("import os, signal\nfor n in range(1, 65):\n    os.kill(1, n)\nopen('kept', 'w').write('x')")
    assert (ran.ended, ran.files) == ("exit 0", {"kept": b"x"})
    assert "ProcessLookupError" in jailer.run("import os; os.kill(-1, 9)").stderr
    assert jailer.run("import os; os.kill(os.getpid(), 9)").ended == "signal 9"


def test_its_answer_cannot_be_written(jailer: Jailer) -> None:
    """The code has three descriptors, none of which the worker reads an answer from."""
    found = outcomes(jailer, *(f"os.write({number}, b'{{}}')" for number in range(3, 40)))
    assert {*found} == {"EBADF"}


def test_no_privilege_can_be_had(jailer: Jailer) -> None:
    """As whomever it runs, and by no namespace of its own."""
    found = outcomes(
        jailer,
        "os.setuid(0)",
        "os.setgroups([0])",
        "os.unshare(os.CLONE_NEWUSER)",
        "os.unshare(os.CLONE_NEWNS)",
        "number({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000011, 0, 0, 0, 0)",
        "call('mount', b'none', b'/session', b'tmpfs', 0, None)",
        "os.chroot('/tmp')",
        "os.mknod('/session/null', 0o020666, os.makedev(1, 3))",
        "os.nice(-5)",
        before=SYSTEM_CALLS,
    )
    assert {*found} <= {"EPERM", "EINVAL", "EACCES"}
    assert outcomes(jailer, "os.geteuid() == 0", "os.getresgid().count(0)") == ["False", "0"]


def test_the_kernel_gives_no_way_round(jailer: Jailer) -> None:
    """Memory that no limit counts, keys, the interfaces that break: not one of the calls that are to be refused."""
    from tasks.tools.seccomp import MACHINES, REFUSED

    column = MACHINES[os.uname().machine][1]
    calls = [f"number({numbers[column]}, 0, 0, 0, 0, 0)" for numbers in REFUSED.values()]
    assert outcomes(jailer, *calls, before=SYSTEM_CALLS) == ["EPERM"] * len(REFUSED)


FORKS = """
def forks(most):
    for number in range(most):
        if os.fork() == 0:
            import time
            time.sleep(60)
            os._exit(0)
    return most
"""


def test_processes_are_counted(jailer: Jailer) -> None:
    """The limit is this sandbox's own, also while another one is at its limit; what it started goes with it."""
    code = f"{TRY}{FORKS}made = 0\ntry:\n    while True:\n        forks(1); made += 1\nexcept OSError: print(made)"
    counts = [int(jailer.run(code).stdout) for _ in range(2)]
    assert counts == [PROCESSES - 1] * 2  # the code is one of them
    assert not jailer.descendants()


def test_a_fork_bomb_goes_off_inside(jailer: Jailer) -> None:
    """Until its time is over; then nothing of it is left, and the next sandbox is as good as new."""
    ran = jailer.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", seconds=1)
    assert ran.ended == "seconds"
    assert not jailer.descendants()
    assert jailer.run("2 + 2").stdout == "4\n"


def test_threads_count_as_processes(jailer: Jailer) -> None:
    thread = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    ran = jailer.run(f"import threading, time\nfor n in range(99): {thread}")
    assert ran.ended == "exit 1"
    assert "can't start new thread" in ran.stderr


def test_what_runs_in_the_background_ends_with_the_code(jailer: Jailer) -> None:
    """Though it left its session and holds the outputs."""
    ran = jailer.run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('left')")
    assert (ran.ended, ran.stdout) == ("exit 0", "left\n")
    assert not jailer.descendants()


FILL = """
def fill(path):
    with open(path, "wb", buffering=0) as file:
        while file.write(bytes(65536)): pass
def written():
    return sum(file.stat().st_size for where in ("/session", "/tmp") for file in os.scandir(where))
"""


def test_the_disk_cannot_be_filled(jailer: Jailer) -> None:
    """Neither by one file nor by many: what there is to be filled is memory of a size."""
    files = [f"fill('/session/{n}')" for n in range(3)] + [f"fill('/tmp/{n}')" for n in range(3)]
    tried = "".join(f"found.append(outcome(lambda: {attempt}))\n" for attempt in [*files, "written()"])
    ran = jailer.run(f"{TRY}{FILL}\nfound = []\n{tried}print(json.dumps(found))")
    *errors, size = json.loads(ran.stdout)
    assert {*errors} == {"EFBIG", "ENOSPC"}
    assert int(size) <= 2 * (FILES_BYTES + 1000 * resource.getpagesize())
    assert (ran.ended, ran.files) == ("files_bytes", {})


def test_empty_files_are_counted(jailer: Jailer) -> None:
    ran = jailer.run("n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'w').close()")
    assert ran.ended == "max_files"


def test_holes_count_as_what_they_hide(jailer: Jailer) -> None:
    """A file's size, not its blocks: such a folder is not kept."""
    ran = jailer.run(f"for n in 'abc':\n    open(n, 'w').truncate({FILES_BYTES // 2})")
    assert (ran.ended, ran.files) == ("files_bytes", {})
    assert outcomes(jailer, "open('a', 'w').truncate(1 << 40)") == ["EFBIG"]


def test_a_process_cannot_fill_the_memory(jailer: Jailer) -> None:
    ran = jailer.run("found = bytearray(1 << 30)")
    assert (ran.ended, "MemoryError" in ran.stderr) == ("exit 1", True)


def test_processes_together_cannot_fill_the_memory(jailer: Jailer) -> None:
    code = "import os, time\nfor n in range(4):\n    if os.fork() == 0: break\nit = b'x' * (200 << 20)\ntime.sleep(60)"
    with pytest.raises(AssertionError, match="Broken: It used more than 512 MiB of memory"):
        jailer.run(code)
    wait_until(lambda: not jailer.descendants())


def test_there_is_no_memory_that_nobody_counts(jailer: Jailer) -> None:
    """Shared memory, which stays when it is unmapped; what is sent through sockets and not read."""
    shared = "mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)"
    larger = "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)"
    zero = "os.open('/dev/zero', os.O_RDWR)"
    many = "[os.pipe() for _ in range(32)]"
    tried = outcomes(jailer, shared, larger, zero, many, before="import mmap, socket")
    assert tried == ["EPERM", "EPERM", "ENOENT", "EMFILE"]


def test_memory_that_is_counted_can_be_mapped(jailer: Jailer) -> None:
    """A process's own, and a file's; asyncio has the pair of sockets that it needs."""
    code = """
import asyncio, mmap
mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with open("file", "w+b") as file:
    file.truncate(4096)
    mmap.mmap(file.fileno(), 0)
asyncio.run(asyncio.sleep(0))
"""
    assert jailer.run(code).ended == "exit 0"


def test_the_worker_goes_first(jailer: Jailer) -> None:
    """Where the machine has too little time or memory for all, the code waits, and dies, before its worker does."""
    own = Jailer(jailer.user)
    own.begin("import time; time.sleep(600)", seconds=600)
    [code] = awaited(own, 1)
    assert (code.nice(), Path(f"/proc/{code.pid}/oom_score_adj").read_text()) == (19, "1000\n")
    own.stop()


def test_output_is_bounded(jailer: Jailer) -> None:
    """And is read on, so that whoever prints a lot is not stopped by it: the beginning and the end are kept."""
    ran = jailer.run("import sys\nprint('begin', 'x' * 50_000_000, 'end')\nprint('y' * 9999, file=sys.stderr)")
    assert ran.ended == "exit 0"
    assert ran.stdout.startswith("begin xxx")
    assert ran.stdout.endswith("xxx end\n")
    assert len(ran.stdout) < OUTPUT_BYTES + 100
    assert len(ran.stderr) < OUTPUT_BYTES + 100


def test_closed_outputs_do_no_harm(jailer: Jailer) -> None:
    ran = jailer.run(
        "import os\nprint('said', flush=True)\nfor n in 0, 1, 2: os.close(n)\nn = open('kept', 'w').write('x')"
    )
    assert (ran.ended, ran.stdout, ran.files) == ("exit 0", "said\n", {"kept": b"x"})


def test_the_code_has_a_limit_of_time(jailer: Jailer) -> None:
    """What it had printed and written by then is kept."""
    ran = jailer.run("print('so far', flush=True)\nopen('kept', 'w').write('x')\nwhile True: pass", seconds=5)
    assert (ran.ended, ran.stdout) == ("seconds", "so far\n")
    assert "kept" in ran.files


def test_what_is_no_file_of_the_folder_is_not_taken_for_one(jailer: Jailer) -> None:
    """Links are not followed, neither to the machine's files nor to the sandbox's; nothing is waited for."""
    code = """
import os
os.symlink("/etc/passwd", "passwd")
os.symlink("/opt/caravan/supervise.py", "inside")
os.symlink("/opt", "folder")
os.mkfifo("fifo")
os.mkdir("closed", 0)
open("unreadable", "w").close(); os.chmod("unreadable", 0)
open("good", "w").write("x")
os.link("good", "also good")
"""
    ran = jailer.run(code)
    assert ran.ended == "exit 0", ran.stderr
    assert ran.files == {"good": b"x", "also good": b"x"}
    assert {*ran.left_out} == {"'passwd'", "'inside'", "'fifo'", "'unreadable'"}


def test_names_are_ones_that_all_can_write(jailer: Jailer) -> None:
    code = r"""
import os
for name in (b"new\nline", b"bad\xff", b"escape\x1b[2J", b"back\\slash", b"x" * 255, "grün.csv".encode(), b"..hidden"):
    open(name, "w").write("x")
os.makedirs("a/" + "/".join(["b" * 200] * 4))
open("a/" + "/".join(["b" * 200] * 4) + "/deep", "w").write("x")
"""
    ran = jailer.run(code)
    assert {*ran.files} == {"x" * 255, "grün.csv", "..hidden"}
    assert len(ran.left_out) == 5


def running(jailer: Jailer) -> list[psutil.Process]:
    """The processes of the code, as this machine sees them."""
    found = []
    with suppress(psutil.Error):
        for process in jailer.descendants():
            with suppress(psutil.Error):
                found += [process] if "/opt/caravan/execute.py" in process.cmdline() else []
    return found


def awaited(jailer: Jailer, count: int) -> list[psutil.Process]:
    """As `running`, once there are so many."""
    found: list[psutil.Process] = []

    def enough() -> bool:
        found[:] = running(jailer)
        return len(found) == count

    wait_until(enough)
    return found


def test_a_killed_worker_leaves_nothing(jailer: Jailer) -> None:
    """`kill -9` of whoever made the sandbox takes along all that runs in it, whatever session it is in."""
    own = Jailer(jailer.user)
    own.begin("import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(600)", seconds=600)
    left = awaited(own, 2)
    own.stop()
    wait_until(lambda: not any(process.is_running() for process in left))
