"""Where the models of a run come from: a folder, or a name on the hub at one commit of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aspo_jax import hub, runtime
from aspo_jax.config import Config, Origin
from aspo_jax.run.folder import MODEL_FILES, TEACHER_FILES
from aspo_jax.run.records import recorded_commit

Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def locate(config: Config, run: str | Path | None = None, say: Say = to_stderr) -> Config:
    """The config with the folder of its model, `Config.model_folder`, and all but weights in it.

    ``Model.path`` is a folder if there is one of that name; else a name on the hub, whose commit is
    the one that the run began with, or what the hub says now. Several processes call it together:
    the first one asks and fetches, the others follow it.

    run: folder of a run that may have begun; None: of none.

    Raises:
        HubError, WriteError: see `aspo_jax.hub.fetch_settings`.
        LaunchError: ``Model.path`` is a folder for some of the processes only.
        ModelChanged: what the run wrote of its model is damaged.
    """
    if config.model.path is None or config.origin is not None:
        return config
    record = None if run is None else Path(run) / MODEL_FILES
    origin = _locate("Model.path", config.model.path, record, say)
    return dataclasses.replace(config, origin=origin)


def locate_teacher(config: Config, run: str | Path | None = None, say: Say = to_stderr) -> Config:
    """`locate` for ``Teacher.path``, which a run remembers in the same way."""
    if config.teacher.path is None or config.teacher_origin is not None:
        return config
    record = None if run is None else Path(run) / TEACHER_FILES
    origin = _locate("Teacher.path", config.teacher.path, record, say)
    return dataclasses.replace(config, teacher_origin=origin)


def _locate(setting: str, path: str, record: Path | None, say: Say) -> Origin:
    """Where a model is; record: what a run may have written of it."""
    is_here = Path(path).expanduser().exists()
    runtime.check_same(f"whether {setting} = {path!r} is a folder", str(is_here))
    name = None if is_here else hub.parse_name(path, setting)
    if name is None:
        return Origin(path)
    first = runtime.on_main(lambda: _fetch(name, path, record))
    commit = _of_main(first and first.folder.name)
    if first and first.doubt:
        say(f"{path}: {first.doubt}: commit {commit[:12]} from the cache is used")
    folder = (first or hub.fetch_settings(name, commit)).folder
    return Origin(str(folder), commit)


def fetch_weights(config: Config, say: Say = to_stderr) -> None:
    """Bring the weights of the models that are located into their folders; see `locate`.

    Raises:
        HubError, WriteError: see `aspo_jax.hub.fetch_weights`.
    """
    located = (
        (hub.parse_name(config.model.path or ""), config.origin),
        (hub.parse_name(config.teacher.path or "", "Teacher.path"), config.teacher_origin),
    )
    for name, origin in located:
        if name is not None and origin is not None and origin.commit is not None:
            _fetch_weights(name, origin.commit, Path(origin.folder), say)


def _fetch_weights(name: hub.Name, commit: str, folder: Path, say: Say) -> None:
    def fetch() -> None:
        if missing := hub.missing_weights(folder):
            say(f"fetching {len(missing)} file(s) of weights: {name.repo}, commit {commit[:12]}")
            hub.fetch_weights(name, commit, folder)

    runtime.on_main(fetch)
    fetch()


def _fetch(name: hub.Name, path: str, record: Path | None) -> hub.Fetched:
    """The settings at the commit that a run began with; for a new one at what the name means."""
    kept = None if record is None else recorded_commit(record, path)
    return hub.fetch_settings(name, kept or name.revision)


def _of_main(commit: str | None) -> str:
    """Process 0's commit, on all of them."""
    words = np.frombuffer(bytes.fromhex(commit or "0" * 40), np.uint32)
    return runtime.everyone(words)[0].tobytes().hex()
