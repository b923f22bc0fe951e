"""PPO's clipped ratio and its descendants: GRPO, DAPO, and the ablations of the ASPO paper."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from aspo_jax.losses.clip import CAPS, CapName, is_kept, no_cap, pick_by_sign, ratio_weight
from aspo_jax.losses.objective import (
    Objective,
    accurate,
    choose,
    ratio,
    ratio_bounds,
    require_above_one,
    weight_only,
)
from aspo_jax.losses.segment import segment_mean


def ppo_clip(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_cap: float = 3.0,
    dual_clip: CapName = "none",
) -> Objective:
    """PPO with separate clip bounds and, by name, a dual clip on negative tokens.

        A > 0:  w = r  if r <= 1 + clip_high  else 0
        A < 0:  w = r  if r >= 1 - clip_low   else 0

    Published surrogate: ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``.

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    dual_cap: where the dual clip of negative tokens begins, a ratio above 1.
    dual_clip: what happens to A < 0 beyond ``r > dual_cap``: "hard" removes the gradient (the
        published dual clip), "soft" keeps it at weight ``dual_cap``, "none" is plain PPO.
    Source: PPO, arXiv 1707.06347 Eq. 7; dual clip, arXiv 1912.09729.
    Confidence: high: the papers, and numbers made by verl's code.
    """
    low, high = ratio_bounds("ppo_clip", clip_low, clip_high)
    require_above_one("ppo_clip", dual_cap=dual_cap)
    cap_negative = choose(CAPS, dual_clip, "ppo_clip.dual_clip")

    def coefficient(tokens, state, stats):
        advantage_BT, logp_BT = tokens.advantage_BT, accurate(tokens.logp_BT)
        ratio_BT = ratio(tokens)
        capped = pick_by_sign(
            advantage_BT,
            positive=no_cap(jnp.minimum(ratio_BT, high), logp_BT, dual_cap),
            negative=cap_negative(jnp.maximum(ratio_BT, low), logp_BT, dual_cap),
        )
        is_kept_BT = is_kept(ratio_BT, advantage_BT, low, high)
        weight_BT = jnp.where(is_kept_BT, capped.weight_BT, 0)
        return weight_only(weight_BT, -advantage_BT * capped.value_BT)

    return Objective(coefficient)


def grpo(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """GRPO: `ppo_clip`; what makes it GRPO is ``group_zscore`` and ``sequence_mean``.

        A > 0:  w = r  if r <= 1 + clip_high  else 0
        A < 0:  w = r  if r >= 1 - clip_low   else 0

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    Source: DeepSeekMath, arXiv 2402.03300 Eq. 3; add `kl_penalty` for its KL term.
    Confidence: high: the paper and every framework.
    """
    return ppo_clip(clip_low, clip_high)


def dapo(clip_low: float = 0.2, clip_high: float = 0.28, dual_cap: float = 10.0) -> Objective:
    """DAPO's clip-higher, with the hard dual clip of its scripts; goes with ``token_mean``.

        A > 0:  w = r  if r <= 1 + clip_high            else 0
        A < 0:  w = r  if 1 - clip_low <= r <= dual_cap  else 0

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    dual_cap: negative tokens beyond this ratio, above 1, lose their gradient.
    Source: arXiv 2503.14476. Dynamic sampling and overlong shaping belong to the data loop.
    Confidence: high: the authors' code.
    """
    return ppo_clip(clip_low, clip_high, dual_cap, dual_clip="hard")


def grpo_without_is(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """GRPO without importance sampling: the gate stays, the ratio is replaced by 1.

        w = 1  if the PPO gate is open  else 0        surrogate: -A w log pi

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while its ratio is at most 1 + clip_high; 0 or more.
    Source: arXiv 2510.06062 §4.2. The paper does not say whether the gate stays ("identical
    except for the use of r"): it does here; `reinforce` drops it too.
    Confidence: medium: the paper's words, no code.
    """
    low, high = ratio_bounds("grpo_without_is", clip_low, clip_high)

    def coefficient(tokens, state, stats):
        ratio_BT = ratio(tokens)
        is_kept_BT = is_kept(ratio_BT, tokens.advantage_BT, low, high)
        weight_BT = is_kept_BT.astype(ratio_BT.dtype)
        return weight_only(weight_BT, -tokens.advantage_BT * weight_BT * accurate(tokens.logp_BT))

    return Objective(coefficient)


def reinforce() -> Objective:
    """REINFORCE: no ratio and no gate.

        w = 1        surrogate: -A log pi

    Source: Williams, Machine Learning 8 (1992).
    Confidence: high: the definition.
    """

    def coefficient(tokens, state, stats):
        logp_BT = accurate(tokens.logp_BT)
        return weight_only(jnp.ones_like(logp_BT), -tokens.advantage_BT * logp_BT)

    return Objective(coefficient)


# Which ratio of a positive token the gate looks at: (token ratio, response mean) -> ratio.
GATES = {"token": lambda ratio_BT, mean_BT: ratio_BT, "response": lambda ratio_BT, mean_BT: mean_BT}


def positive_response_mean(
    clip_low: float = 0.2, clip_high: float = 0.2, gate: Literal["token", "response"] = "token"
) -> Objective:
    """GRPO whose positive tokens share the mean ratio of their response.

        A > 0:  w = mean_t(r)  if r <= 1 + clip_high  else 0
        A < 0:  w = r          if r >= 1 - clip_low   else 0

    A clamped ratio (+-20 nats) counts 0 in the mean, as it does as a weight of its own; the paper
    has no clamp. Without this one such token would give its whole response a weight of up to 5e8.

    Surrogate of a positive token: ``-A sg(mean_t(r)) pi / sg(pi)``. The stop-gradient is the
    point: differentiating the mean itself, d(sum_t mean)/d log pi_t = r_t gives every token its
    own ratio back, and the variant would be GRPO unchanged.

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    clip_high: a positive token counts while the ratio that ``gate`` names is at most
        1 + clip_high; 0 or more.
    gate: the positive tokens' gate looks at the "token" ratio or at the "response" mean; the
        paper does not say which.
    Source: arXiv 2510.06062 §5.3.
    Confidence: medium: the paper's words, no code.
    """
    low, high = ratio_bounds("positive_response_mean", clip_low, clip_high)
    gate_ratio = choose(GATES, gate, "positive_response_mean.gate")

    def coefficient(tokens, state, stats):
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        is_positive_BT = advantage_BT > 0
        free_BT = ratio_weight(ratio_BT)
        mean_BT = segment_mean(free_BT, tokens)
        weight_BT = jnp.where(is_positive_BT, mean_BT, free_BT)
        seen_BT = gate_ratio(ratio_BT, segment_mean(ratio_BT, tokens))
        gated_BT = jnp.where(is_positive_BT, seen_BT, ratio_BT)
        is_kept_BT = is_kept(gated_BT, advantage_BT, low, high)
        bound_BT = jnp.where(is_positive_BT, high, low)
        shared_BT = jnp.where(is_positive_BT, mean_BT, ratio_BT)
        value_BT = jnp.where(is_kept_BT, shared_BT, bound_BT)
        return weight_only(jnp.where(is_kept_BT, weight_BT, 0), -advantage_BT * value_BT)

    return Objective(coefficient)
