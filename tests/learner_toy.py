"""Print the largest |log ratio| of a first update in bfloat16; run as a program of its own.

python tests/learner_toy.py REMAT...: XLA reads its flags once per process, hence the process.
"""

from __future__ import annotations

import os
import sys

import jax.numpy as jnp
import optax
from toy import CONFIG, HEAD, examples, figures, minibatch, on, random_params, toy_mesh, with_old

from aspo_jax import runtime
from aspo_jax.learner import Goal, build_learner
from aspo_jax.losses import aspo, sequence_mean
from aspo_jax.model import build_model


def first_update(remat: str) -> None:
    model = build_model(CONFIG, dtype=jnp.bfloat16, remat=remat)
    goal = Goal(aspo(), sequence_mean, entropy_bonus=0.01)
    learner = build_learner(model, HEAD, goal, optax.sgd(1.0), toy_mesh())
    params = on(toy_mesh(), model, random_params(model))
    part = with_old(learner, params, minibatch(examples(), 3, 2, 32))
    _, report = learner.step(learner.init(params), part)
    got = figures(report)
    print(remat, got["abs_log_ratio_max"], got["entropy"] > 0)


if __name__ == "__main__":
    runtime.start(data=-1, fsdp=1, tensor=1, compilation_cache=os.environ["PROGRAMS"])
    for remat in sys.argv[1:]:
        first_update(remat)
