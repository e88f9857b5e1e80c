"""The system calls that code in the sandbox may not make, as a seccomp filter (seccomp(2), linux/filter.h).

The namespaces keep the code from what is outside. The filter keeps it from what they do not cover: memory that no
limit counts, sockets that are not the network's (vsock reaches a hypervisor), keys, the kernel's log, other processes'
memory, namespaces of its own, and interfaces that had the kernel's holes of late years.
"""

from __future__ import annotations

import errno
import struct

LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, FOURTH_ARGUMENT = 0, 4, 16, 40  # offsets in struct seccomp_data
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
X32 = 0x40000000
"""Numbers from here on are x86-64's second table of system calls, which nobody uses."""

NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""By `os.uname().machine`: AUDIT_ARCH, and the column of its numbers below."""

SHARED_ANONYMOUS = 0x21
"""MAP_SHARED and MAP_ANONYMOUS: memory that stays when all but a page of it is unmapped, where nobody counts it."""

CLONE, CLONE3, MMAP = (56, 220), (435, 435), (9, 222)
REFUSED = {
    # What is sent and not read is the kernel's memory, which no limit counts either. Pairs are left: asyncio needs one.
    "socket": (41, 198),
    "setsockopt": (54, 208),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "syslog": (103, 116),
}


def program(machine: str) -> bytes:
    """The filter, as an array of `struct sock_filter`. Raises KeyError: a machine whose numbers are not known here."""
    architecture, column = MACHINES[machine]
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        lines += [(AT_LEAST, 0, 1, X32), _refuse(errno.ENOSYS)]
    # libc falls back on clone, whose flags can be looked at; clone3's are in memory.
    lines += [(EQUAL, 0, 1, CLONE3[column]), _refuse(errno.ENOSYS)]
    for numbers in REFUSED.values():
        lines += [(EQUAL, 0, 1, numbers[column]), _refuse(errno.EPERM)]
    argument = (LOAD, 0, 0, FIRST_ARGUMENT)
    refuse = _refuse(errno.EPERM)
    lines += [(EQUAL, 0, 4, CLONE[column]), argument, (ANY_BIT, 0, 1, NEW_NAMESPACES), refuse, _ALLOW]
    flags = [(LOAD, 0, 0, FOURTH_ARGUMENT), (AND, 0, 0, SHARED_ANONYMOUS)]
    lines += [(EQUAL, 0, 5, MMAP[column]), *flags, (EQUAL, 0, 1, SHARED_ANONYMOUS), refuse, _ALLOW]
    lines += [_ALLOW]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _refuse(number: int) -> tuple[int, int, int, int]:
    return (RETURN, 0, 0, REFUSE | number)


_ALLOW = (RETURN, 0, 0, ALLOW)
