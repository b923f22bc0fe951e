"""A run that was killed, stopped or damaged ends as the one that nothing disturbed, bit for bit.

With a KL penalty, so that the reference policy must be the initial one and not the resumed one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from toy import bits
from trainer_runs import (
    ITERATIONS,
    TRAP,
    last_checkpoint,
    metrics,
    rollouts,
    scalars,
    transcripts,
)

from aspo_jax.run.metrics import read_metrics
from aspo_jax.run.stop import EXIT_SAVED


@pytest.fixture
def assert_same_run(finished, abstract_state):
    expected = last_checkpoint(finished.folder, abstract_state)

    def check(folder) -> None:
        found = last_checkpoint(folder, abstract_state)
        assert found.step == expected.step == ITERATIONS
        assert bits(found.state) == bits(expected.state)
        assert found.meta["data_position"] == expected.meta["data_position"]
        assert metrics(folder) == metrics(finished.folder)
        assert transcripts(folder) == transcripts(finished.folder)
        assert rollouts(folder) == rollouts(finished.folder)

    return check


def test_two_runs_are_equal_and_compile_nothing_after_the_second_iteration(
    runs, assert_same_run, tmp_path, request
):
    program = (str(request.path.with_name("count_compiles.py")),)
    out, _ = runs.run(tmp_path / "run", program=program)
    assert_same_run(tmp_path / "run")
    compiled = json.loads(out.splitlines()[-1])
    assert len(compiled["after_updates"]) == ITERATIONS
    assert compiled["after_updates"][0] > 10, "the listener heard nothing"
    assert compiled["after_updates"][1] == compiled["after_updates"][-1]


def test_killed_at_any_moment(runs, assert_same_run, tmp_path):
    folder, log = tmp_path / "run", ("Metrics.tensorboard=True",)

    def killed(trap: str) -> None:
        runs.run(folder, *log, program=(*TRAP, f"{trap}:SIGKILL"), expect=-signal.SIGKILL)

    killed("aspo_jax.run.checkpoint:Checkpoints._finish:1")  # while Orbax writes step 2
    assert not list(folder.glob("checkpoints/*/manifest.json"))
    killed("aspo_jax.run.checkpoint:_seal:2")  # step 4 is there, its manifest is not
    assert [path.parent.name for path in folder.glob("checkpoints/*/manifest.json")] == ["2"]

    process, drawn = runs.start(folder, *log), random.Random(0)
    while process.poll() is None and len(read_metrics(folder / "metrics.jsonl")) < 4:
        time.sleep(0.01)
    time.sleep(drawn.uniform(0.0, 0.2))
    process.kill()  # at any moment of iterations 4 and 5, or just after the end
    process.communicate()

    runs.run(folder, *log)
    assert_same_run(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    tags = {name for row in rows for name in row} - {"iteration"}
    shown = scalars(folder)
    for tag in tags:
        points = [(row["iteration"], row[tag]) for row in rows if row.get(tag) is not None]
        assert shown.get(tag, []) == [(i, float(np.float32(value))) for i, value in points], tag


def test_stopped_by_signals(runs, assert_same_run, tmp_path):
    folder = tmp_path / "run"

    def stopped(trap: str, status: int) -> tuple[str, str]:
        return runs.run(folder, program=(*TRAP, trap), expect=status)

    out, err = stopped("aspo_jax.rollout:draw:3:SIGINT", EXIT_SAVED)  # sampling: dropped
    assert "stopped after 1 iterations, saved; the same command goes on" in out
    assert "SIGINT: saving, then stopping" in err and "Traceback" not in err
    out, err = stopped("aspo_jax.train:update:2:SIGTERM", EXIT_SAVED)  # an update is finished
    assert f"going on after 1 of {ITERATIONS} iterations (checkpoint of 20" in out
    assert "stopped after 3 iterations, saved" in out
    assert "SIGTERM: saving, then stopping" in err and "Traceback" not in err
    stopped("aspo_jax.train:save:1:SIGTERM+SIGTERM", 128 + signal.SIGTERM)  # the second: at once

    runs.run(folder)
    assert_same_run(folder)


def test_a_damaged_checkpoint_is_passed_over(runs, finished, assert_same_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    newest = folder / "checkpoints" / str(ITERATIONS)
    payload = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    _, err = runs.run(folder)
    assert f"{newest} skipped: {payload.relative_to(newest)} is damaged" in err
    assert_same_run(folder)


def test_a_run_that_refills_its_steps_is_killed_and_stopped_and_goes_on(
    runs, abstract_state, tmp_path
):
    """How many prompts an iteration drew is in the checkpoint, as the place in the stream."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = ("Train.refill_rounds=2", "Train.iterations=4")
    runs.run(whole, *settings)
    rounds = [int(row["rollout/rounds"]) for row in metrics(whole)[:4]]
    assert max(rounds[:2]) > 1 and max(rounds[2:]) > 1 and len(set(rounds)) > 1
    shown = [f"train_{i:06d}.jsonl" for i in range(4)]  # by iteration, not by prompts drawn
    assert [name for name in transcripts(whole) if name.startswith("train")] == shown

    def interrupted(trap: str, status: int) -> None:
        runs.run(folder, *settings, program=(*TRAP, trap), expect=status)

    interrupted("aspo_jax.train:update:4:SIGKILL", -signal.SIGKILL)  # it had saved 2 iterations
    last = max(i for i in (2, 3) if rounds[i] > 1)
    draws = 1 + sum(rounds[2:last]) + 2  # an evaluation, iterations, and into a second round
    interrupted(f"aspo_jax.rollout:draw:{draws}:SIGINT", EXIT_SAVED)
    stopped = last_checkpoint(folder, abstract_state)
    assert (stopped.step, stopped.meta["data_position"]) == (last, sum(rounds[:last]))

    runs.run(folder, *settings)
    expected, found = (last_checkpoint(f, abstract_state) for f in (whole, folder))
    assert found.step == expected.step == 4
    assert bits(found.state) == bits(expected.state)
    assert metrics(folder) == metrics(whole) and transcripts(folder) == transcripts(whole)
    assert found.meta["data_position"] == expected.meta["data_position"] == sum(rounds)


def test_an_advantage_remembers_prompts_across_a_stop(
    runs, finished, abstract_state, tmp_path, monkeypatch
):
    """Three prompts, so that each comes in every step; stopped once one was added to the past."""
    (tmp_path / "dense.py").write_text("def reward(completion): return len(set(completion)) / 9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{a} 2:{a + 2}", "answer": "x", "kind": "custom"} for a in (1, 3, 6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"Model.path='{finished.folder / 'model'}'",
        "Data.source='files'",
        f"Data.train_path='{data}'",
        f"Data.eval_path='{data}'",
        "Reward.functions=['dense:reward']",
        "Objective.advantage=prompt_smooth",
        "Train.iterations=3",
        "Checkpoint.every=1",
    )
    whole, folder = tmp_path / "whole", tmp_path / "run"
    runs.run(whole, *settings)
    trap = (*TRAP, "aspo_jax.steps:check_agreement:2:SIGINT")
    out, _ = runs.run(folder, *settings, program=trap, expect=EXIT_SAVED)
    assert "stopped after 1 iterations, saved" in out
    visits = [i for i, *_ in last_checkpoint(folder, abstract_state).meta["history"].values()]
    assert sorted(visits) == [1, 1, 2]  # those of the iteration that was dropped are not in it
    runs.run(folder, *settings)
    assert metrics(folder) == metrics(whole) and transcripts(folder) == transcripts(whole)
    expected, found = (last_checkpoint(path, abstract_state) for path in (whole, folder))
    assert bits(found.state) == bits(expected.state)
    assert found.meta["history"] == expected.meta["history"]
    assert [i for i, *_ in found.meta["history"].values()] == [4, 4, 4]
