"""Baselines that differ from position to position."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.advantages import over
from aspo_jax.losses.objective import Coefficient, Objective, accurate, require
from aspo_jax.losses.ppo import ppo_clip
from aspo_jax.losses.segment import running_sum
from aspo_jax.structs import Tokens


def otb(*, clip_low: float = 0.2, clip_high: float = 0.2, keep_tail: bool = True) -> Objective:
    """Optimal token baseline: `ppo_clip` with a baseline for each position of a group's responses.

        B_t = sum_i A_i W_it / sum_i W_it        over the prompt's responses that reach position t
        W_it = sum_{s <= t} (1 - 2 q_is + sum_v q_v^2)        q: the old policy's probabilities
        w = that of `ppo_clip` for A - B        b = -w B

    Published surrogate: that of `ppo_clip` with A - B for A. A summand of W is the squared norm of
    a token's score with respect to its logits.

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    keep_tail: tokens at positions that one response alone reaches keep the advantage that they
        have; False: they have no gradient, for A = B there.

    Goes with ``group_mean``: whatever an advantage takes off the rewards of a group, B takes off in
    turn. The tail of verl keeps the bare reward; here its baseline is the group's.
    Needs ``old_square_BT``, which the old policy then gives at the cost of one more pass over the
    vocabulary, and a forward pass before each update. verl multiplies W by the squares of
    correction weights, if there are any; here it does not.
    Source: arXiv 2602.07078; verl `compute_optimal_token_baseline_advantage`.
    Confidence: medium: one port, whose default for the tail has been both.
    """
    ppo = ppo_clip(clip_low=clip_low, clip_high=clip_high)

    def prepare(tokens, state):
        squares_BT = accurate(require(tokens, "old_square_BT", "otb"))
        energy_BT = 1 - 2 * jnp.exp(accurate(tokens.old_logp_BT)) + squares_BT
        weight_BT = running_sum(jnp.maximum(energy_BT, 0), tokens)
        place_K = _place(tokens).ravel()
        known_K = jnp.sort(place_K)
        at_K = jnp.searchsorted(known_K, place_K)

        def total(x_BT: Array) -> Array:
            x_BT = jnp.where(tokens.is_response_BT, x_BT, 0)
            return jax.ops.segment_sum(x_BT.ravel(), at_K, num_segments=len(known_K))

        baseline_K = over(total(tokens.advantage_BT * weight_BT), total(weight_BT))
        is_shared_K = total(jnp.ones_like(weight_BT)) > 1
        return known_K, jnp.where(is_shared_K, baseline_K, 0), is_shared_K

    def coefficient(tokens, state, stats):
        known_K, baseline_K, is_shared_K = stats
        at_BT = jnp.searchsorted(known_K, _place(tokens))
        baseline_BT = baseline_K.at[at_BT].get(mode="clip")
        own = dataclasses.replace(tokens, advantage_BT=tokens.advantage_BT - baseline_BT)
        rule = ppo.coefficient(own, (), None)
        is_kept_BT = keep_tail | is_shared_K.at[at_BT].get(mode="clip")
        weight_BT = jnp.where(is_kept_BT, rule.weight_BT, 0)
        surrogate_BT = rule.surrogate_BT
        if surrogate_BT is not None:
            surrogate_BT = jnp.where(is_kept_BT, surrogate_BT, 0)
        return Coefficient(weight_BT, -weight_BT * baseline_BT, rule.metrics, surrogate_BT)

    return Objective(coefficient, prepare)


def _place(tokens: Tokens) -> Array:
    """A number for each prompt and position, which sorts masked tokens behind all others."""
    position_BT = require(tokens, "position_BT", "otb")
    group_id_BT = require(tokens, "group_id_BT", "otb")
    place_BT = group_id_BT * tokens.is_response_BT.shape[-1] + position_BT
    return jnp.where(tokens.is_response_BT, place_BT, jnp.iinfo(jnp.int32).max)
