"""Weights that bend where PPO cuts: soft gates, a quadratic pull towards ratio 1, surprise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from aspo_jax.losses.clip import is_free, ratio_weight
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    accurate,
    log_ratio,
    ratio,
    require_non_negative,
    require_positive,
    weight_only,
)
from aspo_jax.losses.report import mean_over


def sapo(*, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Objective:
    """SAPO, Soft Adaptive Policy Optimization: a sigmoid gate; goes with ``sequence_mean``.

        w = 4 p (1 - p) r        p = sigmoid(tau (r - 1)), tau by the sign of A

    Published surrogate: ``-A (4 / tau) p``.

    tau_positive, tau_negative: how fast the gate closes, per unit of ratio, above 0.

    The weight does not fall with r alone: at tau 1 it grows to 1.58 at r = 2.06, and is 0.35 at 5.
    Source: arXiv 2511.20347.
    Confidence: medium: five agreeing ports (verl, TRL, ms-swift, AReaL, SkyRL).
    """
    require_positive("sapo", tau_positive=tau_positive, tau_negative=tau_negative)

    def coefficient(tokens, state, stats):
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        tau_BT = jnp.where(advantage_BT > 0, tau_positive, tau_negative).astype(ratio_BT.dtype)
        x_BT = tau_BT * (ratio_BT - 1)
        gate_BT = jax.nn.sigmoid(x_BT)
        weight_BT = 4 * gate_BT * jax.nn.sigmoid(-x_BT) * ratio_weight(ratio_BT)
        return weight_only(weight_BT, -advantage_BT * 4 / tau_BT * gate_BT)

    return Objective(coefficient)


def mhpo(
    *,
    c: float = 1.5,
    k_up: float = 1.5,
    lam_up: float = 1.0,
    k_down: float = 2.0,
    lam_down: float = 0.8,
    normalize_at_one: bool = False,
) -> Objective:
    """Experimental: MHPO, a bounded log-ratio damped by hazards; goes with ``sequence_mean``.

        psi  = c tanh(log r / c)
        zeta = (softplus(psi) / lam_up)^k_up + (softplus(-psi) / lam_down)^k_down
        w    = exp(psi - zeta) (1 - tanh(log r / c)^2)

    Published surrogate: ``-A exp(psi - sg(zeta))``, for both signs of A, without a clip.

    c: largest |psi| in nats, above 0.
    k_up, k_down: how sharply the damping sets in as a token becomes more or less likely, above 0.
    lam_up, lam_down: where it does, in nats, above 0.
    normalize_at_one: divide by the weight at r = 1. It is 0.2651 with the defaults, for
        softplus(0) is ln 2 and not 0; so the step is a quarter of other rules' at one learning
        rate, and 0.40 at r = 1.78 is the largest weight.
    Unverified: the paper was not read; `normalize_at_one` is not in it.
    Source: arXiv 2603.16929 §4.1, after two independent notes.
    Confidence: medium: two agreeing third parties.
    """
    require_positive("mhpo", c=c, k_up=k_up, lam_up=lam_up, k_down=k_down, lam_down=lam_down)
    ln2 = math.log(2)
    at_one = math.exp(-((ln2 / lam_up) ** k_up) - (ln2 / lam_down) ** k_down)
    scale = 1 / at_one if normalize_at_one else 1.0

    def coefficient(tokens, state, stats):
        log_ratio_BT = log_ratio(tokens)
        bent_BT = jnp.tanh(log_ratio_BT / c)
        psi_BT = c * bent_BT
        up_BT, down_BT = jax.nn.softplus(psi_BT), jax.nn.softplus(-psi_BT)
        zeta_BT = (up_BT / lam_up) ** k_up + (down_BT / lam_down) ** k_down
        value_BT = scale * jnp.exp(psi_BT - zeta_BT)
        slope_BT = jnp.where(is_free(jnp.exp(log_ratio_BT)), 1 - jnp.square(bent_BT), 0)
        return weight_only(value_BT * slope_BT, -tokens.advantage_BT * value_BT)

    return Objective(coefficient)


def r2vpo(*, lam: float = 0.04, delta: float | None = None, dual_lr: float = 0.0) -> Objective:
    """Experimental: R2VPO, the ratio's variance held by a Lagrange multiplier, without a clip.

        w = r        b = -2 lam r (r - 1)
        after each update:  lam <- max(0, lam + dual_lr (mean (r - 1)^2 - delta))

    Published surrogate: ``-A r + lam (r - 1)^2``. A token of advantage A is pushed back beyond
    ``r = 1 + A / (2 lam)``: 13.5 at A = 1 and the default lam.

    lam: price of the variance, 0 or more; where it starts if it is learned.
    delta: the variance that is aimed at, 0 or more; needed, and used, only where dual_lr > 0.
    dual_lr: step of lam, 0 or more; 0 keeps lam as it is. Above 0 lam is part of the checkpoint,
        and each update costs one more forward pass, over its mini-batch, for the mean before it.

    One token far away rules that mean (e^10 counts 5e8): choose dual_lr by ``ratio_variance``.
    Metrics: ``ratio_variance``, mean of (r - 1)^2; ``dual_lam``, lam, where dual_lr > 0.
    Unverified: how lam is updated, delta, and whether the paper's lam is twice this one.
    Source: arXiv 2601.03320 and 2605.26784; lam 0.04 from a third-party implementation.
    Confidence: low: two third-party implementations and the abstract.
    """
    require_non_negative("r2vpo", lam=lam, dual_lr=dual_lr)
    if delta is not None:
        require_non_negative("r2vpo", delta=delta)
    elif dual_lr:
        raise ValueError("r2vpo.delta = None; expected a number >= 0, for dual_lr is above 0")

    def prepare(tokens, state):
        variance = mean_over(jnp.square(ratio(tokens) - 1), tokens.is_response_BT)
        return (variance.total / jnp.maximum(variance.count, 1)).astype(jnp.float32)

    def coefficient(tokens, state, stats):
        price, ratio_BT = state if dual_lr else lam, ratio(tokens)
        weight_BT, square_BT = ratio_weight(ratio_BT), jnp.square(ratio_BT - 1)
        metrics = {"ratio_variance": mean_over(square_BT, tokens.is_response_BT)}
        if dual_lr:
            price_BT = jnp.full_like(ratio_BT, price)
            metrics["dual_lam"] = mean_over(price_BT, tokens.is_response_BT)
        return Coefficient(
            weight_BT,
            -2 * price * weight_BT * (ratio_BT - 1),
            metrics,
            -tokens.advantage_BT * ratio_BT + price * square_BT,
        )

    if not dual_lr:
        return Objective(coefficient)
    return Objective(
        coefficient,
        prepare,
        init=lambda: jnp.float32(lam),
        update=lambda price, variance: jnp.maximum(price + dual_lr * (variance - delta), 0),
    )


def delightful(*, eta: float = 1.0) -> Objective:
    """Experimental: Delightful policy gradient, a gate by advantage times surprise; no ratio.

        w = sigmoid(A (-log pi) / eta)        surrogate: -A sg(w) log pi

    A surprising right token counts fully, a surprising wrong one hardly; goes with ``token_mean``.

    eta: advantage times nats at which the gate is 0.73, above 0.

    The weight at ratio 1 is not 1: it is 0.5 for a certain token and tends to 1 or 0 by the sign
    of A for a surprising one. The scale of A matters: z-scored and centred rewards are two rules.
    Unverified: eta for language models; the paper's own experiments are elsewhere.
    Source: arXiv 2603.14608.
    Confidence: medium: a third-party study and the abstract agree on the gate; low for eta.
    """
    require_positive("delightful", eta=eta)

    def coefficient(tokens, state, stats):
        advantage_BT, logp_BT = tokens.advantage_BT, accurate(tokens.logp_BT)
        weight_BT = jax.nn.sigmoid(-advantage_BT * logp_BT / eta)
        return weight_only(weight_BT, -advantage_BT * weight_BT * logp_BT)

    return Objective(coefficient)
