"""What a run leaves in its folder beside metrics and checkpoints: see `aspo_jax.run.folder`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aspo_jax import runtime
from aspo_jax.config import Config, ConfigError, Origin, command, parse_config
from aspo_jax.config.factories import Factories
from aspo_jax.config.gin import LAUNCH
from aspo_jax.config.sections import section_of
from aspo_jax.errors import UserError, WriteError, refusal
from aspo_jax.files import Damaged, digests, read_sealed, sealed_text, write_text_atomic
from aspo_jax.hub import SETTINGS
from aspo_jax.model.hf import weight_files
from aspo_jax.run.checkpoint import MANIFEST, CheckpointError, Checkpoints
from aspo_jax.run.folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    MODEL_FILES,
    TEACHER_FILES,
    RunLock,
    lock_run,
)

_READ_AT_START = (".safetensors", ".json", ".jinja", ".txt")  # weights, settings, tokenizer
_READ_FROM = {
    MODEL_FILES: "The reference policy and the tokenizer are",
    TEACHER_FILES: "The teacher is",
}


Scores = dict[str, float]


class NoRun(UserError):
    """A path that is no run's."""


class ModelChanged(UserError):
    """The model that a run started from is not what it was."""


def lock_folder(config: Config) -> RunLock:
    """See `aspo_jax.run.folder.lock_run`; process 0 holds the lock for all."""
    return runtime.on_main(lambda: lock_run(config.run_folder)) or RunLock()


def check_config(config: Config) -> Path:
    """The run folder, which may be continued under this config.

    Raises:
        ConfigError: the folder holds checkpoints or a trained model of another config; the message
            is the difference. Before there are any, the config may change.
        LaunchError: the processes were started with different configs.
    """
    lines = config.text().splitlines()
    runtime.check_same("the config", "\n".join(x for x in lines if not x.startswith(LAUNCH)))
    runtime.on_main(lambda: _check_config(config))
    return Path(config.run_folder)


def _check_config(config: Config) -> None:
    folder = Path(config.run_folder)
    path = folder / CONFIG
    if config.run.accept_changes or not path.exists() or not has_results(folder):
        return
    try:
        changes = config.diff(_config_text(folder))
    except ConfigError as error:
        raise ConfigError(
            f"{path} is not the config that the run wrote ({error}); put back a copy, or continue "
            "under the config of this command with --set Run.accept_changes=True"
        ) from error
    if changes:
        raise ConfigError(
            f"{folder} holds a run with another config:\n{changes}\n"
            "choose another Run.folder, or continue it under the new config with "
            "--set Run.accept_changes=True"
        )


def _config_text(folder: Path) -> str:
    try:
        return (folder / CONFIG).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{folder / CONFIG}: not UTF-8 ({error}); put back a copy") from error


def run_config(folder: Path, factories: Factories) -> Config:
    """The config of a run; a ConfigError if it cannot be read."""
    return parse_config(_config_text(folder), factories, str(folder / CONFIG))


def has_results(folder: Path) -> bool:
    """Whether a run folder holds what another config must not continue or replace."""
    is_done = any((folder / name).exists() for name in (MODEL, ADAPTER))
    return is_done or any(folder.glob(f"{CHECKPOINTS}/*/{MANIFEST}"))


def claim_folder(config: Config, model_folder: str | Path) -> None:
    """Write what the run is into its folder: its config, and the files of the models it rests on.

    Called when all is built and restored: a start that fails before claims nothing.

    Raises:
        ModelChanged: the folder holds results that began from other files.
    """
    folder = Path(config.run_folder)
    models = [_ModelFiles(folder / MODEL_FILES, config.model.path, model_folder, config.origin)]
    if config.teacher_folder is not None:
        path, place = folder / TEACHER_FILES, config.teacher_folder
        models.append(_ModelFiles(path, config.teacher.path, place, config.teacher_origin))

    def claim() -> None:
        found = [files.digests() for files in models]
        if has_results(folder) and not config.run.accept_changes:
            for files, now in zip(models, found, strict=True):
                _check_model_files(files.record, files.source, now)
        for files, now in zip(models, found, strict=True):
            write_text_atomic(files.record, sealed_text({"files": now, **files.named}))
        write_text_atomic(folder / CONFIG, config.text())

    runtime.on_main(claim)


class _ModelFiles(NamedTuple):
    """A model that a run rests on.

    record: the file that remembers it. path: the setting. folder: what the setting means.
    """

    record: Path
    path: str | None
    folder: str | Path
    origin: Origin | None

    @property
    def source(self) -> Path:
        return Path(self.folder).expanduser()

    @property
    def named(self) -> dict[str, str]:
        """Its name and commit on the hub; nothing of a folder of one's own."""
        commit = self.origin and self.origin.commit
        return {"model": str(self.path), "commit": commit} if commit else {}

    def digests(self) -> Mapping[str, Any]:
        """Of the files that are read at the start."""
        # Of the hub's cache our own files alone: other programs put more beside them.
        ours = {*SETTINGS, *weight_files(self.source)} if self.named else None
        return digests(self.source, lambda x: x in ours if ours else _is_read_at_start(x))


def recorded_commit(record: Path, model: str) -> str | None:
    """The commit on the hub that a run with results began with, if it began with this model.

    record: file of the run's folder that remembers it.

    Raises:
        ModelChanged: what the run wrote of it is damaged.
    """
    known = record.exists() and has_results(record.parent)
    written = _read_model_record(record, model) if known else {}
    return written.get("commit") if written.get("model") == model else None


def _is_read_at_start(name: str) -> bool:
    return "/" not in name and name.endswith(_READ_AT_START)


def _read_model_record(path: Path, model: str | Path) -> dict[str, Any]:
    try:
        record = read_sealed(path)
        return record | {"files": record["files"]}
    except (Damaged, KeyError) as error:
        raise ModelChanged(
            f"{path} is not what the run wrote ({error}); if {model} is unchanged since the run "
            "began, delete the file"
        ) from None


def _check_model_files(path: Path, model_folder: Path, found: Mapping[str, Any]) -> None:
    if not path.exists():
        return
    expected = _read_model_record(path, model_folder)["files"]
    if changed := [x for x in sorted({*expected, *found}) if expected.get(x) != found.get(x)]:
        raise ModelChanged(
            f"{model_folder} is not what this run started from: {', '.join(changed)} changed, came "
            f"or went since. {_READ_FROM[path.name]} read from there; put back the files as they "
            "were, or go on with these under --set Run.accept_changes=True"
        )


def check_base(run: Path, config: Config, folder: Path) -> None:
    """The model in a folder is the one that a run's adapters were trained beside.

    Raises:
        ModelChanged: it is not.
    """
    record = run / MODEL_FILES
    if not config.run.accept_changes:
        base = _ModelFiles(record, config.model.path, folder, config.origin)
        _check_model_files(record, base.source, base.digests())


class Saved(NamedTuple):
    """A run folder, and one of its steps; None: the newest."""

    run: Path
    step: int | None


def find_run(path: Path) -> Saved:
    """The run, and the step, that a person names by its folder.

    Raises:
        NoRun: neither a run folder, nor its checkpoints, nor one of them.
    """
    whole = path.expanduser().resolve()
    may_be = [Saved(whole, None)]
    if whole.name == CHECKPOINTS:
        may_be.append(Saved(whole.parent, None))
    if whole.name.isdecimal() and whole.parent.name == CHECKPOINTS:
        may_be.append(Saved(whole.parent.parent, int(whole.name)))
    for saved in may_be:
        if (saved.run / CONFIG).is_file():
            return saved
    raise NoRun(
        f"{path}: not a run; expected a run folder (with {CONFIG}), its {CHECKPOINTS} folder, "
        "or the folder of one step in there"
    )


def trained_weights(saved: Saved, config: Config, wanted: Any) -> tuple[int, Any]:
    """The step and its trained weights of a run; see `Checkpoints.restore_params`.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    place = saved.run / CHECKPOINTS
    with Checkpoints(place, config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore_params(wanted, saved.step)
    if restored is None:
        raise CheckpointError(
            f"{place}: no complete checkpoint; the run saves every {config.checkpoint.every} "
            "iterations (Checkpoint.every) and when it is stopped"
        )
    return restored


@contextlib.contextmanager
def keeping(checkpoints: Checkpoints) -> Iterator[None]:
    """Add to what could not be written where the same command goes on."""
    try:
        yield
    except (WriteError, OSError) as error:
        message = str(error) if isinstance(error, WriteError) else refusal(error)
        if message is None:
            raise
        raise WriteError(f"{message}; {checkpoints.newest()}") from error


def before_and_after(rows: Sequence[Mapping[str, Any]]) -> tuple[Scores, Scores]:
    """The held-out figures of the first and of the last evaluation; nothing where one is lost."""
    scores = {
        row["iteration"]: {k: v for k, v in row.items() if k.startswith("evaluate/")}
        for row in rows
        if "evaluate/samples" in row
    }
    return scores.get(0, {}), scores.get(max(scores, default=0), {})


def next_command(config: Config) -> str:
    """What to try next: the run's rival, or a picture of both once the rival's folder is there."""
    rival = "aspo" if config.objective.name == "dapo" else "dapo"
    folders = _rival_folders(config, rival)
    for folder in folders:
        if (Path(folder) / METRICS).is_file():
            return command("plot", config.run_folder, folder)
    if config.teacher.path is not None:
        return command("plot", config.run_folder)  # of a teacher the rival knows nothing
    settings = [f"Objective.name={rival}"]
    if config.run.folder is not None:
        # A plain word is text for --set, unless it could be another literal.
        is_plain = re.fullmatch(r"[A-Za-z_~./][\w.~/-]*", folders[0])
        settings.append(f"Run.folder={folders[0] if is_plain else repr(folders[0])}")
    own = f"{section_of(config.objective.name)}." if ":" in config.objective.name else ""
    return config.command("train", *settings, without=own)


def _rival_folders(config: Config, rival: str) -> list[str]:
    """Where the same run with the rival's rule would be; the first is where to put it."""
    objective = dataclasses.replace(config.objective, name=rival)
    if config.run.folder is None:
        return [dataclasses.replace(config, objective=objective).run_folder]
    own = str(Path(config.run.folder))
    stem = own.removesuffix(f"-{config.objective.name}")
    return [f"{stem}-{rival}", *([stem] if stem != own else [])]
