"""Sampling: each prompt is read once for its group, finished rows are filled again at once.

A sampler knows tokens, not texts or rewards. Its seam (`Sampler`) is small, so that other engines
fit behind it:

    sampler.start(params)              # once per policy
    for completion in sampler.sample(requests): ...  # in the order in which they finish
    sampler.release()                                  # forget the params

Randomness is by identity: the draw at a position is `fold_in` of the seed, the request's identity
(domain, draw index, retry round, sample index) and the position, so a completion does not depend on
its batch neighbours, its row, its pages or the order of requests.
"""

from aspo_jax.sampler.choice import EVERYTHING, Choice, truncate
from aspo_jax.sampler.engine import Limits, PagedSampler, Stats
from aspo_jax.sampler.publish import cast_matrices, make_publish
from aspo_jax.sampler.seam import (
    EVALUATE,
    LENGTH,
    NONFINITE,
    STOP,
    TRAIN,
    Completion,
    Request,
    Sampler,
)
from aspo_jax.sampler.stop_strings import stop_length

__all__ = [
    "EVALUATE",
    "EVERYTHING",
    "LENGTH",
    "NONFINITE",
    "STOP",
    "TRAIN",
    "Choice",
    "Completion",
    "Limits",
    "PagedSampler",
    "Request",
    "Sampler",
    "Stats",
    "cast_matrices",
    "make_publish",
    "stop_length",
    "truncate",
]
