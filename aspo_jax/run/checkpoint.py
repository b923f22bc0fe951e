"""Checkpoints that are verified before they are used.

A step is *complete* once its manifest exists. Saving step 20 goes

    Orbax writes 20.orbax-checkpoint-tmp/ and renames it to 20/       (Orbax's commit)
    every file of 20/ is flushed to disk and digested (sha256)         (background thread)
    20/manifest.json appears by a rename                               (our commit, written last)
    steps that are no longer kept lose their manifest, then the rest   (pruning)

so a process killed at any moment leaves complete steps, or folders without a manifest, which are
skipped. Orbax's own commit is not trusted at restore: its array files carry no checksum, and a step
that was being deleted is still listed by it.

    with Checkpoints(path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract_state)       # None: nothing to continue
        checkpoints.remove_leftovers()
        ...
        checkpoints.save(step, state, meta)

With several processes the folder is shared, and all of them save and restore together.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from aspo_jax.allocator import return_small_blocks
from aspo_jax.errors import UserError, describe
from aspo_jax.files import (
    Damaged,
    absolute,
    check_digests,
    digests,
    fsync,
    is_local,
    read_sealed,
    sealed_text,
    walk,
    write_text_atomic,
)
from aspo_jax.model.sharding import is_on_host

MANIFEST = "manifest.json"

_FORMAT = 1
_NONE_COMPLETE, _ALL_DAMAGED = -1, -2

_logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint could not be written, or none of those present can be used."""


# --- the manifest ------------------------------------------------------------------------------


class _Unsealed(Damaged):
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


def _seal(step: epath.Path, leaves: dict[str, str]) -> None:
    """Flush and digest the files of a step that Orbax committed, then write its manifest."""
    if is_local(step):
        for path in (*walk(step), step, step.parent):
            fsync(path)
    body = {"format": _FORMAT, "step": int(step.name), "leaves": leaves, "files": digests(step)}
    write_text_atomic(step / MANIFEST, sealed_text(body))


def _read_manifest(step: epath.Path) -> dict[str, Any]:
    """The manifest of a step; raises Damaged when it is absent, damaged or another step's."""
    try:
        body = read_sealed(step / MANIFEST)
    except FileNotFoundError:
        raise _Unsealed(f"{MANIFEST} is missing: the step was never completed") from None
    if body.get("format") != _FORMAT:
        raise Damaged(f"{MANIFEST} has format {body.get('format')}, this program reads {_FORMAT}")
    if not isinstance(body.get("leaves"), dict):
        raise Damaged(f"{MANIFEST} lacks the types of leaves")
    if body.get("step") != int(step.name):
        raise Damaged(f"{MANIFEST} is that of step {body.get('step')}: the folder was renamed")
    return body


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
    guard: called before anything is written; what it raises ends the save.

    With several processes every process calls every method at the same point. The folder is shared
    (Orbax requires that), so process 0 alone digests, verifies and prunes: one reader is the
    simplest thing that is correct, at the price of its reading each checkpoint once more. The
    others learn its verdict by a broadcast.
    """

    def __init__(self, folder: epath.PathLike, keep: int, guard: Callable[[], None] = lambda: None):
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1 checkpoint to keep")
        # Orbax narrates each save, and logs the traceback of what it then raises to us too.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._folder = absolute(folder)
        self._keep = keep
        self._guard = guard if jax.process_index() == 0 else lambda: None
        self._complete: set[int] = set()
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._reads_host = False  # the state's own arrays
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            _logger.debug("while another error was on its way: %s", error)  # which is the reason

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
        self._reads_host = any(map(is_on_host, jax.tree.leaves(state)))
        path = self._path(step)
        if _broadcast(int(jax.process_index() == 0 and self._problem(step) is None)):
            return
        self._guard()
        with self._saving(path):
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._remove_temporary()
                self._remove(step)
            items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
            orbax = self._opened(state)
            orbax.save(path, args=ocp.args.Composite(**items))
        self._pending = self._background.submit(self._finish, orbax, path, leaves)

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
        step = self.newest_step()
        if step is None:
            return None
        path = self._path(step)
        _check_leaves(path, _read_manifest(path)["leaves"], _describe(abstract_state))
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, abstract_state)),
            meta=ocp.args.JsonRestore(),
        )
        with _named(path):
            restored = self._opened(abstract_state).restore(path, args=items)
        return_small_blocks()
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
            step = self.newest_step()
        elif problem := self._problem(step):
            raise CheckpointError(f"checkpoint {self._path(step)} cannot be used: {problem}")
        if step is None:
            return None
        path = self._path(step)
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

    def newest_step(self) -> int | None:
        """The newest step that verifies; None if none was ever completed.

        Raises:
          CheckpointError: there are some, and all are damaged.
        """
        self.wait()
        step = _broadcast(self._newest_good() if jax.process_index() == 0 else _NONE_COMPLETE)
        if step == _ALL_DAMAGED:
            problems = [f"step {step}: {self._problem(step)}" for step in self._steps()]
            raise CheckpointError(
                "\n  ".join([f"no checkpoint in {self._folder} can be used:", *problems])
                + "\nPut back an intact copy, or start again in a new folder."
            )
        return None if step == _NONE_COMPLETE else step

    def remove_leftovers(self) -> None:
        """Remove what a kill left of steps that were never completed or were being deleted.

        For the run that owns the folder alone: a reader would remove what the run is writing.
        """
        self.wait()
        if jax.process_index() != 0 or not self._folder.exists():
            return
        with _named(self._folder):
            self._remove_temporary()
            for step in self._steps():
                if not self._is_sealed(step):
                    self._remove(step)

    def newest(self) -> str:
        """Where the same command would go on, as a sentence; nothing is verified for it."""
        sealed = [step for step in self._steps() if self._is_sealed(step)]
        if not sealed:
            return "no checkpoint is complete yet, the same command begins anew"
        return f"the newest complete checkpoint is step {sealed[0]}, the same command goes on there"

    def wait(self) -> None:
        """Wait until the last save is complete; raises a CheckpointError if it failed."""
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])
        pending, self._pending = self._pending, None
        pending.result()

    def let_go(self) -> None:
        """Return once no save reads the arrays of a state: then an update can be in place.

        A save reads arrays in the host's memory until it is complete; an accelerator's it copied
        first.
        """
        if self._reads_host or jax.default_backend() == "cpu":
            self.wait()

    def close(self) -> None:
        """Wait for the last save, then release Orbax and the thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._orbax is not None:
                with self._saving(self._folder):
                    self._orbax.close()
            sys.unraisablehook = self._old_hook

    def _opened(self, state: Any) -> ocp.AsyncCheckpointer:
        """Orbax, for states like this one."""
        if self._orbax is None:
            largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
            # What is being written is copied: a second state, if nothing bounds it. The bound has
            # to be above the largest array.
            arrays = ocp.StandardCheckpointHandler(save_concurrent_gb=1 + math.ceil(largest / 1e9))
            # Not Orbax's CheckpointManager: it keeps its own list of steps, which deleting and
            # replacing steps by the manifest's rules would contradict. The layout is the same.
            self._orbax = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(state=arrays, meta=ocp.JsonCheckpointHandler())
            )
        return self._orbax

    def _on_unraisable(self, unraisable: Any) -> None:
        """Say nothing of what a failed save leaves behind: tensorstore's other writes end after
        Orbax has closed their event loop, and each would print a traceback of that."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._old_hook(unraisable)

    def _finish(self, orbax: Any, path: epath.Path, leaves: dict[str, str]) -> None:
        """The background half of a save."""
        with self._saving(path):
            orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            self._guard()
            _seal(path, leaves)
            self._complete.add(int(path.name))
            self._prune(int(path.name))
        return_small_blocks()

    @contextlib.contextmanager
    def _saving(self, path: epath.Path) -> Iterator[None]:
        """Turn any error into a CheckpointError that says what is left, or into the guard's."""
        try:
            yield
        except Exception as error:
            self._guard()  # where it is gone that is the reason, whatever the error says
            what = describe(error, path) or f"{path}: {type(error).__name__}: {error}"
            raise CheckpointError(f"checkpoint {what}; {self.newest()}") from error

    def _path(self, step: int) -> epath.Path:
        return self._folder / str(step)

    def _steps(self) -> list[int]:
        """Numbers of all step folders, complete or not, newest first."""
        if not self._folder.exists():
            return []
        names = (path.name for path in self._folder.iterdir())
        numbers = (int(name) for name in names if name.isdecimal() and str(int(name)) == name)
        return sorted(numbers, reverse=True)

    def _is_sealed(self, step: int) -> bool:
        return (self._path(step) / MANIFEST).exists()

    def _problem(self, step: int) -> Damaged | None:
        """What is wrong with a step; nothing if it verifies."""
        path = self._path(step)
        try:
            # A file that the manifest does not list cannot be reached by a restore.
            check_digests(path, _read_manifest(path).get("files"))
        except Damaged as problem:
            return problem
        self._complete.add(step)
        return None

    def _newest_good(self) -> int:
        """The step to restore; warns of each one that is passed over."""
        was_any_complete = False
        for step in self._steps():
            problem = self._problem(step)
            if problem is None:
                return step
            was_any_complete |= not isinstance(problem, _Unsealed)
            _logger.warning("checkpoint %s skipped: %s", self._path(step), problem)
        return _ALL_DAMAGED if was_any_complete else _NONE_COMPLETE

    def _prune(self, newest: int) -> None:
        """Remove all but the ``keep`` newest complete steps, of which ``newest`` is one."""
        kept = {newest}
        for step in self._steps():
            if step in kept:
                continue
            if len(kept) < self._keep and (step in self._complete or self._problem(step) is None):
                kept.add(step)
            else:
                self._remove(step)

    def _remove_temporary(self) -> None:
        for path in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            path.rmtree()

    def _remove(self, step: int) -> None:
        """Delete a step, its manifest first: a half-deleted step does not count as complete."""
        path = self._path(step)
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
