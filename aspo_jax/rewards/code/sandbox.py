"""Run a program that a policy wrote so that it can touch nothing. Linux.

    box = open_sandbox("auto")             # the safest tier that held when it was attacked
    box.run(orders, stdin=b"1 2", limits=Limits())

Tiers, from safe to unsafe:

    namespaces  bubblewrap: own files, processes, network, IPC; a user that owns nothing; seccomp
    landlock    no namespaces needed: Landlock, seccomp, from root to a user that owns nothing
    rlimits     limits and an empty environment only: it contains accidents, not attacks

The test's expected output is never among the orders. One process tree per call, all of it killed at
the end: the caller adopts orphans and must start no other process meanwhile. Defence in depth, not
a virtual machine.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from aspo_jax.rewards.code import jail
from aspo_jax.rewards.verdict import RewardError, Tier

TIERS: tuple[Tier, ...] = get_args(Tier)

_HERE = Path(__file__).resolve().parent
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # else the order of a set, and so a reward, differs by run
_FLAGS = ("-s", "-P", "-S", "-X", "utf8")  # -I, but for this one variable; no site-packages
_FIRST_UID = 61184  # a range that no account uses (systemd's for services without one)
_UIDS = 4096
_TICK_S = 0.05  # how often memory and disk of a running program are looked at
_SWEEP_S = 2.0
_REMOVERS = 4  # at once, and how many seconds each tries
_REMOVER_S = "60"
# However deep; a folder without rights is given some first, a link is not followed.
_REMOVE = """
rm -rf -- "$0" 2>/dev/null || { [ -L "$0" ] || chmod -R u+rwx -- "$0"; rm -rf -- "$0"; } ||
    echo "cannot delete $0, the files of a graded program" >&2
"""
_MIB = 2**20
_HUGE = 2**40


class Limits(NamedTuple):
    """What one run may use.

    seconds: wall clock, the start of the interpreter included.
    memory_mib: address space of each process, and resident memory of all of them together.
    processes: processes and threads at once.
    file_mib, folder_mib: each file, and all files of the working folder together.
    output_kib: standard output that is read; more ends the run as ``exhausted``.
    """

    seconds: float = 6.0
    memory_mib: int = 1024
    processes: int = 32
    file_mib: int = 16
    folder_mib: int = 64
    output_kib: int = 1024


class Outcome(NamedTuple):
    """How a run ended and what it wrote.

    ending: ``exit`` (by itself), ``timeout``, or ``exhausted`` (memory, disk or output).
    status: exit status, of an ``exit``; negative for a signal.
    """

    ending: Literal["exit", "timeout", "exhausted"]
    status: int
    output: bytes


class SandboxError(RewardError):
    """No sandbox, or none that is safe enough."""


# --- process trees --------------------------------------------------------------------------------


class _Process(NamedTuple):
    parent: int
    resident: int  # pages


def _processes() -> dict[int, _Process]:
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" or int(fields[1]) == os.getpid():
                found[int(name)] = _Process(int(fields[1]), int(fields[21]))
    return found


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class _Tree:
    """All processes that were started since, by this process or by what it started."""

    def __init__(self):
        me = os.getpid()
        self._known = {
            pid for pid, p in (_processes() if _has_children() else {}).items() if p.parent == me
        }

    def members(self) -> dict[int, _Process]:
        processes, ours = _processes(), {}
        frontier = {os.getpid()}
        while frontier:
            frontier = {
                pid
                for pid, process in processes.items()
                if process.parent in frontier and pid not in self._known
            }
            ours.update((pid, processes[pid]) for pid in frontier)
        return ours

    def kill(self, started: Sequence[subprocess.Popen]) -> None:
        """End all of them and wait until they are gone.

        Raises:
            SandboxError: one is left after 2 seconds.
        """
        for process in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + _SWEEP_S
        while _has_children() and (members := self.members()):
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in members:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                raise SandboxError(f"processes {sorted(members)} cannot be killed")
            time.sleep(0.001)


# --- working folders ------------------------------------------------------------------------------


def _usage(folder: str, most: int, until: float) -> int:
    """Bytes below a folder, each entry counting 4 KiB at least; what nobody can look into is huge.

    It stops counting beyond ``most`` bytes, and at the monotonic time ``until``: a program adds to
    its folder meanwhile, and must not keep whoever looks at it.
    """
    total, waiting = 0, [folder]
    while waiting and total <= most:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += 4096
                    if total > most or time.monotonic() > until:
                        return total
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError as error:  # something was removed meanwhile; or it hides what is in it
            total += _HUGE if error.errno in (errno.ENAMETOOLONG, errno.EACCES) else 0
    return total


def _unlinked(pids: Iterable[int], device: int) -> int:
    """Bytes of files on a device that have no name any more but are open, as far as one may look.

    A private /proc, or a root without the right to debug, sees none of them.
    """
    sizes = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended meanwhile, or may not be looked at
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found = os.stat(f"/proc/{pid}/fd/{name}")
                    if found.st_nlink == 0 and found.st_dev == device:
                        sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


_removers: list[subprocess.Popen] = []


def remove(folder: str) -> None:
    """Have a folder deleted by a process that also outlives this one: no program's time pays."""
    _removers[:] = [remover for remover in _removers if remover.poll() is None]
    if len(_removers) == _REMOVERS:
        _removers.pop(0).wait()
    command = ["timeout", _REMOVER_S, "sh", "-c", _REMOVE, folder]
    null = subprocess.DEVNULL
    _removers.append(subprocess.Popen(command, stdin=null, stdout=null, start_new_session=True))


@contextlib.contextmanager
def _scratch(uid: int | None) -> Iterator[str]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    folder = tempfile.mkdtemp(prefix="aspo_jax_", dir=memory)
    try:
        if uid is not None:
            os.chown(folder, uid, uid)
            os.chmod(folder, 0o711)  # bubblewrap enters it as a root without capabilities
        yield folder
    finally:
        try:
            os.rmdir(folder)
        except OSError:  # there are files in it, or a link in its place
            remove(folder)


@contextlib.contextmanager
def _memory_file(content: bytes = b"") -> Iterator[int]:
    """A descriptor: what is in it never blocks a writer and ends with its last user."""
    with os.fdopen(os.memfd_create("aspo_jax"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file.fileno()


# --- the interpreter ------------------------------------------------------------------------------


def _is_public(path: str) -> bool:
    """Whether a user who owns nothing can reach and run a file."""
    place = Path(path)
    return (place.stat().st_mode & 0o5 == 0o5) and all(
        folder.stat().st_mode & 0o1 for folder in place.parents
    )


def find_interpreter() -> str:
    """The Python that programs run with: this one, or the system's where this one is private.

    Raises:
        SandboxError: there is none that the unprivileged user of a sandbox may run.
    """
    own = os.path.realpath(sys.executable)
    candidates = [own, *(shutil.which("python3", path=p) for p in ("/usr/bin", "/usr/local/bin"))]
    for candidate in candidates:
        real = os.path.realpath(candidate) if candidate else None
        if real and os.path.exists(real) and (os.geteuid() != 0 or _is_public(real)):
            return real
    raise SandboxError(
        f"no Python for graded programs: {own} lies in a folder that only root may enter and there "
        "is no /usr/bin/python3; install one, or run as another user"
    )


def _prefix(interpreter: str) -> str:
    return str(Path(interpreter).parents[1])


# --- one tier -------------------------------------------------------------------------------------


class Sandbox:
    """One tier, taken on trust. `open_sandbox` attacks it first."""

    def __init__(self, tier: Tier):
        self.tier: Tier = tier
        self.interpreter = find_interpreter()
        is_root = os.geteuid() == 0
        self._uid = _FIRST_UID + os.getpid() % _UIDS if is_root else None
        self._is_filtered = tier != "rlimits" and (
            tier == "landlock" or platform.machine() == "x86_64"
        )
        jail.adopt_orphans()

    def run(self, orders: dict[str, Any], stdin: bytes, limits: Limits) -> Outcome:
        """Run a program (`aspo_jax.rewards.code.runner` says which orders there are).

        Raises:
            SandboxError: the sandbox itself failed, which says nothing about the program.
        """
        tree = _Tree()
        with (
            _memory_file() as output,
            _memory_file(stdin) as source,
            _scratch(self._uid) as folder,
            _memory_file(self._letter(orders, limits)) as letter,
        ):
            process = self._start(letter, folder, source, output, subprocess.DEVNULL)
            ending = self._watch(tree, [process], [folder], limits)
            _check_read(letter, process.returncode)
            if ending == "exit" and os.fstat(output).st_size > limits.output_kib * 1024:
                ending = "exhausted"
            status = process.returncode
            if self.tier == "namespaces" and status > 128:
                status = 128 - status
            return Outcome(ending, status, _content(output, limits.output_kib))

    def check(
        self, program: dict[str, Any], test: dict[str, Any], limits: Limits
    ) -> Literal["passed", "failed", "timeout", "exhausted"]:
        """Run test code that calls a program's functions, each of the two in a sandbox of its own.

        Raises:
            SandboxError: as `run`.
        """
        tree = _Tree()
        with contextlib.ExitStack() as stack:
            contents = (b"", self._letter(test, limits), self._letter(program, limits))
            verdict, *letters = (stack.enter_context(_memory_file(c)) for c in contents)
            folders = [stack.enter_context(_scratch(self._uid)) for _ in range(2)]
            with contextlib.ExitStack() as ours:
                calls, values = os.pipe(), os.pipe()
                for end in (*calls, *values):
                    ours.callback(os.close, end)
                tester = self._start(letters[0], folders[0], values[0], calls[1], verdict)
                tested = self._start(
                    letters[1], folders[1], calls[0], values[1], subprocess.DEVNULL
                )
            ending = self._watch(tree, [tester, tested], folders, limits)
            _check_read(letters[0], tester.returncode)
            if tested.returncode != -signal.SIGKILL:  # a test may fail before it calls anything
                _check_read(letters[1], tested.returncode)
            if ending != "exit":
                return ending
            return "passed" if _content(verdict, 1) == b"passed" else "failed"

    # --- inside ---------------------------------------------------------------------------------

    def _start(
        self, letter: int, folder: str, stdin: int, stdout: int, stderr: int
    ) -> subprocess.Popen:
        command = [self.interpreter, *_FLAGS, f"{_HERE}/runner.py"]
        if self.tier == "namespaces":
            command = [*self._bubble(folder), *command[:-1], "/jail/runner.py"]
        try:
            return subprocess.Popen(
                [*command, str(letter)],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=_ENVIRONMENT,
                cwd=folder,
                pass_fds=(letter,),
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"cannot start {command[0]}: {error}") from error

    def _letter(self, orders: dict[str, Any], limits: Limits) -> bytes:
        """A process's orders and locks, in a file that it empties once it has locked itself in."""
        processes = limits.processes
        if self._uid is None:  # the limit counts all processes of this user
            processes += _tasks_of_user()
        prefix = _prefix(self.interpreter)
        readable = sorted({"/usr", "/lib", "/lib64", "/etc/ld.so.cache", prefix})
        locks = {
            "is_namespaced": self.tier == "namespaces",
            "is_filtered": self._is_filtered,
            "parent": os.getpid(),
            "uid": self._uid,
            "readable": readable if self.tier == "landlock" else None,
            "limits": {
                "cpu_s": int(limits.seconds) + 2,
                "memory": limits.memory_mib * _MIB,
                "file": limits.file_mib * _MIB,
                "processes": processes,
            },
        }
        return json.dumps(orders | locks).encode("ascii")

    def _bubble(self, folder: str) -> list[str]:
        """bubblewrap's command. Root keeps its user for `jail.drop_privileges` to change."""
        if self._uid is None:
            identity = ["--unshare-all", "--uid", "65534", "--gid", "65534"]
        else:
            identity = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
            identity += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
            identity += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        system = []
        for path in ("/lib", "/lib64", "/bin"):
            if os.path.islink(path):
                system += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                system += ["--ro-bind", path, path]
        prefix = _prefix(self.interpreter)
        if not prefix.startswith("/usr"):
            system += ["--ro-bind", prefix, prefix]
        return [
            *("bwrap", *identity, "--die-with-parent", "--new-session"),
            *("--ro-bind", "/usr", "/usr", *system),
            *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
            *("--ro-bind", str(_HERE), "/jail"),
            *("--proc", "/proc", "--dev", "/dev"),
            # Not a tmpfs of limited size: that would not limit the number of its files.
            *("--bind", folder, "/tmp"),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"),
        ]

    def _watch(
        self,
        tree: _Tree,
        started: Sequence[subprocess.Popen],
        folders: Sequence[str],
        limits: Limits,
    ) -> Literal["exit", "timeout", "exhausted"]:
        """Wait for the first process, or until a limit is reached; then kill all of them."""
        deadline = time.monotonic() + limits.seconds
        try:
            with open(os.pidfd_open(started[0].pid), "rb", buffering=0) as first:
                poll = select.poll()
                poll.register(first, select.POLLIN)
                while (left := deadline - time.monotonic()) > 0:
                    if poll.poll(1000 * min(left, _TICK_S)):
                        return "exit"
                    if _exceeds(tree, folders, limits, deadline):
                        return "exhausted"
            return "timeout"
        finally:
            tree.kill(started)


def _exceeds(tree: _Tree, folders: Sequence[str], limits: Limits, deadline: float) -> bool:
    """Whether the programs of a tree have taken too much memory or room in a folder."""
    members, most = tree.members(), limits.folder_mib * _MIB
    device = os.stat(os.path.dirname(folders[0])).st_dev  # a folder itself may be gone
    pages = sum(process.resident for process in members.values())
    return (
        pages * os.sysconf("SC_PAGE_SIZE") > (limits.memory_mib + 64) * _MIB
        or any(_usage(folder, most, deadline) > most for folder in folders)
        or _unlinked(members, device) > most
    )


def _check_read(letter: int, status: int) -> None:
    if os.fstat(letter).st_size > 0:
        raise SandboxError(f"a sandbox ended with status {status} before its program began")


def _content(descriptor: int, kib: int) -> bytes:
    return os.pread(descriptor, kib * 1024, 0)


def _tasks_of_user() -> int:
    me, tasks = os.geteuid(), 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == me:
                tasks += len(os.listdir(f"/proc/{name}/task"))
    return tasks


# --- the probe ------------------------------------------------------------------------------------

# What a program tries at the start, to be told by what it could do.
_ATTACKS = """
import json, os, socket, subprocess, sys
secret, outside, port, parent = json.loads(sys.stdin.read())
def read():
    return open(secret).read()
def write():
    return open(outside, "w")
def connect():
    return socket.create_connection(("127.0.0.1", port), 1)
def signal():
    return os.kill(parent, 0)
def fork():
    for _ in range(64):
        if os.fork() == 0:
            import time; time.sleep(1); os._exit(0)
done = []
for attack in (read, write, connect, signal, fork):
    try:
        attack()
        done.append(attack.__name__)
    except OSError:
        pass
print(json.dumps(done))
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time; time.sleep(30)
"""


def _probe(box: Sandbox) -> list[str]:
    """Names of the attacks that worked.

    Raises:
        SandboxError: not even an honest program runs in it.
    """
    with (
        tempfile.TemporaryDirectory(prefix="aspo_jax_probe_") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        secret = Path(folder, "secret")
        secret.write_text("a secret")
        Path(folder).chmod(0o755)
        secret.chmod(0o600)
        facts = [str(secret), f"{folder}/written", server.getsockname()[1], os.getpid()]
        orders = {"mode": "script", "source": _ATTACKS}
        outcome = box.run(orders, json.dumps(facts).encode(), Limits(seconds=20, processes=16))
    try:
        return json.loads(outcome.output)
    except ValueError:
        raise SandboxError(f"a program in it ended with status {outcome.status}") from None


def try_tier(tier: Tier) -> tuple[Sandbox | None, str]:
    """The sandbox if it can be used and withstood all attacks, and one line about it."""
    if tier == "namespaces" and shutil.which("bwrap") is None:
        return None, f"{tier}: bwrap is not installed"
    try:
        box = Sandbox(tier)
        done = _probe(box)
    except (SandboxError, OSError) as error:
        return None, f"{tier}: {error}"
    if done and tier != "rlimits":
        return None, f"{tier}: a program could {', '.join(done)}"
    held = "withstood all attacks of the probe" if not done else f"a program can {', '.join(done)}"
    return box, f"{tier}: {held}; programs run with {box.interpreter}"


def open_sandbox(wanted: Literal["auto"] | Tier) -> tuple[Sandbox, str]:
    """A sandbox of the tier that is wanted, or of the safest that holds, and one line about it.

    ``auto`` never means ``rlimits``: who wants no sandbox has to say so.

    Raises:
        SandboxError: it does not hold on this machine; the message says why and what to do.
    """
    said = []
    for tier in TIERS[:2] if wanted == "auto" else (wanted,):
        box, line = try_tier(tier)
        if box is not None:
            return box, line
        said.append(line)
    raise SandboxError(
        f"no sandbox for graded programs ({'; '.join(said)}). Install bubblewrap (apt-get install "
        "bubblewrap) or use a kernel with Landlock; to run them with limits only, which stops "
        "accidents but no attack, set Reward.sandbox = 'rlimits'"
    )


def main(arguments: Sequence[str]) -> int:
    """``python -m aspo_jax.rewards.code.sandbox [TIER]``: what the tiers withstand on this machine.

    With a tier (or ``auto``) the answer is one line of JSON, ``[tier, report]`` or ``[null, why]``.
    """
    if not arguments:
        for tier in TIERS:
            print(try_tier(tier)[1])
        return 0
    try:
        box, line = open_sandbox(arguments[0])  # pyright: ignore[reportArgumentType]
        print(json.dumps([box.tier, line]))
    except SandboxError as error:
        print(json.dumps([None, str(error)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
