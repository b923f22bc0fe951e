"""CISPO: the importance weight is clipped, no token's gradient is dropped."""

from __future__ import annotations

import jax.numpy as jnp

from aspo_jax.losses.clip import is_kept
from aspo_jax.losses.objective import Objective, accurate, ratio, weight_only


def cispo(ratio_min: float = 0.0, ratio_max: float = 5.0, unified_mask: bool = False) -> Objective:
    """Clipped importance-sampling policy optimization; goes with ``token_mean``.

        w = clip(r, ratio_min, ratio_max)        surrogate: -A sg(w) log pi

    ratio_min, ratio_max: absolute bounds of the ratio, 0 or more, not distances from 1. The
        paper's upper bound is not published; 5 is the common choice of libraries.
    unified_mask: drop what PPO's gate drops: A > 0 beyond ratio_max, A < 0 below ratio_min. The
        other side stays clipped, so this is not PPO.
    Source: MiniMax-M1, arXiv 2506.13585; the unified mask as ROLL has it.
    Confidence: medium: seven frameworks, whose bounds differ.
    """
    if not 0 <= ratio_min <= ratio_max or ratio_max == 0:
        raise ValueError(
            f"cispo.ratio_min = {ratio_min}, cispo.ratio_max = {ratio_max}; "
            "expected 0 <= ratio_min <= ratio_max, above 0 (absolute ratios)"
        )

    def coefficient(tokens, state, stats):
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        weight_BT = jnp.clip(ratio_BT, ratio_min, ratio_max)
        if unified_mask:
            is_kept_BT = is_kept(ratio_BT, advantage_BT, ratio_min, ratio_max)
            weight_BT = jnp.where(is_kept_BT, weight_BT, 0)
        return weight_only(weight_BT, -advantage_BT * weight_BT * accurate(tokens.logp_BT))

    return Objective(coefficient)
