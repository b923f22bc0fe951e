"""One writer per run folder, in a folder that is what it should be and stays where it is.

config.gin          the resolved config; a later start with another one is refused
model_files.json    sizes and digests of the files of the model that the run started from
teacher_files.json  the same of the teacher, if there is one
metrics.jsonl       one line per iteration            tensorboard/  the same as events
checkpoints/        everything a bitwise resume needs
initial_model/      the warm-started model            model/        the trained one, or
                                                      adapter/      what was trained beside it
transcripts/        prompts, answers and verdicts of each iteration and each evaluation
drawn/              what external engines drew, so that it need not be drawn again
engine.log          what the engine of Sampler.command says
rollouts/           whole rollouts of the iterations of Train.record, see `aspo_jax.recording`
profile/            traces of the iterations of Metrics.profile_iterations
dynamics.png        the pictures                      .lock         who is writing
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from etils import epath

from aspo_jax.errors import UserError, describe
from aspo_jax.files import absolute, is_local

LOCK = ".lock"
CONFIG = "config.gin"
MODEL_FILES = "model_files.json"
TEACHER_FILES = "teacher_files.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
INITIAL_MODEL = "initial_model"
MODEL = "model"
ADAPTER = "adapter"
ROLLOUTS = "rollouts"
DRAWN = "drawn"
ENGINE_LOG = "engine.log"
FILES = (LOCK, CONFIG, MODEL_FILES, TEACHER_FILES, METRICS, ENGINE_LOG, "dynamics.png")
FOLDERS = (
    *(CHECKPOINTS, INITIAL_MODEL, MODEL, ADAPTER),
    *("tensorboard", "transcripts", ROLLOUTS, DRAWN, "profile"),
)

# NFS turns flock into a lock that needs a descriptor open for writing, which a folder has not.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)

_logger = logging.getLogger(__name__)


class RunLocked(UserError):
    """Another process is writing this run folder."""


class RunFolderError(UserError):
    """The run folder cannot be made or written, holds what it must not, or is gone."""


class RunLock:
    """The right to write a run folder, held until `release` or the end of the ``with`` block."""

    def __init__(self):
        self.held: dict[epath.Path, int] = {}  # path -> descriptor that holds its lock

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def hold(self, path: epath.Path, flags: int) -> None:
        """Open a path and lock it, where it can be locked; BlockingIOError if another has it."""
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_FLOCK:
                raise
        else:
            self.held[path] = descriptor

    def check(self) -> None:
        """The folder is still the one that was locked.

        Raises:
            RunFolderError: it was deleted, moved or replaced. Nothing may be written to its path
                any more, which another process may own by now.
        """
        # The folder's own lock is enough; only where there is none the lock file matters.
        for path, descriptor in list(self.held.items())[:1]:
            try:
                is_same = os.path.samestat(os.stat(path), os.fstat(descriptor))
            except (FileNotFoundError, NotADirectoryError):
                is_same = False
            if not is_same:
                raise RunFolderError(_lost(path, descriptor))

    def release(self) -> None:
        """Give the folder free. The lock file stays: removing it would race with its next owner."""
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held = {}


def _lost(path: epath.Path, descriptor: int) -> str:
    """What to say of a locked path that is no longer there."""
    if path.name == LOCK:
        return (
            f"{path} was deleted under the run, and without it a second writer is not detected "
            "here; stopped, unsaved. The same command goes on from the newest checkpoint"
        )
    try:
        now = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        now = ""
    if now and os.path.isdir(now):
        return (
            f"run folder {path} was moved to {now} under the run; stopped, unsaved. Move it back, "
            "or set Run.folder to where it is now: the run goes on from its newest checkpoint"
        )
    return (
        f"run folder {path} was deleted or replaced under the run: its metrics and checkpoints are "
        "gone, and nothing was written to the path since. Put back a copy and start the same "
        "command, or start again"
    )


def lock_run(folder: epath.PathLike) -> RunLock:
    """Make sure that no other process writes this run folder.

    The locks are the kernel's (flock, on the folder itself and on ``.lock``), so they end with
    their process, even by kill -9, and deleting ``.lock`` does not let a second writer in. Where
    there are none (``gs://``, file systems without flock) a warning says so.

    Raises:
        RunLocked: names the host, process and start of the run that holds the folder.
        RunFolderError: the folder cannot be made or written, or something in it is not what a
            run keeps under that name.
    """
    return lock_folder(folder, "run folder", "Run.folder", check_contents)


def lock_folder(
    folder: epath.PathLike,
    what: str,
    setting: str,
    check: Callable[[epath.Path], None] = lambda folder: None,
) -> RunLock:
    """`lock_run` of a folder of another kind.

    what, setting: for the message: what it is, and what names it.
    check: raises if something in it is not what is kept there.
    """
    folder = absolute(folder)
    if not is_local(folder):
        _logger.warning("%s is not a local folder: a second writer is not detected", folder)
        return RunLock()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check(folder)
        return _lock(folder, what)
    except OSError as error:
        raise RunFolderError(
            f"{what} {folder} cannot be used: {describe(error, error.filename) or error}; "
            f"expected a folder that can be made and written, set {setting} to another one"
        ) from error


def check_contents(folder: epath.PathLike) -> None:
    """What a run keeps in its folder can be written there.

    Raises:
        RunFolderError: each path under a name of ours that is of another kind.
    """
    wanted = dict.fromkeys(FILES, "file") | dict.fromkeys(FOLDERS, "folder")
    problems = [
        f"{path} is a {found}, expected a {kind}"
        for name, kind in wanted.items()
        if (found := _kind(path := Path(folder) / name)) not in (None, kind)
    ]
    if problems:
        raise RunFolderError(
            "; ".join(problems) + ": move it out of the run folder, or set Run.folder to another"
        )


def _kind(path: Path) -> str | None:
    """What a path is, links followed; None if nothing is there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "link to nothing" if path.is_symlink() else None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "socket or device")


def _lock(folder: epath.Path, what: str) -> RunLock:
    lock = RunLock()
    try:
        lock.hold(folder, os.O_RDONLY | os.O_DIRECTORY)
        lock.hold(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        note = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        (folder / LOCK).write_text(json.dumps(note))
    except OSError as error:
        lock.release()
        if not isinstance(error, BlockingIOError):
            raise
        raise RunLocked(
            f"{what} {folder} is being written by {_holder(folder / LOCK)}: "
            "wait for that run, stop it, or choose another folder"
        ) from None
    if not lock.held:
        _logger.warning("%s: no flock here, a second writer is not detected", folder)
    return lock


def _holder(path: epath.Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process (its note in .lock is not readable)"
