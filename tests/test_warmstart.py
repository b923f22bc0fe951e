"""The warm-started model: what is whole is used, what is not is made anew or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aspo_jax import warmstart
from aspo_jax.config import Config, read_config
from aspo_jax.parts import FACTORIES
from aspo_jax.run.console import Console
from aspo_jax.warmstart import INITIAL_MODEL, SEAL, WarmStartError, cache_key, warm_start

WEIGHTS = "model.safetensors"


@pytest.fixture
def trained(monkeypatch) -> list[Path]:
    """The folders that were trained into; training itself is not what is tested here."""
    folders: list[Path] = []

    def train(config, mesh, folder: Path, console) -> None:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
        folders.append(folder)

    monkeypatch.setattr(warmstart, "_train", train)
    return folders


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    return (f"WarmStart.cache='{tmp_path / 'cache'}'",)


def read(*settings: str) -> Config:
    return read_config([x for s in settings for x in ("--set", s)], FACTORIES)


def start(tmp_path: Path, name: str, *settings: str) -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    model = warm_start(read(*settings), None, folder, Console())  # pyright: ignore
    assert model == folder / INITIAL_MODEL
    assert (model / WEIGHTS).read_bytes() == b"weights"
    return model


def test_trained_once_for_all_runs_with_these_settings(tmp_path, settings, trained, capsys):
    start(tmp_path, "a", *settings)
    start(tmp_path, "a", *settings)
    assert len(trained) == 1
    start(tmp_path, "b", *settings)
    assert len(trained) == 1 and "warm start: found in" in capsys.readouterr().out
    start(tmp_path, "c", *settings, "WarmStart.target=0.2")
    assert len(trained) == 2
    cache = tmp_path / "cache"
    assert len(list(cache.iterdir())) == 2 and (cache / cache_key(read(*settings)) / SEAL).exists()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def half_written(folder: Path) -> None:
    (folder / SEAL).unlink()


def flipped(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weighus")


def of_other_settings(folder: Path) -> None:
    body = json.loads((folder / SEAL).read_text())["manifest"]
    (folder / SEAL).write_text(warmstart.sealed_text(body | {"key": "other"}))


def nested(folder: Path) -> None:
    (folder / SEAL).write_text("[" * 100_000)


DAMAGES = [empty, half_written, flipped, of_other_settings, nested]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_entry_is_made_anew(tmp_path, settings, trained, damage, capsys):
    start(tmp_path, "a", *settings)
    damage(tmp_path / "cache" / cache_key(read(*settings)))
    start(tmp_path, "b", *settings)
    assert len(trained) == 2 and "is not used but made anew: " in capsys.readouterr().out
    start(tmp_path, "c", *settings)
    assert len(trained) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_own_model_is_made_anew_until_checkpoints_rest_on_it(
    tmp_path, settings, trained, damage, capsys
):
    damage(start(tmp_path, "a", *settings))
    own = start(tmp_path, "a", *settings)  # from the cache
    assert len(trained) == 1 and f"{own} is made anew: " in capsys.readouterr().out
    (tmp_path / "a" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "2" / "manifest.json").touch()
    damage(own)
    if damage is of_other_settings:  # Run.accept_changes: the run keeps what it began from
        start(tmp_path, "a", *settings)
        return
    with pytest.raises(WarmStartError, match=rf"{own}: .*Delete that folder: the same command"):
        start(tmp_path, "a", *settings)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, settings, trained, capsys):
    (tmp_path / "cache").touch()
    start(tmp_path, "a", *settings)
    assert "warm start: not kept for other runs: " in capsys.readouterr().out
