"""Do sampler and trainer agree on the log-probability of what was sampled?

    gap_t = |log pi_sampler(y_t) - log pi_trainer(y_t)|

Both have the same weights but run other programs: a prompt's pages and one token at a time here,
whole rows there. In float32 a gap is rounding, about 1e-5; in bfloat16 single tokens differ by up
to a tenth of a nat. A larger mean is a bug, and training on it would be off-policy unawares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from aspo_jax.errors import UserError
from aspo_jax.structs import Max, Mean, Metrics, OldPolicy, Rows

BAND = 0.2  # the ratio of the two is "outside" beyond 1 +- this: where ASPO and PPO clip
EXACT = 1e-4  # nats: the largest gap allowed in float32


class SamplingError(UserError):
    """What was sampled must not be trained on; the state before it is intact."""


def gap_metrics(rows: Rows, old: OldPolicy) -> Metrics:
    """Mean and largest gap (nats) and the share outside the band, over response tokens."""
    is_response = rows.is_response_BT
    log_ratio = jnp.where(is_response, rows.sampler_logp_BT - old.old_logp_BT, 0.0)
    count = jnp.sum(is_response, dtype=jnp.float32)
    is_outside = jnp.abs(jnp.exp(log_ratio) - 1.0) > BAND
    return {
        "sampler_gap_mean": Mean(jnp.sum(jnp.abs(log_ratio)), count),
        "sampler_gap_max": Max(jnp.max(jnp.abs(log_ratio))),
        "sampler_gap_outside": Mean(jnp.sum(is_outside, dtype=jnp.float32), count),
    }


class Gap(NamedTuple):
    """Gaps of the response positions ``first`` to ``last``: their number, nats, share."""

    first: int
    last: int
    tokens: int
    mean: float
    largest: float
    outside: float


def by_position(log_ratio_n: np.ndarray, position_n: np.ndarray) -> Iterator[Gap]:
    """Gaps of all tokens, then of the response positions in octaves: 0, 1, 2-3, 4-7, ...

    log_ratio_n, position_n: of every token, sampler's log-probability minus the trainer's.
    """
    end = int(position_n.max()) + 1
    edges = [0, *(2**i for i in range((end - 1).bit_length() + 1))]
    for first, stop in [(0, end), *itertools.pairwise(edges)]:
        x_n = log_ratio_n[(position_n >= first) & (position_n < stop)]
        if x_n.size:
            gap_n, is_outside_n = np.abs(x_n), np.abs(np.expm1(x_n)) > BAND
            yield Gap(
                *(first, min(stop, end) - 1, x_n.size),
                *(float(gap_n.mean()), float(gap_n.max()), float(is_outside_n.mean())),
            )
