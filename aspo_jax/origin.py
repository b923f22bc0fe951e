"""Where the model of a run comes from: a folder, or a name on the hub at one commit of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aspo_jax import hub, runtime
from aspo_jax.config import Config, Origin
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
    path = config.model.path
    if path is None or config.origin is not None:
        return config
    is_here = Path(path).expanduser().exists()
    runtime.check_same(f"whether Model.path = {path!r} is a folder", str(is_here))
    name = None if is_here else hub.parse_name(path)
    if name is None:
        return dataclasses.replace(config, origin=Origin(path))
    first = runtime.on_main(lambda: _fetch(name, path, run))
    commit = _of_main(first and first.folder.name)
    if first and first.doubt:
        say(f"{path}: {first.doubt}: commit {commit[:12]} from the cache is used")
    folder = (first or hub.fetch_settings(name, commit)).folder
    return dataclasses.replace(config, origin=Origin(str(folder), commit))


def fetch_weights(config: Config, say: Say = to_stderr) -> None:
    """Bring the weights of a located model into its folder; see `locate`.

    Raises:
        HubError, WriteError: see `aspo_jax.hub.fetch_weights`.
    """
    origin, name = config.origin, hub.parse_name(config.model.path or "")
    if origin is None or origin.commit is None or name is None:
        return
    folder, commit = Path(origin.folder), origin.commit

    def fetch() -> None:
        if missing := hub.missing_weights(folder):
            say(f"fetching {len(missing)} file(s) of weights: {name.repo}, commit {commit[:12]}")
            hub.fetch_weights(name, commit, folder)

    runtime.on_main(fetch)
    fetch()


def _fetch(name: hub.Name, path: str, run: str | Path | None) -> hub.Fetched:
    """The settings at the commit that a run began with; for a new one at what the name means."""
    kept = None if run is None else recorded_commit(Path(run), path)
    return hub.fetch_settings(name, kept or name.revision)


def _of_main(commit: str | None) -> str:
    """Process 0's commit, on all of them."""
    words = np.frombuffer(bytes.fromhex(commit or "0" * 40), np.uint32)
    return runtime.everyone(words)[0].tobytes().hex()
