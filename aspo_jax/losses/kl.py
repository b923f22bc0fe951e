"""KL to the frozen reference policy, as a bias to chain behind a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.aspo import is_low_entropy
from aspo_jax.losses.clip import ratio_weight
from aspo_jax.losses.objective import (
    LOG_RATIO_LIMIT,
    Coefficient,
    Objective,
    Predicate,
    accurate,
    choose,
    ratio,
    require,
    require_non_negative,
    require_positive,
)
from aspo_jax.losses.report import mean_over
from aspo_jax.structs import Tokens

EstimatorName = Literal["k1", "abs", "k2", "k3", "k3_is"]


class Estimate(NamedTuple):
    """A per-token KL estimate in nats, and its derivative with respect to log pi."""

    kl_BT: Array
    slope_BT: Array


def k1(gap_BT: Array, ratio_BT: Array, clamp: float) -> Estimate:
    """``-d``, unbiased, of either sign. Here and below d = log pi_ref - log pi."""
    return Estimate(-gap_BT, jnp.ones_like(gap_BT))


def absolute(gap_BT: Array, ratio_BT: Array, clamp: float) -> Estimate:
    """``|d|``."""
    return Estimate(jnp.abs(gap_BT), -jnp.sign(gap_BT))


def k2(gap_BT: Array, ratio_BT: Array, clamp: float) -> Estimate:
    """``d^2 / 2``."""
    return Estimate(jnp.square(gap_BT) / 2, -gap_BT)


def k3(gap_BT: Array, ratio_BT: Array, clamp: float) -> Estimate:
    """``exp(d) - d - 1``, with d clamped to +-20 and the value to +-clamp.

    Beyond a clamp the slope is exactly 0: at clamp 10 a token that lost more than 2.61 nats
    against the reference is not pulled back. DeepSeekMath, arXiv 2402.03300 Eq. 4.
    """
    d_BT = jnp.clip(gap_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    kl_BT = jnp.expm1(d_BT) - d_BT
    is_free_BT = (jnp.abs(gap_BT) <= LOG_RATIO_LIMIT) & (jnp.abs(kl_BT) <= clamp)
    return Estimate(jnp.clip(kl_BT, -clamp, clamp), jnp.where(is_free_BT, -jnp.expm1(d_BT), 0))


def k3_is(gap_BT: Array, ratio_BT: Array, clamp: float) -> Estimate:
    """``r (exp(d) - d - 1)``, r = pi / pi_old, both factors differentiated: slope ``-r d``.

    For tokens drawn from pi_old the mean of this slope times grad log pi is the gradient of
    KL(pi || pi_ref), which no other estimator has off-policy; with r under a stop-gradient it has
    not either. At r = 1 it is k2's. d is clamped to +-20, the value to +-clamp; beyond a clamp,
    that of r too, the slope is 0.
    """
    unclamped = k3(gap_BT, ratio_BT, float("inf"))
    kl_BT = ratio_BT * unclamped.kl_BT
    is_free_BT = (jnp.abs(gap_BT) <= LOG_RATIO_LIMIT) & (kl_BT <= clamp)
    slope_BT = jnp.where(is_free_BT, -ratio_weight(ratio_BT) * gap_BT, 0)
    return Estimate(jnp.minimum(kl_BT, clamp), slope_BT)


ESTIMATORS: Mapping[str, Callable[[Array, Array, float], Estimate]] = {
    "k1": k1,
    "abs": absolute,
    "k2": k2,
    "k3": k3,
    "k3_is": k3_is,
}


def kl_penalty(
    beta: float = 1e-3,
    estimator: EstimatorName = "k3",
    clamp: float = 10.0,
    where: Predicate | None = None,
    metric: str = "ref_kl",
) -> Objective:
    """``beta KL(pi || pi_ref)`` added to the loss.

        w = 1        b = -d(beta kl)/d log pi        surrogate: beta kl

    beta: weight of the penalty, per nat, 0 or more.
    estimator: "k1", "abs", "k2" or "k3" (Schulman, "Approximating KL divergence", 2020), or
        "k3_is", k3 times the ratio pi / pi_old: unbiased off-policy, TRL's and NeMo-RL's default.
    clamp: largest k3 or k3_is value in nats, above 0, zero gradient beyond; ``float("inf")`` for
        none (TRL, NeMo-RL).
    where: restrict the penalty to the tokens of a predicate, averaged over *those* tokens: the
        factor ``tokens / selected tokens`` of the mini-batch is put into b. Exact under
        ``token_mean``; under other aggregates the factor is the same and the mean is theirs.
    metric: name under which the mean KL (nats, over the penalised tokens) is reported; two
        penalties in one chain need two names.
    k1 as a loss pushes every token down alike: no signal in expectation.
    Needs ``ref_logp_BT``.
    Source: arXiv 2510.06062 Eq. 1 and App. B (k3, 1e-3); k3_is: DeepSeek-V3.2, arXiv 2512.02556.
    Confidence: high: the authors' code; k3_is: three agreeing frameworks and an exhaustive test.
    """
    require_non_negative("kl_penalty", beta=beta)
    require_positive("kl_penalty", clamp=clamp)
    estimate = choose(ESTIMATORS, estimator, "kl_penalty.estimator")

    def is_penalised(tokens: Tokens) -> Array:
        mask_BT = tokens.is_response_BT
        return mask_BT if where is None else mask_BT & where(tokens)

    def prepare(tokens, state):
        masks = (tokens.is_response_BT, is_penalised(tokens))
        return tuple(mask_BT.sum().astype(jnp.float32) for mask_BT in masks)

    def coefficient(tokens, state, stats):
        ref_logp_BT = accurate(require(tokens, "ref_logp_BT", "kl_penalty"))
        gap_BT = ref_logp_BT - accurate(tokens.logp_BT)
        kl_BT, slope_BT = estimate(gap_BT, ratio(tokens), clamp)
        is_penalised_BT = is_penalised(tokens)
        scale = jnp.asarray(beta, kl_BT.dtype)
        if stats is not None:
            all_tokens, selected = stats
            scale = scale * all_tokens.astype(scale.dtype)
            scale = scale / jnp.maximum(selected, 1).astype(scale.dtype)
        scale_BT = jnp.where(is_penalised_BT, scale, 0)
        return Coefficient(
            weight_BT=jnp.ones_like(kl_BT),
            bias_BT=-scale_BT * slope_BT,
            metrics={metric: mean_over(kl_BT, is_penalised_BT)},
            surrogate_BT=scale_BT * kl_BT,
        )

    return Objective(coefficient, prepare=None if where is None else prepare)


def low_entropy_kl(
    beta: float = 1e-3, quantile: float = 0.8, estimator: EstimatorName = "k3", clamp: float = 10.0
) -> Objective:
    """`kl_penalty` on low-entropy tokens only, over their own count.

        w = 1        b = -d(beta kl)/d log pi  n / n_low  where the entropy is low  else 0

    beta: weight of the penalty, per nat, 0 or more.
    quantile: a token's entropy is low up to this quantile of its response, from 0 to 1.
    estimator, clamp: as in `kl_penalty`.

    n, n_low: response tokens of the mini-batch, and those of low entropy: the released code's split
    KL has a mean of its own, and its scripts scale the other tokens' by 0.

    Needs ``ref_logp_BT`` and ``entropy_BT``, and a forward pass before the update.
    Source: the code of arXiv 2510.06062 (Archer2.0), its scripts.
    Confidence: medium: implied by the scripts, whose released code does not run.
    """
    return kl_penalty(beta, estimator, clamp, where=is_low_entropy(quantile))
