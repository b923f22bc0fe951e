"""GSPO: one importance ratio per sequence."""

from __future__ import annotations

import jax.numpy as jnp

from aspo_jax.losses.clip import is_free, is_kept
from aspo_jax.losses.objective import Objective, log_ratio, ratio_bounds, weight_only
from aspo_jax.losses.segment import segment_mean


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """Group sequence policy optimization, in its token form; goes with ``sequence_mean``.

        s = exp(mean_t log r_t) over the response
        A > 0:  w = s  if s <= 1 + clip_high  else 0
        A < 0:  w = s  if s >= 1 - clip_low   else 0

    clip_low: a negative token counts while s is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while s is at most 1 + clip_high; 0 or more.

    Published surrogate: ``max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))``. With one advantage
    per sequence this is the gradient of the true sequence ratio; with per-token advantages it is
    GSPO-token. A token whose own ratio is clamped (+-20 nats) has weight 0, as in `ppo_clip`: s
    does not depend on it, and in a sequence of such tokens s would be a weight of 5e8. The paper
    has no clamp.
    Source: arXiv 2507.18071 Eqs. 5 and 7.
    """
    low, high = ratio_bounds("gspo", clip_low, clip_high)

    def coefficient(tokens, state, sums):
        advantage_BT = tokens.advantage_BT
        log_ratio_BT = log_ratio(tokens)
        ratio_BT = jnp.exp(segment_mean(log_ratio_BT, tokens))
        is_kept_BT = is_kept(ratio_BT, advantage_BT, low, high) & is_free(jnp.exp(log_ratio_BT))
        clipped_BT = jnp.where(
            advantage_BT > 0, jnp.minimum(ratio_BT, high), jnp.maximum(ratio_BT, low)
        )
        return weight_only(jnp.where(is_kept_BT, ratio_BT, 0), -advantage_BT * clipped_BT)

    return Objective(coefficient)
