"""What protects a run folder, and from what."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.parts import FACTORIES
from aspo_jax.run.checkpoint import MANIFEST
from aspo_jax.run.records import ModelChanged, check_config, claim_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def config(folder: Path, *settings: str) -> Config:
    given = (f"Run.folder='{folder}'", *settings)
    return read_config([x for s in given for x in ("--set", s)], FACTORIES)


def save(folder: Path) -> None:
    """What a first checkpoint leaves."""
    step = folder / "checkpoints" / "2"
    step.mkdir(parents=True)
    (step / MANIFEST).touch()


def test_a_config_may_change_until_something_rests_on_it(folder, model):
    claim_folder(config(folder), model)
    check_config(config(folder, "Optim.b1=0.8"))
    claim_folder(config(folder, "Optim.b1=0.8"), model)
    save(folder)
    check_config(config(folder, "Optim.b1=0.8"))
    with pytest.raises(ConfigError, match=r"another config:\nOptim.b1: 0.8 -> 0.7\n"):
        check_config(config(folder, "Optim.b1=0.7"))
    check_config(config(folder, "Optim.b1=0.7", "Run.accept_changes=True"))
    with pytest.raises(ConfigError, match="another config"):  # a check alone writes nothing
        check_config(config(folder, "Optim.b1=0.7"))


@pytest.mark.parametrize("text", [b"\xff\xfe\0", b"Run.seed = (1,\n", b"\0" * 50])
def test_a_damaged_config_is_named_by_its_path(folder, model, text):
    claim_folder(config(folder), model)
    save(folder)
    (folder / "config.gin").write_bytes(text)
    with pytest.raises(ConfigError, match=f"{folder}/config.gin is not the config that the run"):
        check_config(config(folder))
    check_config(config(folder, "Run.accept_changes=True"))


def flip(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"weighus")


def add(model: Path) -> None:
    (model / "chat_template.jinja").touch()


def remove(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "name"),
    [(flip, "model.safetensors"), (add, "chat_template.jinja"), (remove, "config.json")],
)
def test_the_model_that_a_run_started_from_must_not_change(folder, model, change, name):
    claim_folder(config(folder), model)
    save(folder)
    claim_folder(config(folder), model)
    (model / "README.md").touch()
    claim_folder(config(folder), model)
    change(model)
    with pytest.raises(ModelChanged, match=f"{model} is not what this run started from: {name} "):
        claim_folder(config(folder), model)
    claim_folder(config(folder, "Run.accept_changes=True"), model)
    claim_folder(config(folder), model)


def test_so_must_its_teacher(folder, model, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(model, teacher)
    taught = config(folder, f"Teacher.path='{teacher}'")
    claim_folder(taught, model)
    save(folder)
    claim_folder(taught, model)
    flip(teacher)
    with pytest.raises(ModelChanged, match=f"{teacher} is not .* The teacher is read from there"):
        claim_folder(taught, model)
    assert not (folder / "model").exists()
    claim_folder(config(folder, f"Teacher.path='{teacher}'", "Run.accept_changes=True"), model)
    claim_folder(taught, model)


def test_a_damaged_list_of_the_models_files_is_named(folder, model):
    claim_folder(config(folder), model)
    save(folder)
    (folder / "model_files.json").write_text("{}")
    with pytest.raises(ModelChanged, match="model_files.json is not what the run wrote"):
        claim_folder(config(folder), model)
