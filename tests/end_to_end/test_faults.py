"""What the world does to a run: nothing that was done is lost, and one message says what to do."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from toy import bits
from trainer_runs import (
    ITERATIONS,
    TRAP,
    finish,
    last_checkpoint,
    metrics,
    until_stopped,
)

from aspo_jax.run.folder import FILES, FOLDERS, RunLocked, lock_run
from aspo_jax.run.metrics import read_metrics
from aspo_jax.run.stop import EXIT_SAVED


@pytest.fixture
def half(finished, tmp_path) -> Path:
    """A run that was killed after its checkpoint of iteration 4."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    shutil.rmtree(folder / "checkpoints" / str(ITERATIONS))
    shutil.rmtree(folder / "model")
    return folder


def complete(folder: Path) -> set[int]:
    return {int(path.parent.name) for path in folder.glob("checkpoints/*/manifest.json")}


def test_a_run_leaves_what_it_says(finished):
    assert {path.name for path in finished.folder.iterdir()} <= {*FILES, *FOLDERS}


def test_a_run_says_how_long_it_waited_for_prompts(finished):
    for row in read_metrics(finished.folder / "metrics.jsonl")[:ITERATIONS]:
        assert 0 < row["seconds/data"] < row["seconds/iteration"]


def test_a_console_that_goes_away_ends_nothing(runs, finished, half):
    process = runs.start(half)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    assert complete(half) == complete(finished.folder)
    assert metrics(half) == metrics(finished.folder)
    assert (half / "dynamics.png").exists() and (half / "model").exists()


def test_before_the_first_save_nothing_is_claimed(runs, tmp_path):
    """A mistake, then a signal while the weights load: the next start may have any config."""
    folder, loading = tmp_path / "run", (*TRAP, "aspo_jax.build:load_params:1:SIGTERM")
    _, err = runs.run(folder, "Model.path='/nowhere'", expect=2)
    assert "/nowhere" in err
    out, err = runs.run(folder, "Optim.b1=0.8", program=loading, expect=EXIT_SAVED)
    assert "nothing new to save, the same command goes on" in out
    assert "SIGTERM: saving, then stopping" in err and "Traceback" not in err
    assert {path.name for path in folder.iterdir()} == {".lock", "initial_model"}


def test_a_folder_that_is_deleted_and_taken_by_another_is_left_alone(runs, half, tmp_path):
    process = runs.start(half, program=(*TRAP, "aspo_jax.train:update:1:SIGSTOP"))
    until_stopped(process)
    with pytest.raises(RunLocked):
        lock_run(half)
    shutil.rmtree(half)
    with lock_run(half):
        os.kill(process.pid, signal.SIGCONT)
        _, err = finish(process, expect=2)
        assert f"error: run folder {half} was deleted or replaced under the run" in err
        assert "Traceback" not in err
        assert [path.name for path in half.iterdir()] == [".lock"]


def test_a_full_disk_is_one_message_and_the_run_goes_on_once_there_is_room(
    runs, finished, half, full_disk, abstract_state
):
    folder = full_disk / "run"
    shutil.copytree(half, folder)
    process = runs.start(folder, program=(*TRAP, "aspo_jax.train:save:1:SIGSTOP"))
    until_stopped(process)
    filler = full_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.kill(process.pid, signal.SIGCONT)
    _, err = finish(process, expect=2)
    assert "Traceback" not in err
    message = err[err.index("error: ") :]
    assert message.startswith("error: c") and str(folder) in message
    assert "No space left on device (0.0 of" in message and "make room there" in message
    assert "the newest complete checkpoint is step 4, the same command goes on there" in message
    filler.unlink()
    runs.run(folder)
    assert metrics(folder) == metrics(finished.folder)
    expected = last_checkpoint(finished.folder, abstract_state)
    assert bits(last_checkpoint(folder, abstract_state).state) == bits(expected.state)


def test_graders_that_fail_stop_the_run_and_lose_nothing(runs, half):
    trap = (*TRAP, "aspo_jax.steps:check_failures:2:RewardError")
    _, err = runs.run(half, program=trap, expect=2)
    assert err == "error: the graders fail\n"
    assert 5 in complete(half)


def test_a_reference_model_that_has_changed_is_named(runs, half):
    path = half / "initial_model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    _, err = runs.run(half, expect=2)
    assert f"error: {path.parent}: model.safetensors is damaged" in err
    assert "Delete that folder: the same command makes the same model again" in err
    shutil.rmtree(path.parent)
    trap = (*TRAP, "aspo_jax.steps:collect:1:SIGTERM")
    runs.run(half, program=trap, expect=EXIT_SAVED)  # past the comparison with what it was
