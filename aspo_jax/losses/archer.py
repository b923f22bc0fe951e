"""Archer: uncertain tokens have room to explore, the others are held near to what they were."""

from __future__ import annotations

from aspo_jax.losses.aspo import is_low_entropy
from aspo_jax.losses.kl import EstimatorName, kl_penalty
from aspo_jax.losses.objective import Objective, chain, require_share, select
from aspo_jax.losses.ppo import ppo_clip


def archer(
    *,
    quantile: float = 0.8,
    clip_low_entropy: float = 0.2,
    clip_high_entropy: float = 0.5,
    beta_low_entropy: float = 1e-3,
    beta_high_entropy: float = 0.0,
    dual_cap: float = 10.0,
    estimator: EstimatorName = "k3",
) -> Objective:
    """Archer (its first version): PPO with clip widths and a KL penalty by the token's entropy.

        entropy <= its response's quantile:  w of ppo_clip with clip_low_entropy on both sides,
                                             b of kl_penalty with beta_low_entropy
        elsewhere:                           w of ppo_clip with clip_high_entropy on both sides,
                                             b of kl_penalty with beta_high_entropy

    Published surrogate: PPO's with a hard dual clip, plus ``beta_t`` times the KL estimate, both
    under one mean over all tokens (`low_entropy_kl` divides by the penalised ones alone).

    quantile: a token's entropy is low up to this quantile of its response, from 0 to 1.
    clip_low_entropy: both clip widths of low-entropy tokens, from 0 to 1.
    clip_high_entropy: both clip widths of the others, from 0 to 1.
    beta_low_entropy: weight of the penalty on low-entropy tokens, per nat, 0 or more.
    beta_high_entropy: the same on the others.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient.
    estimator: of the KL divergence, as in `kl_penalty`.

    The paper has a token on the quantile among the uncertain ones; here, as in the released code,
    it is not. Its second version, `archer2`, turns the ratio of positive tokens upside down.
    Needs ``entropy_BT`` and ``ref_logp_BT``.
    Source: arXiv 2507.15778 Eqs. 2-5; dual clip and k3 as in the authors' code.
    Confidence: high: the paper, and numbers made by the authors' code
    """
    widths = {"clip_low_entropy": clip_low_entropy, "clip_high_entropy": clip_high_entropy}
    require_share("archer", quantile=quantile, **widths)

    def rule(width: float, beta: float) -> Objective:
        clip = ppo_clip(width, width, dual_cap, dual_clip="hard")
        return chain(clip, kl_penalty(beta, estimator))

    return select(
        is_low_entropy(quantile),
        rule(clip_low_entropy, beta_low_entropy),
        rule(clip_high_entropy, beta_high_entropy),
    )
