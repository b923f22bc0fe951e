"""What a finished run advises works as it is printed."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from aspo_jax.config import Config, packaged, read_config
from aspo_jax.parts import FACTORIES
from aspo_jax.run.records import next_command


def _read(command: str, module: str = "train") -> Config:
    python, flag, name, *words = shlex.split(command)
    assert shutil.which(python) and (flag, name) == ("-m", f"aspo_jax.{module}")
    return read_config(words, FACTORIES)


def _with_rule(config: Config, rule: str) -> Config:
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, name=rule))


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """A config of one's own, named by its path from the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs").mkdir()
    countdown = read_config([], FACTORIES)
    Path("my runs/run.gin").write_text(countdown.text())
    return "my runs/run.gin"


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_config_against_its_rival(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(["--config", name], FACTORIES)
    rival = "aspo" if config.objective.name == "dapo" else "dapo"
    assert _read(next_command(config)) == _with_rule(config, rival)


def test_a_config_of_ones_own_keeps_its_path_and_every_setting(own):
    words = ["--config", own, "--set", "Train.iterations=3", "--set", "aspo.cap = 2.0"]
    config = read_config(words, FACTORIES)
    again = _read(next_command(config))
    assert again == _with_rule(config, "dapo") and again.train.iterations == 3
    assert again.run_folder == "runs/run-dapo-seed0"
    assert _read(config.command("check"), "check") == config


@pytest.mark.parametrize("folder", ["runs/a", "/tmp/it's here", "12", "a/b-aspo/"])
def test_a_folder_of_ones_own_is_not_used_twice(folder, own):
    config = read_config(["--config", own, "--set", f"Run.folder={folder!r}"], FACTORIES)
    again = _read(next_command(config))
    stem = folder.removesuffix("/").removesuffix("-aspo")
    assert again.run_folder == f"{stem}-dapo" and next_command(config).count("Run.folder") == 1


def test_a_setting_with_a_text_is_as_a_person_would_type_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = "Model.path='models/smol lm2'"
    config = read_config(["--set", setting], FACTORIES)
    command = next_command(config)
    assert f' --set "{setting}" --set Objective.name=dapo' in command
    assert _read(command) == _with_rule(config, "dapo")


def test_both_are_drawn_once_both_are_there(own):
    aspo = read_config(["--set", "Run.folder='new runs/a'"], FACTORIES)
    dapo = read_config(
        ["--set", "Run.folder='new runs/a-dapo'", "--set", "Objective.name=dapo"], FACTORIES
    )
    for folder in (Path(aspo.run_folder), Path(dapo.run_folder)):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
    for config, words in (
        (aspo, ["new runs/a", "new runs/a-dapo"]),
        (dapo, ["new runs/a-dapo", "new runs/a"]),
    ):
        assert shlex.split(next_command(config))[1:] == ["-m", "aspo_jax.plot", *words]


def test_an_interpreter_that_is_not_python_here_is_named_by_its_path(monkeypatch, tmp_path):
    config = read_config([], FACTORIES)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert config.command("train").startswith(f"{tmp_path}/.venv/bin/python -m")
    monkeypatch.chdir(tmp_path)
    assert config.command("train") == ".venv/bin/python -m aspo_jax.train"
