"""GSPO: one importance ratio per sequence."""

from __future__ import annotations

import jax.numpy as jnp

from aspo_jax.losses.clip import gate, is_free
from aspo_jax.losses.objective import Objective, log_ratio, ratio_bounds, weight_only
from aspo_jax.losses.segment import segment_mean


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4, coupled: bool = False) -> Objective:
    """Group sequence policy optimization, in its token form; goes with ``sequence_mean``.

        s = exp(mean_t log r_t) over the response
        A > 0:  w = s  if s <= 1 + clip_high  else 0
        A < 0:  w = s  if s >= 1 - clip_low   else 0
        coupled:  b = s (mean_t(gate_t A_t) - gate_t A_t), 0 with one advantage per sequence

    Published surrogate: ``max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))``. With one advantage
    per sequence this is the gradient of the true sequence ratio; with per-token advantages it is
    GSPO-token. A token whose own ratio is clamped (+-20 nats) has weight 0, as in `ppo_clip`: s
    does not depend on it, and in a sequence of such tokens s would be a weight of 5e8. The paper
    has no clamp.

    clip_low: a negative token counts while s is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while s is at most 1 + clip_high; 0 or more.
    coupled: with per-token advantages, differentiate the sequence ratio itself: every token gets
        ``s mean_t(gate_t A_t)``. A correction chained to it multiplies w and so misses b.
    Bounds this narrow lie below the resolution of bfloat16; s is computed in float32. Multiplied
    by each response's length (the aggregate ``sequence_sum``) the rule is LUSPO, arXiv 2602.05261.
    Source: arXiv 2507.18071 Eqs. 5 and 7.
    Confidence: high: five frameworks agree.
    """
    low, high = ratio_bounds("gspo", clip_low, clip_high)

    def coefficient(tokens, state, stats):
        advantage_BT = tokens.advantage_BT
        log_ratio_BT = log_ratio(tokens)
        ratio_BT = jnp.exp(segment_mean(log_ratio_BT, tokens))
        is_kept_BT, value_BT = gate(ratio_BT, advantage_BT, low, high)
        is_free_BT = is_free(jnp.exp(log_ratio_BT))
        weight_BT = jnp.where(is_kept_BT & is_free_BT, ratio_BT, 0)
        rule = weight_only(weight_BT, -advantage_BT * value_BT)
        if not coupled:
            return rule
        kept_BT = jnp.where(is_kept_BT, advantage_BT, 0)
        bias_BT = ratio_BT * (segment_mean(kept_BT, tokens) - kept_BT)
        return rule._replace(bias_BT=jnp.where(is_free_BT, bias_BT, 0))

    return Objective(coefficient)
