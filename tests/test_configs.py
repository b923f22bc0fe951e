"""Every config that comes with the package builds, and its update lowers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from toy import toy_mesh

from aspo_jax.build import FACTORIES, build_machines, new_policy, save_policy
from aspo_jax.config import packaged, read_config
from aspo_jax.rollout import fill
from aspo_jax.structs import OldPolicy


@pytest.mark.parametrize("name", packaged())
def test_builds_and_lowers(name, tmp_path):
    config = read_config(["--config", name], FACTORIES)
    if config.model.path is None:  # untrained weights stand in for the warm start
        policy = new_policy(config)
        save_policy(policy, policy.model.init(jax.random.key(0)), tmp_path / "model")
    folder = config.model.path or tmp_path / "model"
    machines = build_machines(config, folder, toy_mesh())
    with machines.scorer:
        step, state = machines.learner.step, jax.eval_shape(machines.learner.init, machines.params)
        empty = fill([], machines.shape)
        per_token: Any = jax.ShapeDtypeStruct(empty.rows.target_BT.shape, jnp.float32)
        old = OldPolicy(per_token, per_token, None if machines.reference is None else per_token)
        assert jax.jit(step).lower(state, dataclasses.replace(empty, old=old)).as_text()
        assert len(next(machines.prompts)) == config.train.prompts_per_step
