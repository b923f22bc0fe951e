"""Sampling: prompts read once per group, rows refilled as they end, completions as they finish.

A sampler knows tokens, not texts or rewards. Its seam is small; other engines fit behind it:

    sampler.start(params)              # once per policy
    for completion in sampler.sample(requests): ...

Randomness is by identity: the draw at a position is `fold_in` of the seed, the request's identity
(domain, draw index, retry round, sample index) and the position, so a completion does not depend on
its batch neighbours, its row, its pages or the order of requests.
"""

from aspo_jax.sampler.choice import EVERYTHING as EVERYTHING
from aspo_jax.sampler.choice import Choice as Choice
from aspo_jax.sampler.choice import identity_keys as identity_keys
from aspo_jax.sampler.choice import truncate as truncate
from aspo_jax.sampler.device import Rows as Rows
from aspo_jax.sampler.engine import Limits as Limits
from aspo_jax.sampler.engine import PagedSampler as PagedSampler
from aspo_jax.sampler.engine import Stats as Stats
from aspo_jax.sampler.publish import cast_matrices as cast_matrices
from aspo_jax.sampler.publish import make_publish as make_publish
from aspo_jax.sampler.seam import EVALUATE as EVALUATE
from aspo_jax.sampler.seam import LENGTH as LENGTH
from aspo_jax.sampler.seam import NONFINITE as NONFINITE
from aspo_jax.sampler.seam import STOP as STOP
from aspo_jax.sampler.seam import TRAIN as TRAIN
from aspo_jax.sampler.seam import WARM_START as WARM_START
from aspo_jax.sampler.seam import Completion as Completion
from aspo_jax.sampler.seam import Request as Request
from aspo_jax.sampler.seam import Sampler as Sampler

__all__ = [
    "EVALUATE",
    "EVERYTHING",
    "LENGTH",
    "NONFINITE",
    "STOP",
    "TRAIN",
    "WARM_START",
    "Choice",
    "Completion",
    "Limits",
    "PagedSampler",
    "Request",
    "Rows",
    "Sampler",
    "Stats",
    "cast_matrices",
    "identity_keys",
    "make_publish",
    "truncate",
]
