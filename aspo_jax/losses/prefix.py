"""Rules whose weight is read off the tokens before or behind: prefix ratios, future influence."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp

from aspo_jax.losses.clip import clipped, gate
from aspo_jax.losses.objective import (
    Objective,
    accurate,
    choose,
    log_ratio,
    ratio,
    ratio_bounds,
    require,
    require_positive,
    weight_only,
)
from aspo_jax.losses.segment import earlier_min, running_sum

PREFIX_LIMIT = 10.0  # the reference clamps a prefix's log-ratio from above there
# How a prefix's log-ratio comes from the sum over its tokens and their number.
PREFIXES = {"product": lambda sum_BT, count_BT: sum_BT, "mean": jnp.divide}


def ctpo(
    *,
    clip_low: float = 0.025,
    clip_high: float = 0.05,
    dual_cap: float = 0.05,
    power: float = 0.5,
    prefix: Literal["product", "mean"] = "product",
) -> Objective:
    """CTPO-LA: the ratio of the prefix up to a token, bounds that widen with its position.

        R_t = exp(sum_{u <= t} log r_u), t = 1, 2, ... over the response's tokens
        A > 0:  w = R_t  if log R_t <= clip_high t^power  else 0
        A < 0:  w = R_t  if -clip_low t^power <= log R_t <= dual_cap t^power  else 0

    Published surrogate: PPO's with dual clip, of R_t with the earlier tokens held constant (each
    token's gradient is its own). Goes with ``token_mean``.

    clip_low, clip_high: bounds of log R at the first token, nats, above 0.
    dual_cap: the upper bound of negative tokens there, nats, above 0.
    power: how the bounds grow with t: 0.5 as the spread of a sum does, -0.5 of a mean, 0 not.
    prefix: R is the "product" of the prefix's ratios or their geometric "mean" (with power -0.5).
    With the default dual_cap a negative token has a window on both sides, unlike in PPO. The window
    is 0.975 to 1.05 at t = 1 and 0.78 to 1.65 at t = 100. A prefix beyond 10 nats has weight 0.
    The fixed window of CTPO without LA is ``power=0`` with ``clip_low = -log(1 - 0.2)`` and so on.
    The authors also multiply by the whole response's old-to-sampler ratio, at most 5.
    Needs ``position_BT``.
    Source: arXiv 2605.07331; the authors' core_algos.py (horizon-llm/CTPO).
    Confidence: high: the authors' code.
    """
    require_positive("ctpo", clip_low=clip_low, clip_high=clip_high, dual_cap=dual_cap)
    of_prefix = choose(PREFIXES, prefix, "ctpo.prefix")

    def coefficient(tokens, state, stats):
        advantage_BT, log_ratio_BT = tokens.advantage_BT, log_ratio(tokens)
        count_BT = (require(tokens, "position_BT", "ctpo") + 1).astype(log_ratio_BT.dtype)
        prefix_BT = of_prefix(running_sum(log_ratio_BT, tokens), count_BT)
        scale_BT = count_BT**power
        low_BT, high_BT, cap_BT = (scale_BT * x for x in (-clip_low, clip_high, dual_cap))
        is_kept_BT, held_BT = gate(prefix_BT, advantage_BT, low_BT, high_BT, cap_BT)
        is_kept_BT = is_kept_BT & (prefix_BT <= PREFIX_LIMIT)
        value_BT = jnp.exp(jnp.minimum(held_BT, PREFIX_LIMIT))
        return weight_only(jnp.where(is_kept_BT, value_BT, 0), -advantage_BT * value_BT)

    return Objective(coefficient)


def fipo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    half_life: float = 32.0,
    influence_min: float = 1.0,
    influence_max: float = 1.2,
    safety_ratio: float = 4.0,
    dual_cap: float | None = None,
) -> Objective:
    """Experimental: FIPO, PPO's weight times the influence of what follows; with ``token_mean``.

        F_t = sum_{k >= t} 2^(-(k - t) / half_life) log r_k over the response's tokens
        f_t = clip(exp(F_t), influence_min, influence_max)
        f_t = clip(f_t, 0.8, 1)  if A < 0 and r_t > safety_ratio
        w = f r [PPO's gate, with a hard dual clip at dual_cap]

    Published surrogate: ``sg(f)`` times that of `ppo_clip`. f is 1 on the first mini-batch after a
    rollout. A token's own log-ratio is part of its future.

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    half_life: distance in response tokens at which a log-ratio counts half, above 0.
    influence_min, influence_max: bounds of f, above 0. At influence_min = 1 (the reference's
        "high only") f never damps, unless by the safety rule.
    safety_ratio: a negative token beyond this ratio, above 0, is never amplified.
    dual_cap: a ratio above 1 + clip_high, beyond which a negative token has no gradient and any
        token is left out of F; ``float("inf")``: none. The authors' 32B script has 10.
    Unlike in one of the ports, responses with several dual-clipped tokens are not dropped.
    Source: arXiv 2603.19835; ms-swift ``loss_type="fipo"``.
    Confidence: medium: two agreeing ports.
    """
    low, high = ratio_bounds("fipo", clip_low, clip_high)
    require_positive("fipo", half_life=half_life, safety_ratio=safety_ratio)
    require_positive("fipo", influence_min=influence_min, influence_max=influence_max)
    if influence_min > influence_max:
        raise ValueError(
            f"fipo.influence_min = {influence_min}; expected at most fipo.influence_max = "
            f"{influence_max}"
        )
    cap = math.inf if dual_cap is None else dual_cap
    if not cap > high:
        raise ValueError(f"fipo.dual_cap = {dual_cap}; expected a ratio above 1 + fipo.clip_high")
    bounds = math.log(influence_min), math.log(influence_max)

    def coefficient(tokens, state, stats):
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        counted_BT = jnp.where(ratio_BT > cap, 0, log_ratio(tokens))
        future_BT = running_sum(counted_BT, tokens, decay=2 ** (-1 / half_life), reverse=True)
        influence_BT = jnp.exp(jnp.clip(future_BT, *bounds))
        is_unsafe_BT = (advantage_BT < 0) & (ratio_BT > safety_ratio)
        influence_BT = jnp.where(is_unsafe_BT, jnp.clip(influence_BT, 0.8, 1), influence_BT)
        weight_BT, value_BT = clipped(ratio_BT, advantage_BT, low, high, cap)
        return weight_only(influence_BT * weight_BT, -advantage_BT * influence_BT * value_BT)

    return Objective(coefficient)


def minpro(*, ratio_max: float = 5.0) -> Objective:
    """Experimental: MinPRO, a token's ratio times the smallest ratio before it.

        w = min(r_t m_t, ratio_max)        m_t = min_{u < t} r_u over the response, 1 at its first

    Surrogate: ``-A sg(w) log pi``; goes with ``token_mean``. No token loses its gradient. In place
    of the product over the prefix, which is the exact correction and explodes.

    ratio_max: largest weight, above 0; ours, as in `cispo`.
    Unverified: the bounds of the weight, the surrogate that it stands in, and whether m is at most
    1 (here it is not: after three tokens of ratio 2 the fourth counts double).
    Source: arXiv 2601.22718.
    Confidence: low: abstract only.
    """
    require_positive("minpro", ratio_max=ratio_max)

    def coefficient(tokens, state, stats):
        log_ratio_BT = log_ratio(tokens)
        least_BT = earlier_min(log_ratio_BT, tokens)
        least_BT = jnp.where(jnp.isinf(least_BT), 0, least_BT)
        weight_BT = jnp.minimum(jnp.exp(log_ratio_BT + least_BT), ratio_max)
        return weight_only(weight_BT, -tokens.advantage_BT * weight_BT * accurate(tokens.logp_BT))

    return Objective(coefficient)
