"""Everything a run needs to survive: verified checkpoints, one writer per folder, orderly stops.

A step is *complete* once its manifest exists. Saving step 20 goes

    Orbax writes 20.orbax-checkpoint-tmp/ and renames it to 20/       (Orbax's commit)
    every file of 20/ is flushed to disk and digested (sha256)         (background thread)
    20/manifest.json appears by a rename                               (our commit, written last)
    steps that are no longer kept lose their manifest, then the rest   (pruning)

so a process killed at any moment leaves complete steps, or folders without a manifest, which are
skipped. Orbax's own commit is not trusted at restore: its array files carry no checksum, and a step
that was being deleted is still listed by it.

    with StopRequest() as stop, lock_run(folder), Checkpoints(path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract_state)       # None: nothing to continue
        with contextlib.suppress(Interrupted):
            for step in ...:
                with stop.interruptible():
                    ...                                      # sampling, grading: dropped at a stop
                ...                                          # the update: always finished
                if stop.requested:
                    break
        checkpoints.save(step, state, meta)                  # the second signal can still end this
    sys.exit(EXIT_SAVED if stop.requested else 0)

With several processes the folder is shared, process 0 holds the lock, and all of them save, restore
and stop together.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from aspo_jax.errors import UserError

EXIT_SAVED = 75
"""Exit status of a run that a signal stopped after saving (EX_TEMPFAIL of sysexits.h): run the same
command again to go on."""

MANIFEST = "manifest.json"

_FORMAT = 1
_NONE_COMPLETE, _ALL_DAMAGED = -1, -2
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint could not be written, or none of those present can be used."""


class RunLocked(UserError):
    """Another process is writing this run folder."""


class RunFolderError(UserError):
    """The run folder cannot be made or written."""


class Interrupted(BaseException):
    """A stop was requested inside `StopRequest.interruptible`.

    Like KeyboardInterrupt not an Exception: no ``except Exception`` on the way may swallow it.
    """


# --- files -------------------------------------------------------------------------------------


def write_text_atomic(path: epath.PathLike, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old or the new text, never a part.

    Local paths: temporary file beside it, fsync, rename, fsync of the folder. Object stores
    (``gs://``): one write, which is atomic there.
    """
    path = epath.Path(path)
    if not _is_local(path):
        path.write_text(text)
        return
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _absolute(folder: epath.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return epath.Path(os.path.abspath(path.expanduser())) if _is_local(path) else path


def _fsync(path: epath.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file below a folder, in a fixed order; each subfolder follows its own files."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path)
        yield path


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- the manifest ------------------------------------------------------------------------------


class _Unusable(Exception):
    """Why a step cannot be used: the file and what is wrong with it."""


class _Unsealed(_Unusable):
    """The step has no manifest: it was never completed, or its deletion was begun."""


def _describe(state: Any) -> dict[str, str]:
    """Path of each leaf -> its dtype and shape, e.g. ``{".params['w']": "float32[8, 16]"}``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"state{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, "
                "expected an array: wrap it in jnp.asarray, or put it into meta"
            )
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _manifest_text(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    own_digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"manifest": body, "sha256": own_digest}, indent=1, sort_keys=True) + "\n"


def _seal(step: epath.Path, leaves: dict[str, str]) -> None:
    """Flush and digest the files of a step that Orbax committed, then write its manifest."""
    files = {}
    for path in _walk(step):
        if _is_local(path):
            _fsync(path)
        if not path.is_dir():
            name = path.relative_to(step).as_posix()
            files[name] = {"bytes": path.stat().length, "sha256": _digest(path)}
    if _is_local(step):
        _fsync(step)
        _fsync(step.parent)
    body = {"format": _FORMAT, "step": int(step.name), "leaves": leaves, "files": files}
    write_text_atomic(step / MANIFEST, _manifest_text(body))


def _read_manifest(step: epath.Path) -> dict[str, Any]:
    """The manifest of a step; raises _Unusable when it is absent, damaged or another step's."""
    path = step / MANIFEST
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)["manifest"]
    except FileNotFoundError:
        raise _Unsealed(f"{MANIFEST} is missing: the step was never completed") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _Unusable(f"{MANIFEST} cannot be read ({error!r})") from error
    if text != _manifest_text(body):
        raise _Unusable(f"{MANIFEST} is damaged: its text does not match its own digest")
    if body["format"] != _FORMAT:
        raise _Unusable(f"{MANIFEST} has format {body['format']}, this program reads {_FORMAT}")
    if body["step"] != int(step.name):
        raise _Unusable(f"{MANIFEST} is that of step {body['step']}: the folder was renamed")
    return body


def _verify(step: epath.Path) -> None:
    """Compare every file of a step with its manifest; raises _Unusable naming the first bad one.

    Files that the manifest does not list cannot be reached by a restore and are ignored.
    """
    for name, expected in _read_manifest(step)["files"].items():
        path = step / name
        try:
            size = path.stat().length
            if size != expected["bytes"]:
                raise _Unusable(f"{name} has {size} bytes, expected {expected['bytes']}")
            if _digest(path) != expected["sha256"]:
                raise _Unusable(f"{name} is damaged: its sha256 differs from the manifest's")
        except FileNotFoundError:
            raise _Unusable(f"{name} is missing") from None
        except OSError as error:
            raise _Unusable(f"{name} cannot be read ({error})") from error


def _check_leaves(step: epath.Path, found: dict[str, str], expected: dict[str, str]) -> None:
    """Raise a CheckpointError unless the checkpoint's leaves are exactly those of this run."""
    differences = [
        f"state{leaf}: found {found.get(leaf, 'nothing')}, expected {expected.get(leaf, 'nothing')}"
        for leaf in sorted(found.keys() | expected.keys())
        if found.get(leaf) != expected.get(leaf)
    ]
    if differences:
        shown = "\n  ".join(differences[:8])
        raise CheckpointError(
            f"checkpoint {step} does not fit this run; {len(differences)} leaves differ:\n"
            f"  {shown}\nUse the model and optimizer settings it was saved with, or a new folder."
        )


def _check_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """A private copy of meta, as JSON will give it back; a TypeError if that is not the same."""
    try:
        copy = json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must be plain JSON: {error}") from error
    for key, value in meta.items():
        if key not in copy or copy[key] != value:
            raise TypeError(
                f"meta[{key!r}] does not survive JSON: {value!r} comes back as {copy.get(key)!r}; "
                "use lists, strings, numbers, None and string keys"
            )
    return copy


# --- checkpoints -------------------------------------------------------------------------------


class Restored(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: saved in the background, verified before they are used.

    folder: local or ``gs://``, absolute or relative; one subfolder per step, readable by Orbax
        (items ``state`` and ``meta``).
    keep: how many complete steps stay; the rest goes once a newer step is complete.

    With several processes every process calls every method at the same point. The folder is shared
    (Orbax requires that), so process 0 alone digests, verifies and prunes: one reader is the
    simplest thing that is correct, at the price of its reading each checkpoint once more. The
    others learn its verdict by a broadcast.
    """

    def __init__(self, folder: epath.PathLike, keep: int):
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1 checkpoint to keep")
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax narrates each save at INFO
        self._folder = _absolute(folder)
        self._keep = keep
        self._complete: set[int] = set()
        # Not Orbax's CheckpointManager: it keeps its own list of steps, which deleting and
        # replacing steps by the manifest's rules would contradict. The layout is the same.
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Start saving a step and return; the state may be donated at once.

        Waits for the previous save first. A step that is already there is kept when it verifies
        and replaced when it does not.

        Args:
          step: number of the step, the name of its folder.
          state: pytree of arrays (typed PRNG keys too).
          meta: plain JSON; comes back exactly.

        Raises:
          CheckpointError: this save, or the previous one in the background, failed.
          TypeError: a leaf is not an array, or meta is not plain JSON.
        """
        leaves, meta = _describe(state), _check_meta(meta)
        self.wait()
        path = self._folder / str(step)
        if _broadcast(int(jax.process_index() == 0 and self._has_good(step))):
            return
        with _named(path):
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers(step)
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave(meta),
            )
            self._orbax.save(path, args=items)
        self._pending = self._background.submit(self._finish, path, leaves)

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest step that verifies, on the shardings of ``abstract_state``.

        A step without a manifest or with a bad file is reported in the log and skipped.

        Args:
          abstract_state: pytree of ShapeDtypeStructs or arrays; a leaf without a sharding goes to
            the first device.

        Returns:
          None if no step was ever completed.

        Raises:
          CheckpointError: steps were completed but none verifies (starting from scratch must be
            the user's decision), or the state has other leaves, shapes or dtypes than this run's
            (Orbax itself would cast dtypes silently).
        """
        step = self._newest()
        if step is None:
            return None
        path = self._folder / str(step)
        _check_leaves(path, _read_manifest(path)["leaves"], _describe(abstract_state))
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, abstract_state)),
            meta=ocp.args.JsonRestore(),
        )
        with _named(path):
            restored = self._orbax.restore(path, args=items)
        return Restored(step, restored.state, restored.meta)

    def restore_params(
        self, abstract_params: Any, step: int | None = None
    ) -> tuple[int, Any] | None:
        """The step and the ``params`` of its state alone, without the optimizer's; one process.

        Args:
          abstract_params: pytree of ShapeDtypeStructs with shardings; values are cast to its
            dtypes.
          step: which one; None: the newest that verifies.

        Returns:
          None if no step was ever completed.

        Raises:
          CheckpointError: the step is not there or damaged, none verifies, or the params have
            other leaves or shapes.
        """
        if step is None:
            step = self._newest()
            if step is None:
                return None
        else:
            self._check(step)
        path = self._folder / str(step)
        saved = _read_manifest(path)["leaves"]
        found = {leaf: text for leaf, text in saved.items() if leaf.startswith(".params")}
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), abstract_params)
        _check_leaves(path, found, {f".params{k}": text for k, text in _describe(wide).items()})
        item = {"params": abstract_params}
        asked = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with _named(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return step, reader.restore(path / "state", args=asked)["params"]

    def _check(self, step: int) -> None:
        path = self._folder / str(step)
        try:
            _verify(path)
        except _Unusable as problem:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}") from None

    def _newest(self) -> int | None:
        """The newest step that verifies; see `restore`."""
        self.wait()
        step = _broadcast(self._newest_good() if jax.process_index() == 0 else _NONE_COMPLETE)
        if step == _ALL_DAMAGED:
            raise CheckpointError(
                f"no checkpoint in {self._folder} can be used:\n  {self._report()}\n"
                "Put back an intact copy, or start again in a new folder."
            )
        return None if step == _NONE_COMPLETE else step

    def wait(self) -> None:
        """Wait until the last save is complete; raises a CheckpointError if it failed."""
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])
        pending, self._pending = self._pending, None
        pending.result()

    def close(self) -> None:
        """Wait for the last save, then release Orbax and the thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def _finish(self, path: epath.Path, leaves: dict[str, str]) -> None:
        """The background half of a save."""
        with _named(path):
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            _seal(path, leaves)
            self._complete.add(int(path.name))
            self._prune(int(path.name))

    def _steps(self) -> list[int]:
        """Numbers of all step folders, complete or not, newest first."""
        if not self._folder.exists():
            return []
        names = (path.name for path in self._folder.iterdir())
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _has_good(self, step: int) -> bool:
        try:
            _verify(self._folder / str(step))
        except _Unusable:
            return False
        self._complete.add(step)
        return True

    def _newest_good(self) -> int:
        """The step to restore; warns of each one that is passed over."""
        was_any_complete = False
        for step in self._steps():
            path = self._folder / str(step)
            try:
                _verify(path)
            except _Unusable as problem:
                was_any_complete |= not isinstance(problem, _Unsealed)
                _logger.warning("checkpoint %s skipped: %s", path, problem)
                continue
            self._complete.add(step)
            return step
        return _ALL_DAMAGED if was_any_complete else _NONE_COMPLETE

    def _report(self) -> str:
        """One line per step: what is wrong with it."""
        lines = []
        for step in self._steps():
            try:
                _verify(self._folder / str(step))
            except _Unusable as problem:
                lines.append(f"step {step}: {problem}")
        return "\n  ".join(lines)

    def _prune(self, newest: int) -> None:
        """Remove all but the ``keep`` newest complete steps, of which ``newest`` is one."""
        kept = {newest}
        for step in self._steps():
            if step in kept:
                continue
            if len(kept) < self._keep and (step in self._complete or self._has_good(step)):
                kept.add(step)
            else:
                self._remove(step)

    def _remove_leftovers(self, step: int) -> None:
        """Remove what killed saves left half-written, and a bad step of the same number."""
        for path in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            path.rmtree()
        self._remove(step)

    def _remove(self, step: int) -> None:
        """Delete a step, its manifest first: a half-deleted step does not count as complete."""
        path = self._folder / str(step)
        if path.exists():
            self._complete.discard(step)
            (path / MANIFEST).unlink(missing_ok=True)
            path.rmtree()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding; without one, Orbax would use the devices it was saved on."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _broadcast(value: int) -> int:
    """The value that process 0 holds."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def _named(path: epath.Path) -> Iterator[None]:
    """Turn any error into a CheckpointError that names the checkpoint."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"checkpoint {path}: {type(error).__name__}: {error}") from error


# --- one writer per run folder -----------------------------------------------------------------


class RunLock:
    """The right to write a run folder, held until `release` or the end of the ``with`` block."""

    def __init__(self, descriptor: int | None):
        self._descriptor = descriptor

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free. The lock file stays: removing it would race with its next owner."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_run(folder: epath.PathLike) -> RunLock:
    """Make sure that no other process writes this run folder; several processes: process 0 calls.

    The lock is the kernel's (flock on ``.lock``), so it ends with its process, even by kill -9.
    Where there is none (``gs://``, file systems without flock) a warning says so.

    Raises:
      RunLocked: names the host, process and start of the run that holds the folder.
      RunFolderError: the folder cannot be made or written.
    """
    folder = _absolute(folder)
    if not _is_local(folder):
        _logger.warning("%s is not a local folder: a second writer is not detected", folder)
        return RunLock(None)
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder} cannot be used ({error.strerror}); expected a folder that can be "
            "made and written, set Run.folder to another one"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _NO_FLOCK:
            _logger.warning("%s: no flock here, a second writer is not detected", folder)
            return RunLock(None)
        if not isinstance(error, BlockingIOError):
            raise
        raise RunLocked(
            f"run folder {folder} is being written by {_holder(path)}: "
            "wait for that run, stop it, or choose another folder"
        ) from None
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())
    return RunLock(descriptor)


def _holder(path: epath.Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (its note in .lock is not readable)"


# --- orderly stops -----------------------------------------------------------------------------


class StopRequest:
    """Catches SIGTERM and SIGINT in the main thread while its ``with`` block runs.

    The first signal sets `requested`, and raises `Interrupted` if the program is, or next comes,
    inside `interruptible`. A second one ends the process at once with status 128 + its number,
    even during a compilation or a device computation, when no Python handler can run.
    Repeats within ``same_request_s`` are one request: ``timeout`` signals both its child and the
    child's process group, a wrapper script may forward what the terminal already sent.

    agree: for several processes, whether any of them was asked to stop; all call it together. No
        process may then leave a block that others are in, so `Interrupted` is only raised on
        entering one, on all of them.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, agree: Callable[[bool], bool] | None = None, *, same_request_s: float = 0.5):
        self.signal: signal.Signals | None = None
        self._agree = agree
        self._same_request_s = same_request_s
        self._is_interruptible = False

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python runs handlers in the main thread, between bytecodes; the bytes of the wake-up
        # descriptor are written by the C handler itself, so the watcher sees signals at once.
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in self.SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.close()
        self._watcher.join()
        self._reader.close()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a stop may abandon: `Interrupted` is raised in it, or on entering it."""
        self._is_interruptible = self._agree is None
        try:
            if self._agree(self.requested) if self._agree else self.requested:
                raise Interrupted(self.signal)
            yield
        finally:
            self._is_interruptible = False

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            return
        self.signal = signal.Signals(number)
        if self._is_interruptible:
            raise Interrupted(self.signal)

    def _watch(self) -> None:
        """Announce the first signal, end the process at the second (see ``__enter__``)."""
        first_s = None
        while byte := self._reader.recv(1):
            if byte[0] not in self.SIGNALS:
                continue
            if first_s is None:
                first_s = time.monotonic()
                name = signal.Signals(byte[0]).name
                _logger.warning("%s: saving, then stopping; again: stop at once, unsaved", name)
            elif time.monotonic() - first_s > self._same_request_s:
                os._exit(128 + byte[0])
