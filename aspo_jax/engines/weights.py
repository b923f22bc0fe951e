"""Weights for engines: a new complete folder per version, and how to see that one was taken.

A reload that answered "success" has been known to keep old tensors, all or some, or to read stale
bytes from a path that was written over. So no folder is ever changed once it has its name, and
after each reload the engine scores a fixed text, the probe: its answer must be near what we compute
from the new weights, and must have moved from its answer before as ours has.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.errors import writing
from aspo_jax.files import fsync

HEAD_FILE, INDEX_FILE = "lm_head.safetensors", "model.safetensors.index.json"
KEPT = 2  # versions: the current one, for a restart, and the one before
_MEMORY = Path("/dev/shm")
_LEAST_MOVE = 1e-5  # nats: below it a probe's change is the rounding of float32
_MARGIN = 10.0  # times the noise of the last version that a correct reload may differ by


class Version(NamedTuple):
    """Weights of one policy as engines read them.

    label: tells them from all others. probe_T: our log-probabilities of the probe, temperature 1.
    is_new: whether any weight is another than in the version before, as written.
    """

    label: str
    folder: Path
    probe_T: np.ndarray
    is_new: bool


class Publisher:
    """Writes versions below a folder of its own, which is removed at `close`.

    save: (params, folder) -> a complete Hugging Face folder. score: params -> what we say of the
    probe.
    """

    def __init__(
        self,
        folder: Path,
        save: Callable[[Any, Path], None],
        score: Callable[[Any], np.ndarray],
    ):
        self._folder, self._save, self._score = folder, save, score
        self._run, self._count = secrets.token_hex(4), 0

    def publish(self, params: Any, in_use: Collection[Path] = ()) -> Version:
        """Write the next version and remove the last but one.

        in_use: folders of which only the weights are removed: an engine was started on them.

        Raises:
            WriteError: there is no room.
        """
        if self._count == 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        self._count += 1
        self._remove(self._at(self._count - KEPT), in_use)
        target = self._at(self._count)
        partial = target.with_name(target.name + ".tmp")
        with writing(target):
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._save(params, partial)
            for path in (*partial.iterdir(), partial):
                fsync(path)
            partial.rename(target)
            fsync(target.parent)
        before = self._at(self._count - 1)
        label = f"{self._run}-{self._count}"
        return Version(label, target, self._score(params), not _same_weights(before, target))

    def _at(self, number: int) -> Path:
        return self._folder / f"v{number}"

    def _remove(self, folder: Path, in_use: Collection[Path]) -> None:
        if folder not in in_use:
            shutil.rmtree(folder, ignore_errors=True)
        for path in folder.glob("*.safetensors"):
            path.unlink()

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)


def default_folder() -> Path:
    """The memory file system, where there is one; else the folder for temporary files."""
    is_there = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return _MEMORY if is_there else Path(tempfile.gettempdir())


def folder_of_run(parent: Path, run: Path) -> Path:
    """Where a run's weights go: not where those of another go."""
    name = hashlib.sha256(os.fsencode(run.absolute())).hexdigest()[:12]
    return parent / f"aspo_jax-{os.getuid()}-{name}"


def _same_weights(one: Path, other: Path) -> bool:
    names = [sorted(path.name for path in f.glob("*.safetensors")) for f in (one, other)]
    if names[0] != names[1]:
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_head(folder: Path) -> None:
    """Write a tied embedding once more as what it is tied to, in a file of its own.

    vLLM on a CPU computes the head from a packed copy, which a reload makes anew only if the folder
    names the head. Whoever ties the two ignores it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(length)).get(EMBEDDING)
            if entry is None:
                continue
            first, end = entry["data_offsets"]
            file.seek(8 + length + first)
            header = {HEAD: entry | {"data_offsets": [0, end - first]}}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (folder / HEAD_FILE).open("wb") as head:
                head.write(struct.pack("<Q", len(text)) + text)
                for size in _portions(end - first):
                    head.write(file.read(size))
            break
    if (index := folder / INDEX_FILE).exists():
        raw = json.loads(index.read_text())
        raw["weight_map"][HEAD] = HEAD_FILE
        index.write_text(json.dumps(raw))


def _portions(size: int, most: int = 1 << 24) -> Iterator[int]:
    """Sizes of at most 16 MiB that add up."""
    while size > 0:
        yield min(size, most)
        size -= most


def probe_problem(
    heard_T: np.ndarray,
    version: Version,
    before_T: np.ndarray | None,
    before: Version | None,
    max_gap: float,
) -> str | None:
    """Why an engine cannot have the weights of a version; None: it may be believed.

    heard_T, before_T: what it says of the probe now, and what it said when it had those of the
        version before. None: it was not asked then.
    max_gap: largest mean difference from ours, nats.
    """
    gap = float(np.abs(heard_T - version.probe_T).mean())
    if not gap <= max_gap:
        return (
            f"its log-probabilities of the probe are {gap:.3g} nats from ours on average, expected "
            f"at most Sampler.max_gap = {max_gap}"
        )
    if before is None or before_T is None or not version.is_new:
        return None
    ours_T, theirs_T = version.probe_T - before.probe_T, heard_T - before_T
    moved, left = float(np.abs(ours_T).mean()), float(np.abs(ours_T - theirs_T).mean())
    noise = float(np.abs(before_T - before.probe_T).mean())  # what the kernels differ by
    # Below the noise only an answer without any change tells.
    is_still = moved > _LEAST_MOVE and not np.any(theirs_T)
    if left <= _MARGIN * noise + _LEAST_MOVE and not is_still:
        return None
    return (
        f"its log-probabilities of the probe moved otherwise than ours, by {left:.2g} nats on "
        f"average where the new weights move them by {moved:.2g} and the kernels differ by "
        f"{noise:.2g}: it still has old weights, all or a part of them"
    )
