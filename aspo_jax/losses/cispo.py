"""CISPO: the importance weight is clipped, no token's gradient is dropped."""

from __future__ import annotations

import jax.numpy as jnp

from aspo_jax.losses.objective import Objective, accurate, ratio, weight_only


def cispo(ratio_min: float = 0.0, ratio_max: float = 5.0) -> Objective:
    """Clipped importance-sampling policy optimization; goes with ``token_mean``.

        w = clip(r, ratio_min, ratio_max)        surrogate: -A sg(w) log pi

    ratio_min, ratio_max: absolute bounds of the ratio, 0 or more, not distances from 1. The
        paper's upper bound is not published; 5 is the common choice of libraries.
    Source: MiniMax-M1, arXiv 2506.13585.
    """
    if not 0 <= ratio_min <= ratio_max or ratio_max == 0:
        raise ValueError(
            f"cispo.ratio_min = {ratio_min}, cispo.ratio_max = {ratio_max}; "
            "expected 0 <= ratio_min <= ratio_max, above 0 (absolute ratios)"
        )

    def coefficient(tokens, state, sums):
        weight_BT = jnp.clip(ratio(tokens), ratio_min, ratio_max)
        return weight_only(weight_BT, -tokens.advantage_BT * weight_BT * accurate(tokens.logp_BT))

    return Objective(coefficient)
