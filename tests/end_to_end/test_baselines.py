"""``--set Objective.name=...``: every rule goes from its name through a whole update."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from toy import (
    examples,
    figures,
    minibatch,
    on,
    quickly,
    random_params,
    toy_learner,
    toy_mesh,
    toy_model,
)
from toy import with_old as scored

from aspo_jax.config import read_config
from aspo_jax.parts import FACTORIES, build_goal
from aspo_jax.run.metrics import METRICS

BASELINES = (
    *("archer2", "cispo", "dapo", "grpo", "grpo_without_is", "gspo"),
    "positive_response_mean",
)


@pytest.mark.parametrize("name", BASELINES)
def test_one_update(name):
    config = read_config(["--set", f"Objective.name={name}"], FACTORIES)
    goal, model = build_goal(config), toy_model(layers=1)
    learner = toy_learner(model, goal, optax.sgd(1e-2))
    params = on(toy_mesh(), model, random_params(model))
    part = scored(learner, params, minibatch(examples(), 1, 8, 32), params)
    before = jax.device_get(params)
    state, report = quickly(learner.step, learner.init(params), part)
    assert int(state.step) == 1
    after = jax.device_get(state.params)
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True)
    ]
    assert np.isfinite(moved).all() and max(moved) > 0
    known = {name.removesuffix("_q50") for name in METRICS}
    assert {f"update/{metric}" for metric in report} <= known
    assert figures(report)["abs_log_ratio_max"] < 1e-5
