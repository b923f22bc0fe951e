"""Print how far updates on up to eight devices are from one device's; a program of its own.

python tests/mesh_toy.py '[[2, 2, 2], ...]' CACHE: a session's number of devices is fixed, hence the
process. ``updates``: for each mesh the largest over the parameters of |change - change on one
device|, relative to the largest change of that parameter. ``moved``: the same of three updates on
eight, four and one devices with a checkpoint between each two, against three on eight.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from toy import (
    bits,
    examples,
    minibatch,
    on,
    random_params,
    toy_learner,
    toy_mesh,
    toy_model,
    with_old,
)

from aspo_jax.learner import Goal, Learner
from aspo_jax.losses import aspo, chain, kl_penalty, sequence_mean
from aspo_jax.run.checkpoint import Checkpoints

jax.config.update("jax_num_cpu_devices", 8)

GOAL = Goal(chain(aspo(), kl_penalty(beta=0.1)), sequence_mean, entropy_bonus=0.01)
MODEL = toy_model(layers=1, heads=8, kv_heads=8, head_dim=2, tie_embeddings=False)
PARAMS, REFERENCE = random_params(MODEL), random_params(MODEL, seed=1)
EIGHT, FOUR, ONE = (2, 2, 2), (1, 4, 1), (1, 1, 1)


def update(learner: Learner, state, mesh):
    old, frozen = on(mesh, MODEL, REFERENCE), on(mesh, MODEL, PARAMS)
    part = with_old(learner, old, minibatch(examples(), 1, 8, 32), frozen)
    return learner.step(state, part)[0]


def change(sizes: tuple[int, int, int]):
    """What one update does to each parameter."""
    mesh = toy_mesh(*sizes)
    learner = toy_learner(MODEL, GOAL, optax.sgd(1.0), mesh)
    return since_start(update(learner, learner.init(on(mesh, MODEL, PARAMS)), mesh))


@functools.cache
def adam_on(sizes: tuple[int, int, int]) -> Learner:
    return toy_learner(MODEL, GOAL, optax.adamw(1e-2, eps=1e-2), toy_mesh(*sizes))


def change_on(meshes: list[tuple[int, int, int]], folder: Path):
    """What one update on each mesh does in all; from one to the next the state is a checkpoint."""
    state, saved = None, None
    with Checkpoints(folder, keep=1) as checkpoints:
        for step, sizes in enumerate(meshes):
            mesh, learner = toy_mesh(*sizes), adam_on(sizes)
            state = learner.init(on(mesh, MODEL, PARAMS))
            if saved is not None:
                restored = checkpoints.restore(state)
                assert restored is not None and bits(restored.state) == saved
                state = restored.state
            assert len(state.params["embed"].sharding.device_set) == np.prod(sizes)
            state = update(learner, state, mesh)
            saved = bits(state)
            checkpoints.save(step, state, {})
    return since_start(state)


def since_start(state):
    return jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, PARAMS)


def distance(changed, expected) -> float:
    relative = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), changed, expected)
    return float(max(jax.tree.leaves(relative)))


def main(meshes: str, cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    alone = change(ONE)
    updates = [distance(change(sizes), alone) for sizes in json.loads(meshes)]
    with tempfile.TemporaryDirectory() as folder:
        moved = change_on([EIGHT, FOUR, ONE], Path(folder, "moved"))
        stayed = change_on([EIGHT] * 3, Path(folder, "stayed"))
    print(json.dumps({"updates": updates, "moved": distance(moved, stayed)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
