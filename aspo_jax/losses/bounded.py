"""Ratios with bounds of their own: kept at them, by the sign of the advantage, by probability."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import (
    clipped,
    hard_cap,
    is_kept,
    no_cap,
    pick_by_sign,
    ratio_weight,
)
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    accurate,
    choose,
    ratio,
    ratio_bounds,
    require_above_one,
    require_non_negative,
    require_positive,
    require_share,
    weight_only,
)
from aspo_jax.structs import Tokens


def ce_gppo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta_low: float = 0.5,
    beta_high: float = 1.0,
    dual_cap: float = 10.0,
) -> Objective:
    """CE-GPPO: a clipped token keeps a gradient, the bound itself times a factor per side.

        A > 0:  w = beta_high (1 + clip_high)  if r > 1 + clip_high  else r
        A < 0:  w = beta_low (1 - clip_low)    if r < 1 - clip_low   else r, but 0 if r > dual_cap

    Published surrogate: PPO's, with ``beta bound r / sg(r)`` in place of the clipped ratio. Goes
    with ``token_mean``; published together with ``nll_bonus``.

    clip_low: bound of negative tokens, a width below 1; 0 to 1.
    clip_high: bound of positive tokens, a width above 1; 0 or more.
    beta_low, beta_high: share of its bound that a clipped negative or positive token keeps, 0 or
        more. Published for beta_low: 0.5 with a model of 1.5 billion parameters, 0.75 with 7.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient; the paper's equation
        has no such case, the code has.
    Source: arXiv 2509.20712; published names beta1 (low), beta2 (high).
    Confidence: high: the authors' code.
    """
    low, high = ratio_bounds("ce_gppo", clip_low, clip_high)
    require_non_negative("ce_gppo", beta_low=beta_low, beta_high=beta_high)
    require_above_one("ce_gppo", dual_cap=dual_cap)

    def coefficient(tokens, state, stats):
        advantage_BT, logp_BT = tokens.advantage_BT, accurate(tokens.logp_BT)
        ratio_BT = ratio(tokens)
        free = pick_by_sign(
            advantage_BT,
            positive=no_cap(ratio_BT, logp_BT, dual_cap),
            negative=hard_cap(ratio_BT, logp_BT, dual_cap),
        )
        is_kept_BT = is_kept(ratio_BT, advantage_BT, low, high)
        bound_BT = jnp.where(advantage_BT > 0, beta_high * high, beta_low * low)
        return weight_only(
            jnp.where(is_kept_BT, free.weight_BT, bound_BT),
            -advantage_BT * jnp.where(is_kept_BT, free.value_BT, bound_BT),
        )

    return Objective(coefficient)


def gppo(*, clip_low: float = 0.2, clip_high: float = 0.28, dual_cap: float = 10.0) -> Objective:
    """GPPO of Klear-Reasoner: `ce_gppo` whose clipped tokens keep the whole bound as weight.

        A > 0:  w = min(r, 1 + clip_high)
        A < 0:  w = max(r, 1 - clip_low)  if r <= dual_cap  else 0

    Published surrogate: PPO's, with ``bound r / sg(r)`` in place of the clipped ratio. Goes with
    ``token_mean``; published together with ``nll_bonus``.

    clip_low: bound of negative tokens, a width below 1; 0 to 1.
    clip_high: bound of positive tokens, a width above 1; 0 or more.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient; the paper's equation
        has no such case, the code has.

    `cispo` with these bounds differs: it clips on both sides whatever the sign of A.
    Source: arXiv 2508.07629 Eqs. 11-18.
    Confidence: high: the paper and the authors' code.
    """
    ratio_bounds("gppo", clip_low, clip_high)
    require_above_one("gppo", dual_cap=dual_cap)
    return ce_gppo(
        clip_low=clip_low, clip_high=clip_high, beta_low=1.0, beta_high=1.0, dual_cap=dual_cap
    )


def nll_bonus(*, coef: float = 0.1) -> Objective:
    """Likelihood of right answers (Klear-Reasoner, CE-GPPO), to chain behind a rule.

        w = 1        b = coef (tokens / tokens with A > 0)  if A > 0  else 0

    Published loss: ``-coef log pi``, averaged over the tokens of right answers alone: the factor in
    b is of the whole mini-batch, exact under ``token_mean``. A right answer is one with A > 0, as
    it is in every group with both kinds of answers.

    coef: weight of the term, per nat, 0 or more.

    The paper prints pi for log pi; the code has log pi. Costs a forward pass, for the two counts.
    Source: arXiv 2508.07629 Eq. 13 and arXiv 2509.20712.
    Confidence: high: the authors' code.
    """
    require_non_negative("nll_bonus", coef=coef)

    def prepare(tokens, state):
        is_right_BT = tokens.is_response_BT & (tokens.advantage_BT > 0)
        return tokens.is_response_BT.sum(), is_right_BT.sum()

    def coefficient(tokens, state, stats):
        logp_BT, (count, right) = accurate(tokens.logp_BT), stats
        scale = coef * count / jnp.maximum(right, 1)
        bias_BT = jnp.where(tokens.advantage_BT > 0, scale, 0).astype(logp_BT.dtype)
        return Coefficient(jnp.ones_like(logp_BT), bias_BT, {}, -bias_BT * logp_BT)

    return Objective(coefficient, prepare)


def dispo(
    *,
    clip_low_positive: float,
    clip_high_positive: float,
    clip_low_negative: float,
    clip_high_negative: float,
) -> Objective:
    """Experimental: DISPO, `cispo` with bounds of their own for right and for wrong answers.

        A > 0:  w = clip(r, 1 - clip_low_positive, 1 + clip_high_positive)
        A < 0:  w = clip(r, 1 - clip_low_negative, 1 + clip_high_negative)

    Surrogate: ``-A sg(w) log pi``; goes with ``token_mean``. With equal pairs it is `cispo`.

    clip_low_positive, clip_high_positive: bounds of tokens with A > 0, widths around 1.
    clip_low_negative, clip_high_negative: bounds of tokens with A < 0, widths around 1. Wide ones:
        the abstract reports collapse where either is tight.
    Unverified: all four numbers, none of which was found; so none has a default.
    Source: arXiv 2602.00983.
    Confidence: low: structure from the abstract and summaries.
    """
    require_share("dispo", clip_low_positive=clip_low_positive, clip_low_negative=clip_low_negative)
    require_non_negative(
        "dispo", clip_high_positive=clip_high_positive, clip_high_negative=clip_high_negative
    )

    def coefficient(tokens, state, stats):
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        weight_BT = jnp.where(
            advantage_BT > 0,
            jnp.clip(ratio_BT, 1 - clip_low_positive, 1 + clip_high_positive),
            jnp.clip(ratio_BT, 1 - clip_low_negative, 1 + clip_high_negative),
        )
        return weight_only(weight_BT, -advantage_BT * weight_BT * accurate(tokens.logp_BT))

    return Objective(coefficient)


def dcpo(
    *,
    clip_low: float = 0.16,
    clip_high: float = 0.2,
    ratio_max: float = 10.0,
    dual_cap: float = 10.0,
) -> Objective:
    """DCPO's dynamic clip: the less probable the token was, the farther it may go.

        low  = (1 + sqrt(max(1 - 4 clip_low / q, 0))) / 2               q = pi_old
        high = min((1 + sqrt(1 + 4 clip_high / q)) / 2, ratio_max)
        A > 0:  w = r  if r <= high             else 0
        A < 0:  w = r  if low <= r <= dual_cap  else 0

    Published surrogate: ``max(-A r, -A clip(r, low, high))`` with a hard dual clip. The bounds are
    where ``|r - 1| r q`` reaches clip_low or clip_high: [0.77, 1.19] at q = 0.9, [0.5, 5] at 0.01.

    clip_low, clip_high: bounds of ``|r - 1| r q``, a probability, above 0. The default pair is of
        the authors' table; their scripts run (0.20, 0.28).
    ratio_max: upper limit of high, an absolute ratio above 1.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient.

    The lower bound never falls below 0.5. DCPO's advantage and its mean of response means are no
    part of this rule.
    Source: arXiv 2509.02333.
    Confidence: high: the authors' code.
    """
    require_positive("dcpo", clip_low=clip_low, clip_high=clip_high)
    require_above_one("dcpo", dual_cap=dual_cap, ratio_max=ratio_max)

    def coefficient(tokens, state, stats):
        inverse_BT = 4 * jnp.exp(-accurate(tokens.old_logp_BT))
        low_BT = (1 + jnp.sqrt(jnp.maximum(1 - clip_low * inverse_BT, 0))) / 2
        high_BT = jnp.minimum((1 + jnp.sqrt(1 + clip_high * inverse_BT)) / 2, ratio_max)
        advantage_BT = tokens.advantage_BT
        weight_BT, value_BT = clipped(ratio(tokens), advantage_BT, low_BT, high_BT, dual_cap)
        return weight_only(weight_BT, -advantage_BT * value_BT)

    return Objective(coefficient)


def _capped_ratio(tokens: Tokens, cap: float) -> Array:
    """min(pi / mu, cap)."""
    return jnp.minimum(ratio(tokens, "sampler", "minirl"), cap)


def _capped_mismatch(tokens: Tokens, cap: float) -> Array:
    """r min(pi_old / mu, cap)."""
    old = dataclasses.replace(tokens, logp_BT=tokens.old_logp_BT)
    return ratio_weight(ratio(tokens)) * _capped_ratio(old, cap)


_CAPPED: Mapping[str, Callable[[Tokens, float], Array]] = {
    "ratio": _capped_ratio,
    "mismatch": _capped_mismatch,
}


def minirl(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.27,
    cap: float = 10.0,
    cap_on: Literal["ratio", "mismatch"] = "ratio",
) -> Objective:
    """Experimental: MiniRL, PPO's gate on pi / pi_old, the weight pi / mu of the sampler mu.

        A > 0:  w = min(pi / mu, cap)  if r <= 1 + clip_high  else 0        r = pi / pi_old
        A < 0:  w = min(pi / mu, cap)  if r >= 1 - clip_low   else 0

    Surrogate: ``-A sg(w) log pi``; goes with ``group_mean`` and ``sequence_sum``.

    clip_low: a negative token counts while r is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while r is at most 1 + clip_high; 0 or more.
    cap: largest weight, or largest pi_old / mu, above 0; 5 is reported with cap_on "mismatch".
    cap_on: "ratio" caps pi / mu as a whole; "mismatch" its part pi_old / mu: w = r min(rho, cap).

    PPO-EWMA whose proximal policy is pi_old: this with cap 100 and "ratio".
    Needs ``sampler_logp_BT``.
    Unverified: whether the weight has r in it, as in a baseline of the DPPO authors and here, or
        not; clip_low, for which no number was found.
    Source: arXiv 2512.01374.
    Confidence: medium: another paper's authors run it as a baseline.
    """
    low, high = ratio_bounds("minirl", clip_low, clip_high)
    require_positive("minirl", cap=cap)
    capped = choose(_CAPPED, cap_on, "minirl.cap_on")

    def coefficient(tokens, state, stats):
        advantage_BT = tokens.advantage_BT
        is_kept_BT = is_kept(ratio(tokens), advantage_BT, low, high)
        weight_BT = jnp.where(is_kept_BT, capped(tokens, cap), 0)
        return weight_only(weight_BT, -advantage_BT * weight_BT * accurate(tokens.logp_BT))

    return Objective(coefficient)
