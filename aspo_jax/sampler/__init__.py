"""Sampling: each prompt is read once for its group, finished rows are filled again at once.

A sampler knows tokens, not texts or rewards. Its seam (`Sampler`) is small, so that other engines
fit behind it:

    sampler.start(params)              # once per policy
    for completion in sampler.sample(requests): ...  # in the order in which they finish
    sampler.release()                                  # forget the params

`PagedSampler.open` is the same by hand, for whoever has requests coming while others run: a
`Session` with `submit`, `cancel` and `step`.

Randomness is by identity: the draw at a position is `fold_in` of the seed, the request's identity
(domain, draw index, retry round, sample index) and the position, so a completion does not depend on
its batch neighbours, its row, its pages or the order of requests.
"""

from aspo_jax.sampler.choice import EVERYTHING, Choice, truncate
from aspo_jax.sampler.device import Serving
from aspo_jax.sampler.engine import PagedSampler
from aspo_jax.sampler.limits import Limits
from aspo_jax.sampler.publish import cast_matrices, make_publish
from aspo_jax.sampler.seam import (
    ABORTED,
    EVALUATE,
    LENGTH,
    NONFINITE,
    SERVE,
    STOP,
    TRAIN,
    Completion,
    Delta,
    Drawing,
    Request,
    Sampler,
    Step,
)
from aspo_jax.sampler.session import Session, Stats
from aspo_jax.sampler.stop_strings import stop_length

__all__ = [
    "ABORTED",
    "EVALUATE",
    "EVERYTHING",
    "LENGTH",
    "NONFINITE",
    "SERVE",
    "STOP",
    "TRAIN",
    "Choice",
    "Completion",
    "Delta",
    "Drawing",
    "Limits",
    "PagedSampler",
    "Request",
    "Sampler",
    "Serving",
    "Session",
    "Stats",
    "Step",
    "cast_matrices",
    "make_publish",
    "stop_length",
    "truncate",
]
