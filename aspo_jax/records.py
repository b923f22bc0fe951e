"""What a run leaves in its folder beside metrics and checkpoints.

config.gin          the resolved config; a later start with another one is refused
metrics.jsonl       one line per iteration            tensorboard/  the same as events
checkpoints/        everything a bitwise resume needs
initial_model/      the warm-started model            model/        the trained one
transcripts/        prompts, answers and verdicts of each iteration and each evaluation
dynamics.png        the pictures
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo_jax import runtime
from aspo_jax.checkpoint import RunLock, lock_run, write_text_atomic
from aspo_jax.config import Config, ConfigError, command
from aspo_jax.config.gin import LAUNCH
from aspo_jax.metrics import read_metrics

CONFIG = "config.gin"
METRICS = "metrics.jsonl"


class Silent:
    """The log of a process that does not write: `aspo_jax.metrics.Log` without its effects."""

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def end_row(self) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def lock_folder(config: Config) -> RunLock:
    """See `aspo_jax.checkpoint.lock_run`; process 0 holds the lock for all."""
    return runtime.on_main(lambda: lock_run(config.run_folder)) or RunLock(None)


def claim_folder(config: Config) -> Path:
    """The run folder with its config written into it.

    Raises:
        ConfigError: the folder holds a run of another config; the message is the difference.
        LaunchError: the processes were started with different configs.
    """
    lines = config.text().splitlines()
    runtime.check_same("the config", "\n".join(x for x in lines if not x.startswith(LAUNCH)))
    runtime.on_main(lambda: _write_config(config))
    return Path(config.run_folder)


def _write_config(config: Config) -> None:
    folder = Path(config.run_folder)
    path = folder / CONFIG
    if path.exists() and not config.run.accept_changes:
        changes = config.diff(path.read_text())
        if changes:
            raise ConfigError(
                f"{folder} holds a run with another config:\n{changes}\n"
                "choose another Run.folder, or continue it under the new config with "
                "--set Run.accept_changes=True"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, config.text())


def write_transcripts(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Some answers as JSON lines."""
    path.parent.mkdir(exist_ok=True)
    write_text_atomic(path, "".join(json.dumps(sample) + "\n" for sample in samples))


def before_and_after(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out figures of the first and of the last evaluation."""
    rows = [
        {name: value for name, value in row.items() if name.startswith("evaluate/")}
        for row in read_metrics(folder / METRICS)
        if "evaluate/avg" in row
    ]
    return rows[0], rows[-1]


def without_signal(folder: Path) -> int:
    """How many iterations had no group to learn from."""
    return sum(row.get("rollout/valid_groups") == 0 for row in read_metrics(folder / METRICS))


def next_command(config: Config) -> str:
    """What to try next: the run's rival, or a picture of both once the rival's folder is there."""
    rival = "aspo" if config.objective.name == "dapo" else "dapo"
    folders = _rival_folders(config, rival)
    for folder in folders:
        if (Path(folder) / METRICS).is_file():
            return command("plot", config.run_folder, folder)
    settings = [f"Objective.name={rival}"]
    if config.run.folder is not None:
        # A plain word is text for --set, unless it could be another literal.
        is_plain = re.fullmatch(r"[\w.~-]*/[\w.~/-]*", folders[0])
        settings.append(f"Run.folder={folders[0] if is_plain else repr(folders[0])}")
    return config.command("train", *settings)


def _rival_folders(config: Config, rival: str) -> list[str]:
    """Where the same run with the rival's rule would be; the first is where to put it."""
    objective = dataclasses.replace(config.objective, name=rival)
    if config.run.folder is None:
        return [dataclasses.replace(config, objective=objective).run_folder]
    own = str(Path(config.run.folder))
    stem = own.removesuffix(f"-{config.objective.name}")
    return [f"{stem}-{rival}", *([stem] if stem != own else [])]
