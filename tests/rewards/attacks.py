"""Programs that try to be paid without an answer, or to touch what they must not.

Each is harmless where a sandbox fails: loops end by themselves, forks are few, files small, network
means the loopback of this machine, and what is killed is a process of the test's own. An attack
that steals a secret is asked to print that very secret: it is paid if and only if it succeeded.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT_SECRET = "environment-7f3a"
_FILE_SECRET = "file-91c2"


class World(NamedTuple):
    """What the attacks are after.

    folder: files that are not the program's: a secret one, and room for more.
    victim: a process that is not the program's.
    port: of a listening socket on the loopback, which accepts in its backlog.
    """

    folder: Path
    victim: subprocess.Popen
    server: socket.socket

    @property
    def port(self) -> int:
        return self.server.getsockname()[1]

    def harm(self) -> list[str]:
        """What an attack did to it."""
        found = []
        if sorted(p.name for p in self.folder.iterdir()) != ["precious", "secret"]:
            found.append(f"files {sorted(os.listdir(self.folder))}")
        elif (self.folder / "precious").read_text() != "precious":
            found.append("a file was changed")
        elif (self.folder / "precious").stat().st_mode & 0o777 != 0o644:
            found.append("the mode of a file was changed")
        if self.victim.poll() is not None:
            found.append("a process was killed")
        elif os.getpriority(os.PRIO_PROCESS, self.victim.pid) != os.getpriority(os.PRIO_PROCESS, 0):
            found.append("the priority of a process was changed")
        with contextlib.suppress(BlockingIOError):
            self.server.accept()
            found.append("a connection came in")
        return found


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A world to attack; the caller puts ENVIRONMENT_SECRET into its own environment."""
    folder.mkdir()
    (folder / "secret").write_text(_FILE_SECRET)
    (folder / "secret").chmod(0o600)
    (folder / "precious").write_text("precious")
    (folder / "precious").chmod(0o644)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        try:
            yield World(folder, victim, server)
        finally:
            victim.kill()
            victim.wait()


def survivors() -> list[int]:
    """Processes of sandboxes below this process, and orphans of any; not those of other graders."""
    parents: dict[int, int] = {}
    commands: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
                    commands[int(entry.name)] = (entry / "cmdline").read_bytes()

    def is_ours(pid: int) -> bool:
        while (pid := parents.get(pid, 0)) > 1:
            if pid == os.getpid():
                return True
            if b"aspo_jax.rewards.pool.worker" in commands[pid] and parents[pid] != os.getpid():
                return False
        return True

    marks = (b"runner.py", b"survivor")
    return [p for p, c in commands.items() if any(mark in c for mark in marks) and is_ours(p)]


def wait_for_no_survivors(seconds: float = 2.0) -> list[int]:
    """Those that are left after some time; empty as soon as there are none."""
    end = time.monotonic() + seconds
    while (left := survivors()) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def may_debug() -> bool:
    """Whether this process may look at the open files of a user that owns nothing."""
    (granted,) = re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    return os.geteuid() != 0 or bool(int(granted, 16) >> 19 & 1)


class Attack(NamedTuple):
    """A program, the problem that it pretends to solve, and what it tries."""

    name: str
    tries: str
    answer: Any
    program: str


_STDIO = {"inputs": ["3 4"], "outputs": ["7"]}
_CALL = {"inputs": ["3\n4"], "outputs": ["7"], "fn_name": "add"}
_ASSERT = {"asserts": ["assert add(3, 4) == 7", "assert add(1, 1) == 2"]}
_LIST = {"asserts": ["assert pair(3) == [3, 4]"]}
_CHECK = {
    "test": "def check(candidate):\n    for x in range(5):\n"
    "        assert abs(candidate(x) - x * 1.5) < 1e-6\n",
    "entry_point": "scale",
    "prompt": 'def scale(x):\n    """One and a half x."""\n',
}
_SECRET_OUTPUT = {"inputs": [""], "outputs": [_FILE_SECRET]}
_ENVIRONMENT_OUTPUT = {"inputs": [""], "outputs": [ENVIRONMENT_SECRET]}
_DONE = {"inputs": [""], "outputs": ["done"]}
_EQUAL = """
    class Equal:
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __hash__(self): return 7
        def __abs__(self): return 0
        def __sub__(self, other): return 0
        def __lt__(self, other): return True
        def __bool__(self): return True
        def __getattr__(self, name): return self
        def __repr__(self): return "7"
        def __int__(self): return 7
        __iter__ = lambda self: iter([3, 4])
"""

# name -> (what it tries, problem, program)
_HACKS = {
    "sys.exit(0)": ("leave with status 0", _STDIO, "import sys; sys.exit(0)"),
    "os._exit(0)": ("leave with status 0 at once", _ASSERT, "import os; os._exit(0)"),
    "exit in the function": ("leave when called", _ASSERT, "def add(a, b): raise SystemExit(0)"),
    "os._exit in the function": (
        "leave at once when called",
        _CALL,
        "import os\ndef add(a, b): os._exit(0)",
    ),
    "exit at exit": (
        "replace the status at the end",
        _STDIO,
        "import atexit, os; atexit.register(os._exit, 0); print(8)",
    ),
    "syntax error": ("make the tests vanish", _ASSERT, "def add(a, b:\n  return 7"),
    "empty program": ("define nothing", _ASSERT, "pass"),
    "empty output": ("print nothing", _STDIO, "pass"),
    "always equal": ("return an object that equals all", _ASSERT, _EQUAL + "\n    def add(a, b): return Equal()"),
    "always equal, JSON": ("the same for a JSON result", _CALL, _EQUAL + "\n    def add(a, b): return Equal()"),
    "always equal, checked": ("the same for free test code", _CHECK, _EQUAL + "\n    def scale(x): return Equal()"),
    "equal list": (
        "return a list that equals all",
        _LIST,
        "class L(list):\n  def __eq__(self, o): return True\ndef pair(x): return L()",
    ),
    "equal int": (
        "return an int that equals all",
        _ASSERT,
        "class I(int):\n  def __eq__(self, o): return True\ndef add(a, b): return I(1)",
    ),
    "equal str": (
        "return a str that equals all",
        _ASSERT,
        "class S(str):\n  __eq__ = lambda s, o: True\ndef add(a, b): return S('x')",
    ),
    "lying dict": (
        "return a dict whose items lie",
        {"asserts": ["assert f() == {1: 2}"]},
        "class D(dict):\n  def items(self): return [(1, 2)]\n  __eq__ = lambda s, o: True\ndef f(): return D()",
    ),
    "lying class": (
        "claim to be an int",
        _ASSERT,
        "class C:\n  __class__ = int\n  def __eq__(self, o): return True\ndef add(a, b): return C()",
    ),
    "NaN": ("return NaN", _ASSERT, "def add(a, b): return float('nan')"),
    "not implemented": ("return NotImplemented", _ASSERT, "def add(a, b): return NotImplemented"),
    "true for a number": ("return True", _CALL, "def add(a, b): return True"),
    "printed verdict": (
        "print what the grader might look for",
        _ASSERT,
        "print('passed'); print('{\"passed\": true}'); print('[1.0, \"match\", true]')\ndef add(a, b): return 0",
    ),
    "verdict on every descriptor": (
        "write verdicts into all open files",
        _ASSERT,
        """
        import os
        for fd in range(64):
            try: os.write(fd, b'7\\n[1.0, "match", true]\\npassed\\n')
            except OSError: pass
        def add(a, b): return 0
        """,
    ),
    "verdict on every descriptor, checked": (
        "the same where test code runs elsewhere",
        _CHECK,
        """
        import os
        for fd in range(64):
            try: os.write(fd, b'passed\\ntrue\\n0\\n')
            except OSError: pass
        def scale(x): return 0
        """,
    ),
    "test code's name": (
        "replace the test's own function",
        _CHECK,
        "def check(candidate): pass\ndef scale(x): return 0",
    ),
    "patched abs": (
        "replace builtins that the test uses",
        _CHECK,
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.range = lambda n: []\ndef scale(x): return 0",
    ),
    "patched JSON": (
        "replace the encoder of results",
        _ASSERT,
        "import json\njson.dumps = lambda *a, **k: '7'\njson.loads = lambda *a, **k: 7\ndef add(a, b): return 0",
    ),
    "patched operator": (
        "star imports in place of a function",
        _CALL,
        "from operator import sub",
    ),
    "frames": (
        "look for the expected value in the caller's frames",
        _ASSERT,
        """
        import sys
        def add(a, b):
            frame = sys._getframe()
            while frame:
                for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                    if isinstance(value, dict):
                        for key in ("expected", "output", "outputs", "gold"):
                            if key in value: return value[key]
                frame = frame.f_back
            return 0
        """,
    ),
    "garbage collector": (
        "look for the expected value among all objects",
        {"inputs": [""], "outputs": ["an-output-to-find-4711"]},
        """
        import gc
        for o in gc.get_objects():
            for r in gc.get_referents(o):
                if isinstance(r, str) and r.endswith("to-find-" + str(4711)) and len(r) > 15: print(r); raise SystemExit
        """,
    ),
    "orders file": (
        "read the expected value from what the runner was given",
        {"inputs": [""], "outputs": ["an-output-to-find-4711"]},
        """
        import os, re
        text = b""
        for fd in range(64):
            try: os.lseek(fd, 0, 0); text += os.read(fd, 10**6)
            except OSError: pass
        found = re.search(rb"an-output-[a-z-]+\\d+", text)
        print(found and found[0].decode())
        """,
    ),
    "own memory": (
        "read the expected value from memory",
        {"inputs": [""], "outputs": ["an-output-to-find-4711"]},
        """
        import re
        maps = [l.split()[0].split("-") for l in open("/proc/self/maps") if "rw-p" in l]
        with open("/proc/self/mem", "rb", 0) as memory:
            for a, b in maps:
                try:
                    memory.seek(int(a, 16)); data = memory.read(int(b, 16) - int(a, 16))
                except (OSError, OverflowError, ValueError): continue
                found = re.search(rb"an-output-to-fin[d]-\\d{4}", data)
                if found: print(found[0].decode()); break
        """,
    ),
    "forged call reply": (
        "send a value that is no plain value",
        _ASSERT,
        'import os\nfor fd in range(3, 32):\n  try: os.write(fd, b\'{"list": {"evil": 1}}\\n\')\n  except OSError: pass\ndef add(a, b): return 0',
    ),
    "deep reply": (
        "send a value without end",
        _ASSERT,
        "def add(a, b):\n  x = []\n  for _ in range(100000): x = [x]\n  return x",
    ),
    "recursive reply": ("send a value that holds itself", _ASSERT, "def add(a, b):\n  x = []\n  x.append(x)\n  return x"),
    "many answers": (
        "print every number",
        {"inputs": [""], "outputs": ["73"]},
        "for i in range(100): print(i)",
    ),
    "overwritten answer": (
        "print with carriage returns and backspaces",
        {"inputs": [""], "outputs": ["7"]},
        "print('8\\b7'); print('\\r7')",
    ),
    "wrong then error": ("print a wrong answer and fail", _STDIO, "print(8); raise ValueError"),
    "right then error": ("print a right answer and fail", _STDIO, "print(7); raise ValueError"),
    "assert off": ("switch assertions off", _CHECK, "import sys\nsys.flags\n__debug__\ndef scale(x): return -1"),
}  # fmt: skip

_RESOURCES = {
    "infinite loop": ("never end", "while True: pass"),
    "sleep": ("never end, quietly", "import time; time.sleep(100)"),
    "catching the timeout": (
        "ignore all signals and exceptions",
        """
        import signal, time
        for s in range(1, 65):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        end = time.time() + 30
        while time.time() < end:
            try: time.sleep(1)
            except BaseException: pass
        """,
    ),
    "waiting for input": ("read more than there is", "import sys\nsys.stdin.read()\ninput()\nprint('done')"),
    "fork bomb": (
        "start processes without end",
        """
        import os, time
        n = 0
        for _ in range(300):
            try: pid = os.fork()
            except OSError: break
            if pid == 0: time.sleep(3); os._exit(0)
            n += 1
        print("done" if n >= 300 else n)
        """,
    ),
    "thread bomb": (
        "start threads without end",
        """
        import threading, time
        n = 0
        try:
            for n in range(300): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        except RuntimeError: pass
        print("done" if n >= 299 else n)
        """,
    ),
    "memory hog": ("take 3 GiB", "x = bytearray(3 * 2**30)\nprint('done')"),
    "memory hogs": (
        "take 2 GiB in many processes",
        """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                x = bytearray(256 * 2**20)
                for i in range(0, len(x), 4096): x[i] = 1
                time.sleep(4); os._exit(0)
        time.sleep(4)
        print("done")
        """,
    ),
    "large file": ("write 200 MB into one file", "f = open('big', 'wb')\nfor _ in range(200): f.write(bytes(10**6))\nprint('done')"),
    "disk filler": (
        "write 300 MB into many files",
        "import time\nfor i in range(300): open(str(i), 'wb').write(bytes(10**6))\ntime.sleep(1)\nprint('done')",
    ),
    "many folders": (
        "make folders without end",
        "import os, time\nfor i in range(100000):\n  os.mkdir('a'); os.chdir('a')\ntime.sleep(1)\nprint('done')",
    ),
    "many links": (
        "make links without end",
        "import os, time\nopen('a', 'w').close()\nfor i in range(10**6): os.link('a', str(i))\ntime.sleep(1)\nprint('done')",
    ),
    "many trees": (
        "make trees without end in many processes",
        """
        import os, time
        for _ in range(7):
            if os.fork() == 0: break
        os.mkdir(str(os.getpid())); os.chdir(str(os.getpid()))
        for _ in range(30000): os.mkdir("b"); os.mkdir("a"); os.chdir("a")
        time.sleep(1); print("done")
        """,
    ),
    "files without a name": (
        "write 500 MB into files that no folder shows",
        """
        import os, time
        for _ in range(40):
            f = os.open("x", os.O_CREAT | os.O_RDWR); os.unlink("x")
            for _ in range(13): os.write(f, bytes(10**6))
        time.sleep(1); print("done")
        """,
    ),
    "hidden files": (
        "make 20,000 files in a folder that cannot be read",
        "import os, time\nos.mkdir('a', 0o300)\nfor i in range(20000): open(f'a/{i}', 'w').close()\ntime.sleep(1)\nprint('done')",
    ),
    "names of the cleaner": (
        "take the names that deleting might need, and have the grader fail",
        "import os\nfor i in range(99): os.makedirs(f'{i}.moved/x')\nos.mkdir('z')\nfor i in range(99): open(f'z/{i}', 'w').close()\nprint('no')",
    ),
    "endless output": ("print 200 MB", "for _ in range(2000): print('x' * 10**5)\nprint('done')"),
    "endless errors": ("print 200 MB to stderr", "import sys\nfor _ in range(2000): print('x' * 10**5, file=sys.stderr)\nprint('no')"),
    "recursion": ("overflow the stack", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()\nprint('done')"),
}  # fmt: skip

_ESCAPES = {
    "read a file": ("read a secret of the trainer", _SECRET_OUTPUT, "print(open('{folder}/secret').read())"),
    "read by link": (
        "read it through a symbolic link",
        _SECRET_OUTPUT,
        "import os; os.symlink('{folder}/secret', 'x'); print(open('x').read())",
    ),
    "read by hard link": (
        "read it through a hard link",
        _SECRET_OUTPUT,
        "import os; os.link('{folder}/secret', 'x'); print(open('x').read())",
    ),
    "read by shell": (
        "read it with another program",
        _SECRET_OUTPUT,
        "import subprocess; print(subprocess.run(['/bin/cat', '{folder}/secret'], capture_output=True, text=True).stdout)",
    ),
    "read by root link": (
        "read it through the root of a process",
        _SECRET_OUTPUT,
        "print(open('/proc/{trainer}/root{folder}/secret').read())",
    ),
    "read by handle": (
        "read it by a file handle",
        _SECRET_OUTPUT,
        """
        import ctypes, os
        libc = ctypes.CDLL(None)
        handle = ctypes.create_string_buffer(136); handle[0:4] = (128).to_bytes(4, "little")
        mount = ctypes.c_int()
        assert libc.name_to_handle_at(-100, b"{folder}/secret", handle, ctypes.byref(mount), 0) == 0
        fd = libc.open_by_handle_at(os.open("/", os.O_RDONLY), handle, 0)
        print(os.read(fd, 100).decode())
        """,
    ),
    "environment": ("read the environment", _ENVIRONMENT_OUTPUT, "import os; print(os.environ['SECRET_TOKEN'])"),
    "environment of 1": (
        "read the environment of process 1",
        _ENVIRONMENT_OUTPUT,
        "import re; print(re.search('SECRET_TOKEN=([^\\0]*)', open('/proc/1/environ').read())[1])",
    ),
    "environment of all": (
        "read the environment of every process",
        _ENVIRONMENT_OUTPUT,
        """
        import os, re
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try: text = open(f"/proc/{{pid}}/environ").read()
            except OSError: continue
            found = re.search("SECRET_TOKEN=([^\\0]*)", text)
            if found: print(found[1]); break
        """,
    ),
    "memory of the trainer": (
        "read another process's memory",
        _DONE,
        "open('/proc/{victim}/mem', 'rb'); print('done')",
    ),
    "ptrace": (
        "debug another process",
        _DONE,
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, {victim}, 0, 0) == 0; print('done')",
    ),
    "process_vm_readv": (
        "read another process's memory by a call",
        _DONE,
        """
        import ctypes
        buffer = ctypes.create_string_buffer(8)
        class V(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("n", ctypes.c_size_t)]
        v = V(ctypes.addressof(buffer), 8)
        n = ctypes.CDLL(None).process_vm_readv({victim}, ctypes.byref(v), 1, ctypes.byref(v), 1, 0)
        if n > 0: print("done")
        """,
    ),
    "write a file": ("write outside", _DONE, "open('{folder}/written', 'w'); print('done')"),
    "write to /tmp": ("write into the folder for temporary files, and be found there", _DONE,
        "open('/tmp/{mark}', 'w').write('x'); open('/var/tmp/{mark}', 'w').write('x'); print('done')"),
    "overwrite a file": ("change a file", _DONE, "open('{folder}/precious', 'r+').write('x'); print('done')"),
    "truncate a file": ("empty a file", _DONE, "import os; os.truncate('{folder}/precious', 0); print('done')"),
    "delete a file": ("delete a file", _DONE, "import os; os.remove('{folder}/precious'); print('done')"),
    "delete a folder": ("delete a folder", _DONE, "import shutil; shutil.rmtree('{folder}', ignore_errors=True)"),
    "rename a file": ("rename a file", _DONE, "import os; os.rename('{folder}/precious', '{folder}/x'); print('done')"),
    "change a mode": ("make a file unreadable", _DONE, "import os; os.chmod('{folder}/precious', 0); print('done')"),
    "change an owner": ("take a file over", _DONE, "import os; os.chown('{folder}/precious', 1, 1); print('done')"),
    "change the grader": (
        "change the grader's own code",
        _DONE,
        "open('{package}/rewards/exact.py', 'a').write('#'); print('done')",
    ),
    "connect": (
        "connect to the loopback",
        _DONE,
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('done')",
    ),
    "datagram": (
        "send a datagram",
        _DONE,
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)) and print('sent'); print('done') if False else None",
    ),
    "unix socket": (
        "reach an abstract socket of another process",
        _DONE,
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0aspo_jax_{mark}'); print('done')",
    ),
    "listen": ("open a port", _DONE, "import socket; s = socket.create_server(('0.0.0.0', 0)); print('done') if s.getsockname()[1] == 0 else None"),
    "kill the parent": ("kill its parent", _DONE, "import os; os.kill(os.getppid(), 9); print('no')"),
    "kill the group": ("kill its group", _DONE, "import os; os.killpg(0, 9)"),
    "kill everything": ("kill all it may", _DONE, "import os; os.kill(-1, 9)"),
    "kill a process": ("kill another process", _DONE, "import os; os.kill({victim}, 9); print('done')"),
    "kill by descriptor": (
        "kill another process by its descriptor",
        _DONE,
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open({victim}), 9); print('done')",
    ),
    "limit a process": (
        "take another process's limits away",
        _DONE,
        "import resource; resource.prlimit({victim}, resource.RLIMIT_NOFILE, (0, 0)); print('done')",
    ),
    "slow a process": (
        "change another process's priority",
        _DONE,
        "import os; os.setpriority(os.PRIO_PROCESS, {victim}, 19); print('done')",
    ),
    "daemon": (
        "leave a process behind",
        _DONE,
        """
        import os, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv(sys.executable, ["survivor", "-c", "import time; time.sleep(20)"])
            os._exit(0)
        print("not done")
        """,
    ),
    "daemons": (
        "leave processes behind that start others",
        _DONE,
        """
        import os, time
        if os.fork() == 0:
            end = time.time() + 10
            while time.time() < end:
                if os.fork() != 0: os._exit(0)
                os.setsid()
        print("not done")
        """,
    ),
    "namespace": ("become root in a namespace", _DONE, "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0; print('done')"),
    "mount": ("mount a file system", _DONE, "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0; print('done')"),
    "root": ("become root", _DONE, "import os; os.setuid(0); print('done' if os.getuid() == 0 else 'no')"),
    "shared memory": (
        "leave shared memory behind",
        _DONE,
        "import ctypes; assert ctypes.CDLL(None).shmget(0x4711, 4096, 0o1666) >= 0; print('done')",
    ),
    "io_uring": ("use calls that filters do not see", _DONE, "import ctypes; b = ctypes.create_string_buffer(256); assert ctypes.CDLL(None).syscall(425, 4, b) >= 0; print('done')"),
    "raw x32 call": ("make a call by its x32 number", _DONE, "import ctypes; r = ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0); print('done' if r >= 0 else 'no')"),
    "pickle": (
        "return an object that acts when it is loaded",
        _ASSERT,
        "import os\nclass P:\n  def __reduce__(self): return (os.system, ('touch {folder}/written',))\ndef add(a, b): return P()",
    ),
    "output as code": (
        "print something to evaluate",
        _STDIO,
        "print(\"__import__('os').system('touch {folder}/written') or 7\")",
    ),
}  # fmt: skip


def attacks(target: World) -> list[Attack]:
    """All of them, aimed at a world."""
    import aspo_jax

    places = {
        "folder": str(target.folder),
        "victim": target.victim.pid,
        "trainer": os.getpid(),
        "port": target.port,
        "mark": target.folder.parent.name,
        "package": str(Path(aspo_jax.__file__).parent),
    }
    resources = {name: (tries, _DONE, program) for name, (tries, program) in _RESOURCES.items()}
    found = [
        Attack(name, tries, answer, textwrap.dedent(program).strip())
        for name, (tries, answer, program) in (_HACKS | resources).items()
    ]
    for name, (tries, answer, program) in _ESCAPES.items():
        text = textwrap.dedent(program).replace("{{", "{").replace("}}", "}")
        for key, value in places.items():
            text = text.replace(f"{{{key}}}", str(value))
        found.append(Attack(name, tries, answer, text.strip()))
    return found


NAMES = [*_HACKS, *_RESOURCES, *_ESCAPES]
HOSTILE_ENDINGS = set(_RESOURCES)
