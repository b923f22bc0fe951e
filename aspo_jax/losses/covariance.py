"""Clip-Cov and KL-Cov: the few tokens that cost the most entropy are held back.

By how much a token will lower the entropy is judged by its part in the covariance of advantage and
log-probability, ``(A - mean A) (log pi - mean log pi)``, the means over the mini-batch's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import clipped, is_free, is_kept, ratio_weight
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    accurate,
    log_ratio,
    ratio,
    ratio_bounds,
    require,
    require_non_negative,
    require_share,
    weight_only,
)
from aspo_jax.losses.report import mean_over
from aspo_jax.structs import Tokens


class _Means(NamedTuple):
    advantage: Array
    logp: Array


def _means(tokens: Tokens) -> _Means:
    """Over the response tokens, which alone are not zero."""
    count = jnp.maximum(tokens.is_response_BT.sum(), 1)
    return _Means(*(accurate(x).sum() / count for x in (tokens.advantage_BT, tokens.logp_BT)))


def _covariance(tokens: Tokens, means: _Means) -> Array:
    return (tokens.advantage_BT - means.advantage) * (accurate(tokens.logp_BT) - means.logp)


def _quota(share: float, tokens: Tokens) -> Array:
    """So many of the response tokens, rounded down, at least one; an integer as a float."""
    count = tokens.is_response_BT.sum().astype(accurate(tokens.logp_BT).dtype)
    return jnp.maximum(jnp.floor(share * count), 1)


def kl_cov(*, share: float = 2e-4, beta: float = 1.0) -> Objective:
    """KL-Cov: a penalty on moving the tokens of the highest covariance; no clip.

        S = the max(1, floor(share n)) of n response tokens with the highest covariance
        w = r
        b = -beta sign(log r)  on S,  0 elsewhere

    Published surrogate: ``-A r + beta |log r| [t in S]``.

    share: of the response tokens that are penalised, from 0 to 1.
    beta: weight of the penalty, per nat, 0 or more. The authors' and SkyRL's 1; verl's default has
        become 0.1.

    In the first update after a rollout log r = 0, its sign is 0, and the rule is REINFORCE. The
    authors' scripts have shares of 2e-3 (7B) and 2e-4 (32B). Tokens that tie with the last of S are
    in it too. A token beyond the clamp of +-20 nats has no gradient; the authors have no clamp.
    Costs a forward pass and a sort. Metric: ``covariance_share``, share of the tokens in S.
    Source: arXiv 2505.22617; the authors' code, which ranks within each micro-batch.
    Confidence: high: the authors' code
    """
    require_share("kl_cov", share=share)
    require_non_negative("kl_cov", beta=beta)

    def prepare(tokens, state):
        means = _means(tokens)
        covariance_BT = jnp.where(tokens.is_response_BT, _covariance(tokens, means), -jnp.inf)
        in_order = jnp.sort(covariance_BT.ravel())
        first = in_order.size - _quota(share, tokens).astype(jnp.int32)
        # Between the last in S and the first out of it: no rounding moves either across.
        return means, (in_order[first] + in_order[jnp.maximum(first - 1, 0)]) / 2

    def coefficient(tokens, state, stats):
        means, threshold = stats
        is_chosen_BT = tokens.is_response_BT & (_covariance(tokens, means) >= threshold)
        log_ratio_BT = log_ratio(tokens)
        ratio_BT = jnp.exp(log_ratio_BT)
        beta_BT = jnp.where(is_chosen_BT, jnp.asarray(beta, ratio_BT.dtype), 0)
        return Coefficient(
            weight_BT=ratio_weight(ratio_BT),
            bias_BT=jnp.where(is_free(ratio_BT), -beta_BT * jnp.sign(log_ratio_BT), 0),
            metrics={"covariance_share": mean_over(is_chosen_BT, tokens.is_response_BT)},
            surrogate_BT=-tokens.advantage_BT * ratio_BT + beta_BT * jnp.abs(log_ratio_BT),
        )

    return Objective(coefficient, prepare)


def clip_cov(
    *,
    share: float = 2e-4,
    covariance_min: float = 1.0,
    covariance_max: float = 5.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    seed: int = 0,
) -> Objective:
    """Clip-Cov: PPO's clip, and no gradient for a few random tokens of high covariance.

        candidates: covariance_min < covariance < covariance_max, and not clipped by PPO's gate
        k = min(candidates, max(1, floor(share n))) of n response tokens
        S = each candidate with probability k / candidates
        A > 0:  w = r  if r <= 1 + clip_high and not in S  else 0
        A < 0:  w = r  if r >= 1 - clip_low  and not in S  else 0

    Published surrogate: ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) [t not in S]``.

    share: of the response tokens that lose their gradient, from 0 to 1.
    covariance_min, covariance_max: nats; meant for advantages that were divided by their deviation.
    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more. 1 and 1,
        the authors' scripts', all but turn the clip off.
    seed: of the draws.

    The released code draws k of the candidates. Here each is drawn by itself, so k is what S has on
    average: whether a token is in S is named by the seed, the number of updates so far, its prompt,
    its position and its log-probability in the sampler, and not by what lies beside it. Tokens
    alike in all of these, equal beginnings of two answers, share a draw.
    Needs ``sampler_logp_BT``, ``group_id_BT`` and ``position_BT``. Its state is the number of
    updates. Costs a forward pass. Metric: ``covariance_share``, share of the tokens in S.
    Source: arXiv 2505.22617; the authors' code, which draws from each micro-batch.
    Confidence: high: the authors' code
    """
    require_share("clip_cov", share=share)
    low, high = ratio_bounds("clip_cov", clip_low, clip_high)
    if not covariance_min < covariance_max:
        raise ValueError(
            f"clip_cov.covariance_min = {covariance_min}; expected a number below covariance_max = "
            f"{covariance_max}"
        )

    def is_candidate(tokens: Tokens, means: _Means) -> Array:
        advantage_BT, covariance_BT = tokens.advantage_BT, _covariance(tokens, means)
        is_open_BT = (advantage_BT == 0) | is_kept(ratio(tokens), advantage_BT, low, high)
        is_between_BT = (covariance_BT > covariance_min) & (covariance_BT < covariance_max)
        return tokens.is_response_BT & is_open_BT & is_between_BT

    def prepare(tokens, updates):
        means = _means(tokens)
        candidates = jnp.maximum(is_candidate(tokens, means).sum(), 1)
        return means, _quota(share, tokens) / candidates

    def coefficient(tokens, updates, stats):
        means, probability = stats
        key = jax.random.fold_in(jax.random.key(seed), updates)
        is_drawn_BT = _draws(key, tokens, "clip_cov") < probability
        is_chosen_BT = is_candidate(tokens, means) & is_drawn_BT
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        weight_BT, value_BT = clipped(ratio_BT, advantage_BT, low, high)
        return weight_only(
            jnp.where(is_chosen_BT, 0, weight_BT),
            jnp.where(is_chosen_BT, 0, -advantage_BT * value_BT),
            covariance_share=mean_over(is_chosen_BT, tokens.is_response_BT),
        )

    return Objective(
        coefficient,
        prepare,
        init=lambda: jnp.zeros((), jnp.int32),
        update=lambda updates, stats: updates + 1,
    )


def _draws(key: Array, tokens: Tokens, rule: str) -> Array:
    """A number from 0 to 1 for each token, by what it is; ``[B, T]``.

    The sampler's log-probability tells the answers of a prompt apart. The trainer's own would do so
    too, but rounds anew for every layout of rows and devices.
    """
    group_BT = require(tokens, "group_id_BT", rule)
    position_BT = require(tokens, "position_BT", rule)
    logp_BT = require(tokens, "sampler_logp_BT", rule).astype(jnp.float32)
    bits_BT = jax.lax.bitcast_convert_type(logp_BT, jnp.uint32)

    def draw(*identity: Array) -> Array:
        named = key
        for number in identity:
            named = jax.random.fold_in(named, number)
        return jax.random.uniform(named)

    return jnp.vectorize(draw)(group_BT, position_BT, bits_BT)
