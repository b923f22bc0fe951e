"""ASPO: the importance ratio of positive tokens is turned upside down (arXiv 2510.06062).

GRPO's ratio gives a positive token the more weight the more probable it has already become. ASPO
gives it ``1 / r``: the weight of a right token that is still improbable grows, up to a cap.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import CAPS, CapName, is_kept, pick_by_sign
from aspo_jax.losses.objective import (
    Objective,
    Predicate,
    accurate,
    choose,
    ratio,
    ratio_bounds,
    require,
    require_positive,
    require_share,
    select,
    weight_only,
)
from aspo_jax.losses.report import mean_over
from aspo_jax.losses.segment import segment_quantile
from aspo_jax.structs import Tokens


def aspo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float = 3.0,
    positive_cap: CapName = "soft",
    negative_cap: CapName = "soft",
) -> Objective:
    """Asymmetric importance Sampling Policy Optimization.

        A > 0:  w = min(1/r, cap)  if r <= 1 + clip_high  else 0
        A < 0:  w = min(r, cap)    if r >= 1 - clip_low   else 0

    Published surrogate: ``-A pi_old pi / sg(pi)^2`` (value -A/r, gradient +1/r) for A > 0 and
    ``-A r`` for A < 0, clipped; beyond a soft cap it is ``-A cap log pi``. Differentiating a plain
    1/r instead would flip the sign of the update.

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    cap: largest weight, above 0.
    positive_cap, negative_cap: what happens beyond it, per sign of the advantage: "soft" keeps
        the gradient at weight ``cap``, "hard" removes it, "none" lets the weight grow.
    Metrics: ``cap_share_positive``, ``cap_share_negative``, share of that sign's tokens beyond the
        cap.
    Source: arXiv 2510.06062 §6, Eq. 3; soft caps on both signs and cap 3 as in the authors' code
    (the paper prints no number).
    Confidence: high: the paper, and numbers made by the authors' code.
    """
    low, high = ratio_bounds("aspo", clip_low, clip_high)
    require_positive("aspo", cap=cap)
    cap_positive = choose(CAPS, positive_cap, "aspo.positive_cap")
    cap_negative = choose(CAPS, negative_cap, "aspo.negative_cap")

    def coefficient(tokens, state, stats):
        advantage_BT, logp_BT = tokens.advantage_BT, accurate(tokens.logp_BT)
        ratio_BT = ratio(tokens)
        flipped_BT = 1 / jnp.minimum(ratio_BT, high)
        floored_BT = jnp.maximum(ratio_BT, low)
        capped = pick_by_sign(
            advantage_BT,
            positive=cap_positive(flipped_BT, logp_BT, cap),
            negative=cap_negative(floored_BT, logp_BT, cap),
        )
        is_kept_BT = is_kept(ratio_BT, advantage_BT, low, high)
        is_response_BT = tokens.is_response_BT
        return weight_only(
            jnp.where(is_kept_BT, capped.weight_BT, 0),
            -advantage_BT * capped.value_BT,
            cap_share_positive=mean_over(flipped_BT > cap, is_response_BT & (advantage_BT > 0)),
            cap_share_negative=mean_over(floored_BT > cap, is_response_BT & (advantage_BT < 0)),
        )

    return Objective(coefficient)


def is_low_entropy(quantile: float = 0.8) -> Predicate:
    """Predicate ``tokens -> [B, T]``: the token's entropy is at most its response's quantile.

    The quantile is over the response tokens of the token's own sequence, linearly interpolated,
    of the *current* policy's entropy (nats). Needs ``entropy_BT``. Archer, arXiv 2507.15778 Eq. 2.
    """
    require_share("is_low_entropy", quantile=quantile)

    def predicate(tokens: Tokens) -> Array:
        entropy_BT = accurate(require(tokens, "entropy_BT", "is_low_entropy"))
        return entropy_BT <= segment_quantile(entropy_BT, tokens, quantile)

    return predicate


def archer2(
    quantile: float = 0.8,
    clip_low_entropy: float = 0.2,
    clip_high_entropy: float = 0.4,
    cap: float = 3.0,
) -> Objective:
    """ASPO as in the authors' released code: a wider clip range on high-entropy tokens.

        select(is_low_entropy(quantile), aspo(0.2, 0.2), aspo(0.4, 0.4))

    quantile: a token's entropy is low up to this quantile of its response, from 0 to 1.
    clip_low_entropy: both clip bounds of low-entropy tokens, from 0 to 1.
    clip_high_entropy: both clip bounds of the others, from 0 to 1.
    cap: largest weight, above 0.
    The paper's text has 0.2 for every token: that is `aspo`.

    Needs ``entropy_BT``.
    Source: the code of arXiv 2510.06062 (Archer2.0).
    Confidence: high: numbers made by the authors' code.
    """
    bounds = {"clip_low_entropy": clip_low_entropy, "clip_high_entropy": clip_high_entropy}
    require_share("archer2", quantile=quantile, **bounds)
    require_positive("archer2", cap=cap)
    return select(
        is_low_entropy(quantile),
        aspo(clip_low_entropy, clip_low_entropy, cap),
        aspo(clip_high_entropy, clip_high_entropy, cap),
    )
