"""Looking at a program's files and deleting them: whatever they are, and within a time."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from aspo_jax.rewards import Rules, Scorer, Submission

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux")
if sys.platform == "linux":
    from aspo_jax.rewards.code import sandbox

MIB = 2**20
NEVER = 1e9


def fill(folder, count):
    for i in range(count):
        (folder / f"{i}").touch()


def deep(folder, levels, name="a"):
    before = os.getcwd()
    os.chdir(folder)
    for _ in range(levels):
        os.mkdir(name)
        os.chdir(name)
    os.chdir(before)


@pytest.fixture
def folder():
    """In memory, like the folders of programs, where that is possible."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = tempfile.mkdtemp(prefix="test_sandbox_", dir=memory)
    yield Path(made)
    sandbox.remove(made)
    assert wait_until(lambda: not os.path.exists(made))


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_look_counts_files_folders_and_blocks(folder):
    fill(folder, 10)
    (folder / "folder").mkdir()
    (folder / "folder" / "data").write_bytes(b"x" * MIB)
    with open(folder / "sparse", "wb") as file:
        file.truncate(2**40)
    found = sandbox._usage(str(folder), 2**40, time.monotonic() + NEVER)
    assert MIB + 13 * 4096 <= found < MIB + 40 * 4096


def test_a_look_ends_at_its_bounds(folder):
    fill(folder, 2000)
    assert sandbox._usage(str(folder), 4096, time.monotonic() + NEVER) == 2 * 4096
    assert sandbox._usage(str(folder), MIB, time.monotonic() - 1) == 4096


def test_a_look_ends_while_the_folder_grows(folder):
    program = "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()"
    with subprocess.Popen([sys.executable, "-c", program], cwd=folder) as grower:
        assert wait_until(lambda: len(os.listdir(folder)) > 100)
        begin = time.monotonic()
        sandbox._usage(str(folder), 2**60, time.monotonic() + 0.2)
        seconds = time.monotonic() - begin
        grower.kill()
    assert seconds < 1.0


def test_a_folder_without_end_is_huge(folder):
    deep(folder, 30, "a" * 200)
    assert sandbox._usage(str(folder), 2**40, time.monotonic() + NEVER) > 2**40


def test_a_file_without_a_name_counts_while_it_is_open(folder):
    device = folder.stat().st_dev
    with open(folder / "x", "wb") as file:
        file.write(b"x" * MIB)
        file.flush()
        assert sandbox._unlinked([os.getpid()], device) < MIB
        os.unlink(folder / "x")
        assert sandbox._unlinked([os.getpid(), os.getpid()], device) >= MIB
    assert sandbox._unlinked([os.getpid(), 2**22 + 1], device) < MIB


def odd_tree(folder):
    """What a program may leave: names, modes and kinds of every sort."""
    (folder / "zz").mkdir()
    for i in range(30):
        (folder / f"{i}.moved" / "x").mkdir(parents=True)  # names that a cleaner might choose
        (folder / "zz" / f"file {i}").touch()
    for name in ("a\nb", "\udcff", " ", "-rf", "*", "x" * 255):
        (folder / name).mkdir()
        (folder / name / "y\n").touch()
    os.symlink("/", folder / "root")
    os.symlink(".", folder / "zz" / "loop")
    os.symlink("nowhere", folder / "zz" / "dangling")
    os.mkfifo(folder / "fifo")
    with open(folder / "sparse", "wb") as file:
        file.truncate(2**40)
    deep(folder, 1500)
    for path in (folder / "1.moved/x", folder / "zz", folder / "0.moved", folder / "fifo", folder):
        path.chmod(0)


def as_nobody(function):
    """Call it as a user without rights; in a thread, for only that one's rights are dropped."""

    def work():
        if os.geteuid() == 0:
            ctypes.CDLL(None).setfsgid(65534)
            ctypes.CDLL(None).setfsuid(65534)
        done.append(function())

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return done


@pytest.mark.parametrize("call", [as_nobody, lambda function: [function()]])
def test_every_tree_is_deleted_and_nothing_else(folder, call):
    folder.chmod(0o777)
    (folder / "mine").touch()

    def build():
        (folder / "work").mkdir()
        odd_tree(folder / "work")

    call(build)
    command = ["sh", "-c", sandbox._REMOVE, str(folder / "work")]
    user = 65534 if call is as_nobody and os.geteuid() == 0 else None
    for _ in range(2):  # the second time it is gone
        done = subprocess.run(command, user=user, capture_output=True, check=True)
        assert done.stdout == done.stderr == b""
        assert os.listdir(folder) == ["mine"]


def test_deleting_takes_nobodys_time(folder):
    work = folder / "work"
    work.mkdir()
    fill(work, 20_000)
    deep(work, 200)
    begin = time.monotonic()
    sandbox.remove(str(work))
    assert time.monotonic() - begin < 0.5
    assert wait_until(lambda: not work.exists())


def test_what_cannot_be_deleted_is_named():
    command = ["sh", "-c", sandbox._REMOVE, "/proc/self/status"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "cannot delete /proc/self/status, the files of a graded program" in done.stderr


def test_what_a_killed_worker_was_deleting_is_deleted(folder):
    work = folder / "work"
    work.mkdir()
    fill(work, 20_000)
    program = (
        "import os, signal\nfrom aspo_jax.rewards.code import sandbox\n"
        f"sandbox.remove({str(work)!r})\nos.killpg(0, signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, start_new_session=True).returncode == -signal.SIGKILL
    assert wait_until(lambda: not work.exists())


FORKS = "import os\nfor _ in range(7):\n  if os.fork() == 0: break\n"
OWN = "os.mkdir(str(os.getpid())); os.chdir(str(os.getpid()))\n"
ENDLESS = {
    "files": "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()",
    "trees": f"{FORKS}{OWN}while True: os.mkdir('b'); os.mkdir('a'); os.chdir('a')",
    "chains": f"{FORKS}while True:\n  {OWN}",
    "links": "import os\nopen('a', 'w')\ni = 0\nwhile True: os.link('a', str(i)); i += 1",
}


def left_by(worker):
    """Folders in memory of the user that a worker's programs run as."""
    uid = os.geteuid() or sandbox._FIRST_UID + worker % sandbox._UIDS
    found = [p for p in Path("/dev/shm").iterdir() if p.name.startswith("aspo_jax_")]
    owned = []
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # another test's, deleted just now
            owned += [path] if path.lstat().st_uid == uid else []
    return owned


@pytest.mark.parametrize("tier", ["namespaces", "landlock", "rlimits"])
def test_no_program_breaks_its_time_limit_with_files(tier):
    if tier == "namespaces" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    rules = Rules(sandbox=tier, test_timeout_s=1.0, program_timeout_s=1.0)
    with Scorer(1, rules, kinds=("code",)) as scorer:
        scorer.wait_until_ready()
        (worker,) = (worker._process.pid for worker in scorer._workers)
        for program in ENDLESS.values():
            text = f"```python\n{program}\n```"
            begin = time.monotonic()
            answer = {"inputs": [""], "outputs": ["x"]}
            (verdict,) = scorer.score([Submission("code", text, answer, True, 1)])
            assert time.monotonic() - begin < 3.0
            assert verdict.reason in ("timeout", "exhausted") and verdict.is_valid
    assert wait_until(lambda: not left_by(worker))


def test_a_link_in_place_of_the_folder_is_not_followed(folder):
    """Without a real sandbox a program may put one there, and the trainer may be root."""
    precious = folder / "precious"
    precious.mkdir(mode=0o755)
    (precious / "file").touch()
    program = (
        "import os\nhere = os.getcwd()\nos.rmdir(here)\n"
        f"os.symlink({str(precious)!r}, here)\nprint('x')"
    )
    with Scorer(1, Rules(sandbox="rlimits"), kinds=("code",)) as scorer:
        answer = {"inputs": [""], "outputs": ["x"]}
        said = Submission("code", f"```python\n{program}\n```", answer, True, 1)
        assert [v.reason for v in scorer.score([said])] == ["match"]
        (worker,) = (worker._process.pid for worker in scorer._workers)
    assert (precious / "file").exists() and precious.stat().st_mode & 0o777 == 0o755
    assert wait_until(lambda: not left_by(worker))


def test_a_program_that_deletes_its_own_folder_is_judged():
    """Without a real sandbox it may; a grader that failed would take its sample out."""
    program = "import os, time\nos.rmdir(os.getcwd())\ntime.sleep(0.3)\nprint('x')"
    rules = Rules(sandbox="rlimits")
    with Scorer(1, rules, kinds=("code",)) as scorer:
        for output, reason in (("x", "match"), ("y", "mismatch")):
            answer = {"inputs": [""], "outputs": [output]}
            said = Submission("code", f"```python\n{program}\n```", answer, True, 1)
            (verdict,) = scorer.score([said])
            assert verdict.reason == reason and verdict.is_valid
