"""Do sampler and trainer agree on the log-probability of what was sampled?

    gap_t = |log pi_sampler(y_t) - log pi_trainer(y_t)|

Both have the same weights but run different programs: the sampler reads cached pages and draws one
token at a time, the trainer reads whole rows. In float32 a gap is rounding, about 1e-5; in bfloat16
single tokens differ by up to a tenth of a nat. A larger mean is a bug: what was sampled would not
come from the policy that is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from aspo_jax.errors import UserError
from aspo_jax.structs import Max, Mean, Metrics, Rows

BAND = 0.2  # a ratio of the two beyond 1 +- this is "outside": there ASPO and PPO clip
EXACT = 1e-4  # nats: the largest gap allowed in float32


class SamplingError(UserError):
    """What was sampled must not be trained on; the state before it is intact."""


def gap_metrics(rows: Rows, logp_BT: Array) -> Metrics:
    """Mean and largest gap (nats) and the share outside the band, over response tokens.

    logp_BT: the trainer's, of the weights that the rows were sampled from.
    """
    is_response_BT = rows.is_response_BT
    log_ratio_BT = jnp.where(is_response_BT, rows.sampler_logp_BT - logp_BT, 0.0)
    gap_BT, is_outside_BT = jnp.abs(log_ratio_BT), jnp.abs(jnp.expm1(log_ratio_BT)) > BAND
    count = jnp.sum(is_response_BT, dtype=jnp.float32)
    return {
        "sampler_gap_mean": Mean(jnp.sum(gap_BT), count),
        "sampler_gap_max": Max(jnp.max(gap_BT)),
        "sampler_gap_outside": Mean(jnp.sum(is_outside_BT, dtype=jnp.float32), count),
    }


class Gap(NamedTuple):
    """Gaps at the response positions ``first`` to ``last``.

    tokens: how many there are. mean, largest: nats. outside: share of tokens beyond the band.
    """

    first: int
    last: int
    tokens: int
    mean: float
    largest: float
    outside: float


def by_position(log_ratio_n: np.ndarray, position_n: np.ndarray) -> Iterator[Gap]:
    """Gaps of all tokens, then of the response positions in octaves: 0, 1, 2-3, 4-7, ...

    log_ratio_n: the sampler's log-probability of each token minus the trainer's. position_n: the
    token's number in its response, from 0.
    """
    end = int(position_n.max()) + 1
    edges = [0, *(2**i for i in range((end - 1).bit_length() + 1))]
    for first, stop in [(0, end), *itertools.pairwise(edges)]:
        x_n = log_ratio_n[(position_n >= first) & (position_n < stop)]
        if x_n.size:
            gap_n, is_outside_n = np.abs(x_n), np.abs(np.expm1(x_n)) > BAND
            yield Gap(
                first=first,
                last=min(stop, end) - 1,
                tokens=x_n.size,
                mean=float(gap_n.mean()),
                largest=float(gap_n.max()),
                outside=float(is_outside_n.mean()),
            )
