"""Locks that a process puts on itself before it runs what a policy wrote. Linux; nothing of ours.

    limit(...)           rlimits
    drop_privileges(uid) from root to a user that owns nothing
    restrict_files(...)  Landlock: which folders may be read, which one may be written
    restrict_calls()     seccomp: a list of system calls that fail (x86-64)

Every graded program imports this file, hence few imports. All locks are inherited by children and
none can be taken off again. `restrict_files` and `restrict_calls`
raise OSError where the kernel does not offer them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_PR_SET_CHILD_SUBREAPER = 36
_SIGKILL = 9


def _prctl(option: int, *arguments: object) -> None:
    padded = [*arguments, *[0] * (4 - len(arguments))]
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]
    if _libc.prctl(option, *words) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parents end, so that none gets away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Be killed when ``parent``, which started this process, ends."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit(*, cpu_s: int, memory: int, file: int, processes: int | None, files: int = 64) -> None:
    """Seconds of CPU and bytes of address space per process, bytes per file, processes per user.

    processes: None leaves that limit alone. It does nothing for uid 0.
    """
    limits = {
        resource.RLIMIT_CPU: cpu_s,  # soft = hard: a kill that no handler sees
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_privileges(uid: int) -> None:
    """From root to ``uid`` and its group for good: no groups, no capabilities, no way back."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # A change of user makes /proc/self root's, and with it /dev/stdin.
    _prctl(_PR_SET_DUMPABLE, 1)


# --- Landlock: landlock(7), linux/landlock.h ------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NET_ALL = 0b11  # bind and connect TCP
_SCOPE_ALL = 0b11  # abstract sockets and signals reach this domain only


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 without."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _handled(version: int) -> int:
    since = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
    return sum(bits for first, bits in since.items() if version >= first)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        access &= _ON_FILES
    rule = struct.pack("=Qi", access, descriptor)
    failed = _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    os.close(descriptor)
    if failed:
        raise OSError(ctypes.get_errno(), f"no Landlock rule for {path}")


def restrict_files(readable: list[str], writable: str | None) -> None:
    """Files: read and run below ``readable``, write below ``writable``; no TCP, no signals out.

    The last two need Linux 6.7 and 6.12; `restrict_calls` forbids both on any kernel.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    handled = _handled(version)
    attributes = struct.pack(
        "=QQQ", handled, _NET_ALL if version >= 4 else 0, _SCOPE_ALL if version >= 6 else 0
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "no Landlock ruleset")
    for path in readable:
        _allow(ruleset, path, handled & _READ)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        _allow(ruleset, path, handled & (_READ_FILE | _WRITE_FILE | _TRUNCATE))
    if writable is not None:
        _allow(ruleset, writable, handled & ~(_MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK | _IOCTL_DEV))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    failed = _libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    if failed:
        raise OSError(ctypes.get_errno(), "Landlock refused")


# --- seccomp: seccomp(2), linux/filter.h ----------------------------------------------------------

# Numbers of x86-64. A process that was locked in may compute, read, write its folder, make threads
# and children. It may not reach others: network, signals, debugging, shared memory that outlives
# it, namespaces, mounts, keys, the clock, the owner and mode of files.
_DENIED = {
    "network": (41,),
    "signals": (62, 129, 200, 234, 297, 424, 434, 438),
    "other processes": (101, 310, 311, 312, 440, 448, 141, 142, 144, 203, 251, 256, 279, 314),
    "mounts and namespaces": (155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),
    "shared memory and queues": (29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 220, 240, 241, 319, 447),
    "kernel": (103, 134, 135, 153, 163, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 180, 212)
    + (246, 250, 248, 249, 298, 300, 303, 304, 313, 320, 321, 323, 425, 426, 427, 443),
    "clock": (159, 164, 227, 305),
    "owner, mode and times of files": (76, 90, 91, 92, 93, 94, 132, 133, 188, 189, 190, 197, 198)
    + (199, 235, 259, 260, 261, 268, 280, 452, 463, 466),
}
_CLONE, _CLONE3, _PRLIMIT = 56, 435, 302
_NEW_NAMESPACE = 0x7E020080  # the CLONE_NEW* flags
_X86_64, _X32_BIT = 0xC000003E, 0x40000000
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_ABOVE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data


def _program() -> bytes:
    """The filter. A jump counts the instructions to skip if true, if false."""
    denied = sorted({number for group in _DENIED.values() for number in group})
    head = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_ABOVE, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        # So that the C library falls back to clone, whose flags can be read.
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    ]
    listed = [
        instruction
        for number in denied
        for instruction in ((_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL | errno.EPERM))
    ]
    tail = [
        (_JUMP_EQUAL, 0, 3, _CLONE),
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_JUMP_SET, 5, 0, _NEW_NAMESPACE),
        (_RETURN, 0, 0, _ALLOW),
        (_JUMP_EQUAL, 0, 2, _PRLIMIT),
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_JUMP_EQUAL, 0, 1, 0),  # one's own limits
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *i) for i in head + listed + tail)


def restrict_calls() -> None:
    """Make the system calls of the list fail with EPERM."""
    if (machine := os.uname().machine) != "x86_64":
        raise OSError(errno.ENOSYS, f"the list of system calls is for x86_64, this is {machine}")
    code = _program()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(program))


def python_folders() -> list[str]:
    """What a Python process must read to import its libraries."""
    folders = {sys.base_prefix, sys.prefix, *sys.path, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}
    return sorted(f for f in folders if f and os.path.isabs(f) and os.path.exists(f))


def restrict_where_possible(readable: list[str]) -> None:
    """Read-only files and no reach to others, as far as this kernel offers it."""
    for restrict in (lambda: restrict_files(readable, None), restrict_calls):
        try:
            restrict()
        except OSError:
            continue
