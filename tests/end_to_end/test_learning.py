"""The default recipe in miniature: smaller puzzles, a smaller model, the same ASPO."""

from __future__ import annotations

import numpy as np
from trainer_runs import metrics

MINIATURE = (
    "Objective.penalties=()",
    "Train.iterations=40",
    "Train.prompts_per_step=32",
    "Train.samples_per_prompt=8",
    "Train.prompts_per_minibatch=8",
    "Train.rows_per_microbatch=64",
    "Sampler.slots=256",
    "Evaluate.prompts=64",
    "Evaluate.samples=8",
    "Evaluate.every=0",
    "Checkpoint.every=40",
)


def test_reward_rises(runs, finished, tmp_path):
    folder = tmp_path / "run"
    runs.run(folder, f"Model.path='{finished.folder / 'initial_model'}'", *MINIATURE)
    rows = metrics(folder)
    # 0.19 -> 0.50 here, standard error 0.06; other processors round differently.
    assert rows[-1]["evaluate/avg"] > rows[0]["evaluate/avg"] + 0.15
    reward = [row["rollout/reward_mean"] for row in rows[:-1]]
    assert np.mean(reward[-10:]) > np.mean(reward[:5]) + 0.15
    assert max(row["update/sampler_gap_max"] for row in rows[:-1]) < 1e-4
