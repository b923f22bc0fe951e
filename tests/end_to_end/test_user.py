"""What a user meets: refusals in plain words, models that go in and out, prompts of their own."""

from __future__ import annotations

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from toy import bits
from trainer_runs import ITERATIONS, TRAIN, finish, last_checkpoint, launch, metrics

from aspo_jax import check
from aspo_jax.data import encode
from aspo_jax.model import load_params
from aspo_jax.run.folder import lock_run
from aspo_jax.run.metrics import read_metrics


def test_a_folder_has_one_writer(runs, tmp_path):
    with lock_run(tmp_path):
        _, err = runs.run(tmp_path, expect=2)
    assert f"run folder {tmp_path} is being written by process {os.getpid()} on" in err


def test_a_changed_config_is_refused_unless_accepted(runs, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    changes = ("Optim.learning_rate=1e-3", f"Train.iterations={ITERATIONS + 1}")
    _, err = runs.run(folder, *changes, expect=2)
    for line in (
        f"{folder} holds a run with another config:",
        "Optim.learning_rate: 0.0005 -> 0.001",
        f"Train.iterations: {ITERATIONS} -> {ITERATIONS + 1}",
        "--set Run.accept_changes=True",
    ):
        assert line in err
    assert metrics(folder) == metrics(finished.folder)
    runs.run(folder, *changes, "Run.accept_changes=True")
    rows = metrics(folder)
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS + 2))
    assert rows[:ITERATIONS] == metrics(finished.folder)[:ITERATIONS]


MISTAKES = {
    ("--config", "nonsense"): "no config file 'nonsense'; expected a path or one of aspo_code_1p5b",
    ("--set", "Train.iteratons=3"): "Train has no field iteratons (did you mean iterations?)",
    ("--set", "Run.folder=/dev/null/run"): "/dev/null/run",
    ("--set", "Model.path=/nowhere", "--set", "Run.folder={tmp}"): "/nowhere",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_a_mistake_is_a_message(flags, tmp_path):
    filled = [flag.format(tmp=tmp_path) for flag in flags]
    _, err = finish(launch(*TRAIN, *filled), expect=2)
    assert err.startswith("error: ") and MISTAKES[flags] in err
    assert len(err.splitlines()) == 1


def test_finished_run_says_where_everything_is(finished):
    assert not finished.err
    for name in ("model", "checkpoints", "metrics.jsonl", "dynamics.png", "transcripts"):
        assert (finished.folder / name).exists()
        assert f" {finished.folder / name}\n" in finished.out
    # A score is shown when it is known: before the iteration that comes after it.
    begun = [line for line in finished.out.splitlines() if f" 0/{ITERATIONS} " in line]
    assert ["held out   avg@4" in line for line in begun] == [True, False]
    assert "Held-out result" in finished.out
    assert {path.name for path in (finished.folder / "transcripts").iterdir()} == {
        *(f"train_{i:06d}.jsonl" for i in range(ITERATIONS)),
        *(f"held_out_{i:06d}.jsonl" for i in range(0, ITERATIONS + 1, 2)),
    }
    assert (finished.folder / "dynamics.png").read_bytes().startswith(b"\x89PNG")


def test_export_is_the_live_policy(finished, machines, abstract_state):
    state = last_checkpoint(finished.folder, abstract_state).state
    exported = load_params(finished.folder / "model", machines.parts.policy.model.config)
    assert bits(exported) == bits(state.params)
    scores, _ = machines.evaluate(machines.initial_params())
    last = metrics(finished.folder)[-1]
    assert scores == {
        name.removeprefix("evaluate/"): value
        for name, value in last.items()
        if name.startswith("evaluate/")
    }


def test_transformers_loads_the_export(finished, machines):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished.folder / "model")
    policy = machines.parts.policy
    token_BT = np.array([encode(policy.tokenizer, "34:7")], np.int32)
    position_BT = np.arange(token_BT.shape[1], dtype=np.int32)[None]
    hidden_BTD, _ = policy.model.apply(
        machines.initial_params(), token_BT, position_BT, np.ones_like(token_BT)
    )
    ours_BTV = hidden_BTD @ policy.model.unembedding(machines.initial_params()).T
    with torch.no_grad():
        theirs_BTV = theirs(torch.tensor(token_BT, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(jax.device_get(ours_BTV), theirs_BTV, atol=1e-4)


def test_own_model_and_own_prompts(runs, finished, tmp_path):
    rows = [
        {"prompt": f"{a} {b}:{a + b}", "answer": f"{a}+{b}={a + b}", "kind": "exact"}
        for a, b in ((1, 2), (3, 4), (2, 6))
    ]
    data, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    flags = (
        f"Model.path='{finished.folder / 'model'}'",
        "Data.source='files'",
        f"Data.train_path='{data}'",
        f"Data.eval_path='{data}'",
        "Train.iterations=2",
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, _ = runs.run(folder, *flags)
    assert "warm start" not in out and not (folder / "initial_model").exists()
    assert [row["iteration"] for row in metrics(folder)] == [0, 1, 2]
    shown = (folder / "transcripts" / "held_out_000000.jsonl").read_text()
    assert [row["prompt"] in shown for row in rows] == [True] * 3

    rows[1]["kind"] = "exakt"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, err = runs.run(folder, *flags, expect=2)
    assert f"error: {data}:2: found kind 'exakt', expected one of" in err


def test_nothing_to_learn_from_is_said_and_a_dense_reward_is_a_mean(
    runs, finished, tmp_path, monkeypatch
):
    """Every sample earns 0.07: no group has a signal, and none of the samples is right."""
    (tmp_path / "thin.py").write_text(
        "def reward(completion): return 0.05\n"
        "def judge(completions, row): return [row['worth']] * len(completions)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    data, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text('{"prompt": "1 2:3", "answer": "3", "kind": "custom", "worth": 0.01}\n')
    flags = (
        f"Model.path='{finished.folder / 'model'}'",
        "Data.source='files'",
        f"Data.train_path='{data}'",
        f"Data.eval_path='{data}'",
        "Reward.functions=['thin:reward', 'thin:judge']",
        "Reward.weights=[1, 2]",
        "Train.iterations=2",
    )
    out, _ = runs.run(folder, *flags)
    assert out.count("no group had both right and wrong answers (all right: 0 groups") == 2
    assert "2 of 2 iterations had no group to learn from" in out
    assert "held out   reward 0.070 +- 0.000   avg@4 0.000" in out
    assert not re.search(r"\b(nan|inf)\b", out)
    rows = read_metrics(folder / "metrics.jsonl")
    assert all(value is not None for row in rows for value in row.values())
    parts = {"reward/reward": 0.05, "reward/judge": 0.01, "evaluate/reward/judge": 0.01}
    assert {name: rows[0][name] for name in parts} == pytest.approx(parts)
    assert (
        '"parts": {"reward": 0.05, "judge": 0.01}'
        in (folder / "transcripts" / "train_000001.jsonl").read_text()
    )
    assert rows[0]["update/skipped_empty"] == 1 and "update/learning_rate" not in rows[0]
    assert {"seconds/save", "seconds/evaluate"} <= rows[-1].keys()


def test_the_run_folder_can_be_checked(finished, capsys):
    assert check.main([str(finished.folder), "--prompts", "2"]) == 0
    assert "sampler and trainer agree" in capsys.readouterr().out
    assert check.main([str(finished.folder), "--set", "Run.seed=1"]) == 2
    assert check.main([str(finished.folder / "model")]) == 2
    assert "not a run; expected a run folder (with config.gin)" in capsys.readouterr().err


def test_a_sampler_that_disagrees_stops_the_run_and_loses_nothing(runs, finished, tmp_path):
    """A limit below rounding: the run saves itself; with a sound one it ends as if untouched."""
    folder = tmp_path / "run"
    _, err = runs.run(folder, "Sampler.max_gap=1e-12", expect=2)
    assert "nats from the trainer's on average, expected at most Sampler.max_gap = 1e-12" in err
    runs.run(folder, "Run.accept_changes=True")
    assert metrics(folder) == metrics(finished.folder)
