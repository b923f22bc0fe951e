"""Print how far the updates of meshes of eight devices are from one device's; a program of its own.

python tests/mesh_toy.py '[[2, 2, 2], ...]' CACHE: a session's number of devices is fixed, hence the
process. Each number is the largest over the parameters of |change - change on one device|, relative
to the largest change of that parameter.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import optax
from toy import examples, minibatch, on, random_params, toy_learner, toy_mesh, toy_model, with_old

from aspo_jax.learner import Goal
from aspo_jax.losses import aspo, chain, kl_penalty, sequence_mean
from aspo_jax.model import Model


def change(model: Model, sizes: tuple[int, int, int], params, reference):
    """What one update does to each parameter."""
    mesh = toy_mesh(*sizes)
    goal = Goal(chain(aspo(), kl_penalty(beta=0.1)), sequence_mean, entropy_bonus=0.01)
    learner = toy_learner(model, goal, optax.sgd(1.0), mesh)
    old, frozen = on(mesh, model, reference), on(mesh, model, params)
    part = with_old(learner, old, minibatch(examples(), 1, 8, 32), frozen)
    state, _ = learner.step(learner.init(on(mesh, model, params)), part)
    return jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)


def main(meshes: str, cache: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = toy_model(heads=8, kv_heads=8, head_dim=2, tie_embeddings=False)
    params, reference = random_params(model), random_params(model, seed=1)
    alone = change(model, (1, 1, 1), params, reference)

    def difference(sizes) -> float:
        together = change(model, sizes, params, reference)
        relative = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), together, alone)
        return float(max(jax.tree.leaves(relative)))

    print(json.dumps([difference(sizes) for sizes in json.loads(meshes)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
