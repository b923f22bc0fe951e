"""Rules whose tokens depend on each other: sums, extremes and groups of the whole mini-batch.

What they must know of it is gathered in `prepare`, by a forward pass of its own before the update,
so that no result depends on how the rows are split, packed or placed. Published code gathers it
from each micro-batch instead: `per_microbatch` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import clipped, is_free
from aspo_jax.losses.objective import (
    ANCHORS,
    Coefficient,
    Objective,
    accurate,
    choose,
    log_ratio,
    ratio,
    ratio_bounds,
    require,
    require_above_one,
    require_positive,
    require_share,
    weight_only,
)
from aspo_jax.losses.report import mean_over
from aspo_jax.losses.segment import of_group, segment_count, segment_mean, sums_per_group
from aspo_jax.structs import Tokens

# The bounds and targets that BAPO's authors name in three places, which do not agree.
BAPO_PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "paper": {},  # as the README gives them: the defaults
    "repository": {"ratio_min_end": 0.8, "ratio_max_end": 2.0},
    "script": {
        "share": 1 / 3,
        "ratio_min_start": 0.8,
        "ratio_min_end": 0.95,
        "ratio_max_end": 2.0,
        "step": 0.1,
    },
}


def bapo(
    *,
    share: float = 0.5,
    ratio_min_start: float = 0.6,
    ratio_min_end: float = 0.9,
    ratio_max_start: float = 1.2,
    ratio_max_end: float = 3.0,
    step: float = 0.05,
    dual_cap: float = 3.0,
) -> Objective:
    """BAPO: clip bounds that every update chooses so that positive tokens have their share.

        P(high) = sum over A > 0 of min(r, high) A       N(low) = sum over A < 0 of max(r, low) |A|
        low  = ratio_min_start if P / (P + N) >= share with both bounds at their start
               else ratio_min_end
        high = the first of ratio_max_start, + step, ..., ratio_max_end
               with P / (P + N) >= share, else the last
        A > 0:  w = r  if r <= high             else 0
        A < 0:  w = r  if low <= r <= dual_cap  else 0

    Published surrogate: ``max(-A r, -A clip(r, low, high))``, for A < 0 at most ``-A dual_cap``.

    share: least share of the positive tokens in P + N, from 0 to 1. The code's target is the ratio
        P / N: share = target / (1 + target).
    ratio_min_start, ratio_min_end: range of the lower bound, absolute ratios from 0 to 1.
    ratio_max_start, ratio_max_end: range of the upper bound, absolute ratios of at least 1.
    step: distance of two upper bounds that are tried, above 0.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient.

    `BAPO_PUBLISHED` has the three settings that the authors name: "paper" (their README, the
    defaults; it gives no step), "repository" and "script". N as published grows with the lower
    bound, so that raising the bound can never reach the target: where the start misses it, the
    search ends at ratio_min_end, whatever its step. That the paper counts the same is unverified.
    Costs a forward pass. Metrics: ``ratio_low``, ``ratio_high``, the bounds that were chosen.
    Another BAPO ("Buffer Matters", arXiv 2602.20722) is a different rule.
    Source: arXiv 2510.18927; the authors' code, which gathers P and N from each micro-batch.
    Confidence: high: the authors' code
    """
    require_share("bapo", share=share, ratio_min_start=ratio_min_start, ratio_min_end=ratio_min_end)
    require_positive("bapo", step=step)
    require_above_one("bapo", dual_cap=dual_cap)
    if ratio_min_start > ratio_min_end:
        raise ValueError(
            f"bapo.ratio_min_start = {ratio_min_start}; expected at most ratio_min_end = "
            f"{ratio_min_end}"
        )
    if not 1 <= ratio_max_start <= ratio_max_end < math.inf:
        raise ValueError(
            f"bapo.ratio_max_start = {ratio_max_start}; expected a ratio from 1 to ratio_max_end = "
            f"{ratio_max_end}, which is finite"
        )
    steps = math.ceil((ratio_max_end - ratio_max_start) / step - 1e-9)
    highs = [min(ratio_max_start + i * step, ratio_max_end) for i in range(steps + 1)]

    def prepare(tokens, state):
        ratio_BT, advantage_BT = ratio(tokens), accurate(tokens.advantage_BT)
        up_BT, down_BT = jnp.maximum(advantage_BT, 0), jnp.maximum(-advantage_BT, 0)
        high_H = jnp.asarray(highs, ratio_BT.dtype)
        positive_H = jax.lax.map(lambda high: (jnp.minimum(ratio_BT, high) * up_BT).sum(), high_H)

        def negative(low: float) -> Array:
            return (jnp.maximum(ratio_BT, low) * down_BT).sum()

        def is_met(positive: Array, negative: Array) -> Array:
            return positive >= share * (positive + negative)

        is_met_at_start = is_met(positive_H[0], negative(ratio_min_start))
        low = jnp.where(is_met_at_start, ratio_min_start, ratio_min_end).astype(ratio_BT.dtype)
        is_met_H = is_met(positive_H, jnp.where(is_met_at_start, 0, negative(ratio_min_end)))
        return low, high_H[jnp.where(is_met_H.any(), jnp.argmax(is_met_H), steps)]

    def coefficient(tokens, state, stats):
        low, high = stats
        ratio_BT, is_response_BT = ratio(tokens), tokens.is_response_BT
        weight_BT, value_BT = clipped(ratio_BT, tokens.advantage_BT, low, high, dual_cap)
        return weight_only(
            weight_BT,
            -tokens.advantage_BT * value_BT,
            ratio_low=mean_over(jnp.full_like(ratio_BT, low), is_response_BT),
            ratio_high=mean_over(jnp.full_like(ratio_BT, high), is_response_BT),
        )

    return Objective(coefficient, prepare)


_P3O_LIMIT = 10.0  # nats, the authors' clamp of the exponent in their KL estimate


def p3o(*, anchor: Literal["old", "sampler"] = "sampler") -> Objective:
    """P3O ("Trust the Batch"): capped, and pulled back, by the effective sample size.

        ESS = (sum r)^2 / (n sum r^2) over the n response tokens of the mini-batch
        w = min(r, ESS)
        b = -(1 - ESS) (1 - 1/r)  if |log r| <= 10  else 0

    Surrogate: ``-A sg(w) log pi + (1 - ESS) (1/r - 1 + log r)``, the k3 estimate of KL(pi || old).

    anchor: what r compares pi with: the "sampler" that drew the token, as the authors do, or the
        "old" policy.

    Nothing is to be tuned. One ratio at the clamp of e^20 brings the ESS of n tokens down to about
    1/n: every weight with it. The authors clamp only the exponent -log r, to +-10: a token that
    lost more than 10 nats is then pushed further down, and one that gained more still pulled back.
    Here neither has a pull. They also add 1e-8 to the ESS.
    Needs ``sampler_logp_BT`` with its anchor. Costs a forward pass. Metric: ``ess``.
    Source: arXiv 2605.12380; the authors' code (FeynRL), which takes the ESS of each micro-batch.
    Confidence: high: the authors' code
    """
    choose(ANCHORS, anchor, "p3o.anchor")

    def prepare(tokens, state):
        ratio_BT = ratio(tokens, anchor, "p3o")
        ratio_BT = jnp.where(tokens.is_response_BT, ratio_BT, 0)
        divisor = tokens.is_response_BT.sum() * jnp.square(ratio_BT).sum()
        ess = jnp.square(ratio_BT.sum()) / jnp.where(divisor > 0, divisor, 1)
        return jnp.minimum(ess, 1)  # rounding

    def coefficient(tokens, state, ess):
        log_ratio_BT = log_ratio(tokens, anchor, "p3o")
        weight_BT = jnp.minimum(jnp.exp(log_ratio_BT), ess)
        clamped_BT = jnp.clip(log_ratio_BT, -_P3O_LIMIT, _P3O_LIMIT)
        excess_BT = jnp.expm1(-clamped_BT)  # 1/r - 1
        is_free_BT = jnp.abs(log_ratio_BT) <= _P3O_LIMIT
        value_BT = -tokens.advantage_BT * weight_BT * accurate(tokens.logp_BT)
        return Coefficient(
            weight_BT=weight_BT,
            bias_BT=(1 - ess) * jnp.where(is_free_BT, excess_BT, 0),
            metrics={"ess": mean_over(jnp.full_like(weight_BT, ess), tokens.is_response_BT)},
            surrogate_BT=value_BT + (1 - ess) * (excess_BT + clamped_BT),
        )

    return Objective(coefficient, prepare)


_LEAST_ENTROPY = 1e-8  # nats; the authors' floor under the logarithm, and under an extreme


def hapo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_cap: float = 10.0,
    quantile: float = 0.8,
    code_sign: bool = False,
) -> Objective:
    """HAPO: clip widths and advantages by how a token's entropy ranks in the mini-batch.

        x = log entropy, p = its quantile over the mini-batch (nearest rank)
        h = (x - p) / max(x - p)  if x > p  else  (x - p) / max(p - x)           -1 <= h <= 1
        h <= 0:  el = clip_low (1 - h),  eh = clip_high
        h > 0:   el = clip_low,          eh = clip_high (1 + h)
        f = 1 + h  if 1 - el/2 < r < 1 + eh/2 and h <= 0, or outside of it and h > 0;  else 1
        A > 0:  w = f r  if r <= 1 + eh              else 0
        A < 0:  w = f r  if 1 - el <= r <= dual_cap  else 0

    Published surrogate: PPO's with these bounds and the advantage ``f A``.

    clip_low: half of the largest width below 1, 0 to 1.
    clip_high: half of the largest width above 1, 0 or more.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient.
    quantile: the pivot p, from 0 to 1.
    code_sign: the released code divides by the lowest x - p, which is negative: its low-entropy
        tokens get |h|, the least uncertain of them the widest upper bound. True does as it does.

    The weight at ratio 1 is 1 + h for low-entropy tokens: 0 for the lowest of all. Entropies are
    floored at 1e-8 nats, and one token there (x = -18.4) leaves all others an h near 0. The
    published division by the root mean square cancels and is left out. The paper's advantage
    (mean and deviation over the group's tokens) and its sampling temperature are no part of this.
    Needs ``entropy_BT``. Costs a forward pass.
    Source: arXiv 2509.16591; the authors' code, which ranks within each micro-batch.
    Confidence: high: the authors' code; the sign of h is the paper's, medium
    """
    ratio_bounds("hapo", clip_low, clip_high)
    require_share("hapo", quantile=quantile)
    require_above_one("hapo", dual_cap=dual_cap)

    def log_entropy(tokens: Tokens) -> Array:
        entropy_BT = accurate(require(tokens, "entropy_BT", "hapo"))
        return jnp.log(jnp.maximum(entropy_BT, _LEAST_ENTROPY))

    def prepare(tokens, state):
        x_BT, is_response_BT = log_entropy(tokens), tokens.is_response_BT
        last = jnp.maximum(is_response_BT.sum() - 1, 0).astype(x_BT.dtype)
        in_order = jnp.sort(jnp.where(is_response_BT, x_BT, jnp.inf).ravel())
        pivot = in_order[jnp.round(quantile * last).astype(jnp.int32)]
        gap_BT = jnp.where(is_response_BT, x_BT - pivot, 0)
        return pivot, *(jnp.maximum(side.max(), _LEAST_ENTROPY) for side in (gap_BT, -gap_BT))

    def coefficient(tokens, state, stats):
        pivot, above, below = stats
        gap_BT = log_entropy(tokens) - pivot
        h_BT = jnp.where(gap_BT > 0, gap_BT / above, gap_BT / below)
        h_BT = jnp.abs(h_BT) if code_sign else h_BT
        is_low_BT = h_BT <= 0
        width_low_BT = clip_low * jnp.where(is_low_BT, 1 - h_BT, 1)
        width_high_BT = clip_high * jnp.where(is_low_BT, 1, 1 + h_BT)
        ratio_BT, advantage_BT = ratio(tokens), tokens.advantage_BT
        is_near_BT = (ratio_BT > 1 - width_low_BT / 2) & (ratio_BT < 1 + width_high_BT / 2)
        factor_BT = jnp.where(is_near_BT == is_low_BT, 1 + h_BT, 1)
        weight_BT, value_BT = clipped(
            ratio_BT, advantage_BT, 1 - width_low_BT, 1 + width_high_BT, dual_cap
        )
        return weight_only(factor_BT * weight_BT, -advantage_BT * factor_BT * value_BT)

    return Objective(coefficient, prepare)


def real(*, tau: float = 0.5) -> Objective:
    """Experimental: REAL, which tells the right from the wrong answers of a group by their ratios.

        s_i = mean_t(log r) / tau over response i;  right: A > 0, wrong: all others of its group
        w = 0
        b =  (N / groups) / tau e^-s / (1 + sum over the right ones of e^-s)   on right answers
        b = -(N / groups) / tau e^s  / (1 + sum over the wrong ones of e^s)    on wrong answers
        b = 0 in a group that has not both

    N is the number of responses: goes with ``sequence_mean``, whose 1/N it cancels. Published loss
    of a group: ``log(1 + sum_wrong e^s) + log(1 + sum_right e^-s)``, averaged over all groups.

    tau: temperature of the mean log-ratio, nats, above 0.

    Of the advantage only its sign enters. A group must not be divided between mini-batches; here
    none is. A token beyond the clamp of 20 nats has no gradient.
    Needs ``group_id_BT``. Costs a forward pass.
    Unverified: the paper's text and the authors' code were not read; also whether its groups of
    unequal size count alike, as they do here. Other methods are called REAL.
    Source: arXiv 2602.05630; the port in ms-swift 4.6.0 (``loss_type="real"``).
    Confidence: medium: one port
    """
    require_positive("real", tau=tau)

    def parts(tokens: Tokens) -> tuple[Array, Array, Array]:
        log_ratio_BT = log_ratio(tokens)
        s_BT = segment_mean(log_ratio_BT, tokens) / tau
        is_right_BT = tokens.advantage_BT > 0
        return jnp.exp(jnp.where(is_right_BT, -s_BT, s_BT)), is_right_BT, jnp.exp(log_ratio_BT)

    def prepare(tokens, state):
        group_id_BT = require(tokens, "group_id_BT", "real")
        odds_BT, is_right_BT, _ = parts(tokens)
        share_BT = 1 / segment_count(tokens).astype(odds_BT.dtype)  # sums count responses
        members_K = sums_per_group(share_BT, group_id_BT, tokens)
        right_K, wrong_K = (
            sums_per_group(jnp.where(is_BT, odds_BT * share_BT, 0), group_id_BT, tokens)
            for is_BT in (is_right_BT, ~is_right_BT)
        )
        is_there_K = members_K > 0.5
        has_both_K = (right_K > 0) & (wrong_K > 0)
        size = members_K.sum() / jnp.maximum(is_there_K.sum(), 1)
        loss_K = jnp.where(has_both_K, jnp.log1p(right_K) + jnp.log1p(wrong_K), 0)
        slope_right_K, slope_wrong_K = (
            jnp.where(has_both_K, size / tau / (1 + sum_K), 0) for sum_K in (right_K, wrong_K)
        )
        value_K = size * loss_K / jnp.where(is_there_K, members_K, 1)
        return {"right": slope_right_K, "wrong": slope_wrong_K, "value": value_K}

    def coefficient(tokens, state, stats):
        group_id_BT = require(tokens, "group_id_BT", "real")
        odds_BT, is_right_BT, ratio_BT = parts(tokens)
        own = {name: of_group(table_K, group_id_BT) for name, table_K in stats.items()}
        slope_BT = jnp.where(is_right_BT, own["right"], -own["wrong"])
        bias_BT = jnp.where(is_free(ratio_BT), slope_BT * odds_BT, 0)
        return Coefficient(jnp.zeros_like(bias_BT), bias_BT, {}, own["value"])

    return Objective(coefficient, prepare)
