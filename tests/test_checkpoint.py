"""`aspo_jax.run.checkpoint`: nothing that was saved is lost, nothing that is damaged is used."""

from __future__ import annotations

import logging
import random
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_toy import await_line, bits, meta_at, start, state_at
from etils import epath

from aspo_jax import structs
from aspo_jax.errors import UserError
from aspo_jax.files import read_sealed, sealed_text
from aspo_jax.run import checkpoint
from aspo_jax.run.checkpoint import MANIFEST, CheckpointError, Checkpoints


def save_steps(folder: Path, *steps: int, keep: int = 2) -> None:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), meta_at(step))


def restore(folder: Path) -> checkpoint.Restored | None:
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(state_at(0))


def check(restored: checkpoint.Restored | None, step: int) -> None:
    """The restored step is this one, bit for bit."""
    assert restored is not None
    assert restored.step == step
    assert bits(restored.state) == bits(state_at(step))
    assert restored.meta == meta_at(step)


def steps_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the complete steps 10 and 20; copy before touching."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save_steps(folder, 10, 20)
    return folder


# --- saving and restoring ----------------------------------------------------------------------


def test_comes_back_bit_for_bit(two_steps: Path):
    check(restore(two_steps), 20)


def test_train_state_keeps_its_types(tmp_path: Path):
    opt_state = (jnp.zeros(3),)
    state = structs.TrainState({"w": jnp.ones(3)}, opt_state, (), jnp.int32(4))  # pyright: ignore
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, state, {})
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert restored is not None
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_steps(Path("runs/a"), 1)
    check(restore(tmp_path / "runs/a"), 1)


def test_empty_folder_is_nothing_to_continue(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert restore(tmp_path / "new") is None
    assert not caplog.records


def test_state_may_be_donated_right_after_save(tmp_path: Path):
    spoil = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    w = jnp.arange(500_000, dtype=jnp.float32)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in range(3):
            state = {"w": w + step}
            checkpoints.save(step, state, {})
            spoil(state)
    for step in (2, 1, 0):
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            restored = checkpoints.restore({"w": w})
        assert restored is not None
        assert bits(restored.state) == bits({"w": w + step})
        shutil.rmtree(tmp_path / str(step))


def test_keeps_the_newest_complete_steps(tmp_path: Path):
    save_steps(tmp_path, 1, 2, 3, 10, keep=2)
    assert steps_in(tmp_path) == {"3", "10"}


def test_pruning_counts_complete_steps_only(two_steps: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    (folder / "20" / "meta" / "metadata").write_bytes(b"")
    (folder / "15").mkdir()
    (folder / "20.orbax-checkpoint-tmp").mkdir()
    save_steps(folder, 21, keep=2)
    assert steps_in(folder) == {"10", "21"}


def test_a_step_loses_its_manifest_before_its_files(
    two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(_: epath.Path) -> None:
        raise OSError("stopped here")

    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    monkeypatch.setattr(type(epath.Path(folder)), "rmtree", stopped)
    with pytest.raises(CheckpointError, match="/30: OSError: stopped here"):
        save_steps(folder, 30, keep=2)
    assert not (folder / "10" / MANIFEST).exists()
    check(restore(folder), 30)


def test_saving_a_complete_step_again_changes_nothing(two_steps: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    before = (folder / "20" / MANIFEST).stat().st_mtime_ns
    save_steps(folder, 20)
    assert (folder / "20" / MANIFEST).stat().st_mtime_ns == before


def test_saving_a_damaged_step_again_replaces_it(two_steps: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    (folder / "20" / "meta" / "metadata").write_text("{}")
    save_steps(folder, 20)
    check(restore(folder), 20)


def test_a_failure_in_the_background_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_at(1), meta_at(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_seal", disk_full)
            checkpoints.save(2, state_at(2), meta_at(2))
            with pytest.raises(
                CheckpointError, match=r"/2: No space left .*MiB free.* step 1, the"
            ):
                checkpoints.save(3, state_at(3), meta_at(3))
        check(checkpoints.restore(state_at(0)), 1)
        checkpoints.save(3, state_at(3), meta_at(3))
    assert steps_in(tmp_path) == {"3"}


def test_refuses_what_it_could_not_give_back(tmp_path: Path):
    with pytest.raises(ValueError, match="keep is 0, expected at least 1"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a str, expected an array"):
            checkpoints.save(1, {"a": (jnp.ones(1), "x")}, {})
        with pytest.raises(TypeError, match=r"meta\['b'\] does not survive JSON: \(1, 2\)"):
            checkpoints.save(1, {}, {"b": (1, 2)})
        with pytest.raises(TypeError, match="meta must be plain JSON"):
            checkpoints.save(1, {}, {"b": float("nan")})
    assert steps_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("leaf", "other", "message"),
    [
        ("half", jnp.ones(33), r"\['half'\]: found bfloat16\[33\], expected float32\[33\]"),
        ("w", jnp.ones((64, 1)), r"\['w'\]: found float32\[64, 128\], expected float32\[64, 1\]"),
        ("new", jnp.ones(2), r"\['new'\]: found nothing, expected float32\[2\]"),
    ],
)
def test_another_state_is_refused_by_leaf(two_steps: Path, leaf: str, other, message: str):
    expected = state_at(0)
    expected["params"] |= {leaf: other}
    with (
        Checkpoints(two_steps, keep=2) as checkpoints,
        pytest.raises(CheckpointError, match=rf"(?s)/20 does not fit.*1 leaves.*{message}"),
    ):
        checkpoints.restore(expected)


def test_restores_onto_four_devices(two_steps: Path):
    flags = "--xla_force_host_platform_device_count=4"
    output, errors = start("restore_on_four", two_steps, XLA_FLAGS=flags).communicate(timeout=60)
    assert output == "step 20 devices {4} shard (16, 128) same True\n", errors


# --- damage ------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
def test_no_damaged_file_is_ever_used(
    two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage
):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    files = sorted(path for path in (folder / "20").rglob("*") if path.is_file())
    assert len(files) > 10
    with Checkpoints(folder, keep=2) as checkpoints:
        for path in files:
            intact = path.read_bytes()
            caplog.clear()
            damage(path)
            check(checkpoints.restore(state_at(0)), 10)
            (record,) = caplog.records
            assert record.levelno == logging.WARNING
            name = path.relative_to(folder / "20").as_posix()
            assert f"/20 skipped: {name} " in record.getMessage()
            path.write_bytes(intact)
        check(checkpoints.restore(state_at(0)), 20)


def test_all_damaged_is_an_error_that_lists_every_step(two_steps: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    (folder / "20" / MANIFEST).write_text("{}")
    truncate(folder / "10" / "meta" / "metadata")
    with pytest.raises(CheckpointError) as error:
        restore(folder)
    assert re.search(r"step 20: manifest\.json cannot be read", str(error.value))
    assert re.search(r"step 10: meta/metadata has \d+ bytes, expected \d+", str(error.value))


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": {"meta/metadata": {"bytes": 1}}},
        {"files": [1]},
        {"leaves": None},
        {"step": "20"},
        {"format": 2},
        None,
    ],
)
def test_a_manifest_whose_own_digest_is_right_must_hold_what_ours_do(
    two_steps: Path, tmp_path: Path, change
):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    path = folder / "20" / MANIFEST
    path.write_text(sealed_text(read_sealed(path) | change if change else {}))
    check(restore(folder), 10)


def test_a_deeply_nested_manifest_is_passed_over(two_steps: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    (folder / "20" / MANIFEST).write_text("[" * 100_000)
    check(restore(folder), 10)


def test_what_a_kill_left_is_removed_by_the_owner_and_by_no_reader(two_steps: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    shutil.copytree(two_steps / "20", folder / "15")
    (folder / "15" / MANIFEST).unlink()
    (folder / "25.orbax-checkpoint-tmp").mkdir()
    left = steps_in(folder)
    check(restore(folder), 20)
    assert steps_in(folder) == left
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.remove_leftovers()
    assert steps_in(folder) == {"10", "20"}


def test_a_full_disk_names_the_step_that_is_whole(full_disk: Path):
    w = np.random.RandomState(0).standard_normal(100_000).astype(np.float32)
    with Checkpoints(full_disk / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.asarray(w)}, {})
        checkpoints.wait()
        (full_disk / "filler").write_bytes(b"x" * 400_000)
        message = r"/2: No space left on device \(.* MiB free\); make room there; .*is step 1, the"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(2, {"w": jnp.asarray(w[::-1])}, {})
            checkpoints.wait()
        (full_disk / "filler").unlink()
        restored = checkpoints.restore({"w": w})
        assert restored is not None and restored.step == 1
        checkpoints.save(3, {"w": jnp.asarray(w)}, {})


def test_nothing_is_written_past_the_guard(tmp_path: Path):
    class Gone(UserError):
        pass

    def guard() -> None:
        if is_gone:
            raise Gone("the folder is gone")

    is_gone = False
    with Checkpoints(tmp_path / "new", keep=1, guard=guard) as checkpoints:
        checkpoints.save(1, state_at(1), meta_at(1))
        checkpoints.wait()
        is_gone = True
        with pytest.raises(Gone):
            checkpoints.save(2, state_at(2), meta_at(2))
    assert steps_in(tmp_path / "new") == {"1"}


def test_a_step_under_another_number_is_refused(two_steps: Path, tmp_path: Path):
    shutil.copytree(two_steps / "20", tmp_path / "30")
    with pytest.raises(CheckpointError, match="step 30: manifest.json is that of step 20"):
        restore(tmp_path)


def test_only_unfinished_steps_is_nothing_to_continue(
    two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(two_steps / "20", tmp_path / "20")
    (tmp_path / "20" / MANIFEST).unlink()
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    assert restore(tmp_path) is None
    assert "/20 skipped: manifest.json is missing" in caplog.text


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_survives_kill_9(tmp_path: Path, kills: int):
    """Starts and kills at seeded moments of a run that does nothing but save."""
    moments = random.Random(0)
    at_least = 0
    for _ in range(kills):
        program = start("save_for_ever", tmp_path)
        begun = int(await_line(program, "start").split()[1])
        assert begun >= at_least
        # While step n+2 is being announced, step n is complete: save waits for its forerunner.
        await_line(program, f"saving {begun + moments.randint(1, 4)}")
        time.sleep(moments.uniform(0, 0.1))
        program.kill()
        output, errors = program.communicate(timeout=30)
        assert all("skipped: manifest.json is missing" in line for line in errors.splitlines())
        announced = [int(line.split()[1]) for line in output.splitlines(keepends=False)]
        at_least = max(begun, max(announced, default=0) - 2)
    restored = restore(tmp_path)
    assert restored is not None
    assert restored.step >= at_least
    check(restored, restored.step)
