"""Becomes the given command, after it made sure that the command dies with the process that asked for it.

    python -S -E launch.py <parent's pid> <signal> <account or ''> command…

Run as a script with nothing but the standard library, because what happens between fork and exec of a process with
threads must be as good as nothing. The death signal is Linux's; it comes when the *thread* that started this process
ends. Elsewhere only an orderly stop ends the command. The account is taken before the signal is set: changing it
clears the signal.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, death_signal, account, *command = sys.argv[1:]
    if account:
        _become(account)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != int(parent):
        sys.exit("the process that started this one is gone")
    try:
        os.execvp(command[0], command)  # noqa: S606  # that is what this is for
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


def _become(account: str) -> None:
    entry = pwd.getpwnam(account)
    os.initgroups(account, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = "/"


if __name__ == "__main__":
    main()
