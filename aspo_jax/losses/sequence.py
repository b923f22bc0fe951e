"""Rules whose weight is read off a whole response: geometric means, products and budgets."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from aspo_jax.losses.clip import gate, is_free, ratio_weight
from aspo_jax.losses.objective import (
    ANCHORS,
    LOG_RATIO_LIMIT,
    Objective,
    accurate,
    choose,
    log_ratio,
    ratio,
    ratio_bounds,
    require_non_negative,
    require_positive,
    require_share,
    weight_only,
)
from aspo_jax.losses.report import mean_over
from aspo_jax.losses.segment import (
    segment_count,
    segment_mean,
    sums_per_sequence,
    to_tokens,
)


def gmpo(*, clip_low: float = 0.4, clip_high: float = 0.4) -> Objective:
    """Geometric-mean policy optimization; goes with ``sequence_mean``.

        S = exp(mean_t l')    l' = min(log r, clip_high) if A > 0, max(log r, -clip_low) if A < 0
        A > 0:  w = S  if log r <= clip_high  else 0
        A < 0:  w = S  if log r >= -clip_low  else 0

    Published surrogate: ``-A S``, one term per response.

    clip_low: a negative token counts while log r is at least -clip_low; nats, 0 or more.
    clip_high: a positive token counts while log r is at most clip_high; nats, 0 or more.
    The bounds are in log space: 0.4 lets a ratio go to 1.49 and 0.67. Meant for one advantage per
    sequence. A token beyond +-20 nats has weight 0; the paper has no clamp.
    Source: arXiv 2507.20673; the authors' train_zero_math_gmpo.py; verl geo_mean.
    Confidence: high: the authors' code.
    """
    require_non_negative("gmpo", clip_low=clip_low, clip_high=clip_high)

    def coefficient(tokens, state, stats):
        advantage_BT, log_ratio_BT = tokens.advantage_BT, log_ratio(tokens)
        is_kept_BT, clipped_BT = gate(log_ratio_BT, advantage_BT, -clip_low, clip_high)
        mean_BT = jnp.exp(segment_mean(clipped_BT, tokens))
        is_kept_BT = is_kept_BT & is_free(jnp.exp(log_ratio_BT))
        return weight_only(jnp.where(is_kept_BT, mean_BT, 0), -advantage_BT * mean_BT)

    return Objective(coefficient)


VANISHED = 1e-3  # a weight below it teaches nothing


def vespo(
    *,
    k_positive: float = 2.0,
    lam_positive: float = 3.0,
    k_negative: float = 3.0,
    lam_negative: float = 2.0,
    anchor: Literal["old", "sampler"] = "old",
) -> Objective:
    """Experimental: VESPO, a smooth weight of the whole response's ratio; with ``token_mean``.

        W = exp(sum_t log r_t) over the response, the sum clamped to +-20 nats
        w = phi(W) = W^k exp(lam (1 - W))        (k, lam) by the sign of A

    Published surrogate: ``-A sg(phi) log pi``. phi(1) = 1, and it is largest at ``W = k / lam``:
    1.21 at 0.67 where A >= 0, 1.24 at 1.5 where A < 0.

    k_positive, k_negative: how fast the weight falls towards W = 0, above 0.
    lam_positive, lam_negative: how fast it falls towards W = infinity, above 0.
    anchor: the ratio is taken to the "old" policy or to the "sampler" that drew the tokens.
    W is a product: over thousands of tokens small drifts add up, and the weight of long responses
    vanishes, both for W near 0 and for large W.
    Metrics: ``vanished_share``, share of response tokens with a weight below 1e-3.
    Unverified: the numbers in the paper. The authors' code and scripts have these, their docstring
    (2, 1.5) and (4, 2.5).
    Source: arXiv 2602.10693; the authors' recipe/vespo core_algos.py; TRL ``vespo``.
    Confidence: high: the authors' code.
    """
    require_positive("vespo", k_positive=k_positive, lam_positive=lam_positive)
    require_positive("vespo", k_negative=k_negative, lam_negative=lam_negative)
    choose(ANCHORS, anchor, "vespo.anchor")

    def coefficient(tokens, state, stats):
        advantage_BT, logp_BT = tokens.advantage_BT, accurate(tokens.logp_BT)
        log_w_BN = sums_per_sequence(log_ratio(tokens, anchor, "vespo"), tokens)
        log_w_BT = to_tokens(jnp.clip(log_w_BN, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), tokens)
        k_BT = jnp.where(advantage_BT >= 0, k_positive, k_negative)
        lam_BT = jnp.where(advantage_BT >= 0, lam_positive, lam_negative)
        weight_BT = jnp.exp(k_BT * log_w_BT - lam_BT * jnp.expm1(log_w_BT))
        return weight_only(
            weight_BT,
            -advantage_BT * weight_BT * logp_BT,
            vanished_share=mean_over(weight_BT < VANISHED, tokens.is_response_BT),
        )

    return Objective(coefficient)


def dhpo(
    *,
    mix: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    sequence_clip_low: float = 3e-4,
    sequence_clip_high: float = 4e-4,
) -> Objective:
    """Experimental: dynamic hybrid policy optimization, its averaged variant; ``sequence_mean``.

        s = exp(mean_t log r_t) over the response
        w = mix r [r inside its bounds] + (1 - mix) s [s inside its bounds]

    where a ratio is inside as in PPO: at most 1 + clip_high if A > 0, at least 1 - clip_low if
    A < 0. Surrogate: ``mix`` parts of PPO's and ``1 - mix`` parts of `gspo`'s.

    mix: share of the token ratio, from 0 (`gspo`) to 1 (`ppo_clip`).
    clip_low, clip_high: widths around 1 of the token ratio's range; 0 to 1, 0 or more.
    sequence_clip_low, sequence_clip_high: the same of the sequence ratio.
    Meant for one advantage per sequence.
    Unverified: the clip widths (ours are DAPO's and GSPO's), and that the gates are PPO's one-sided
    ones. The entropy-guided mix is left out: which way the entropy points is not known.
    Source: arXiv 2601.05607 Eqs. 8-11, through a reader's note; its code is not released.
    Confidence: low: abstract and a note.
    """
    require_share("dhpo", mix=mix)
    low, high = ratio_bounds("dhpo", clip_low, clip_high)
    require_share("dhpo", sequence_clip_low=sequence_clip_low)
    require_non_negative("dhpo", sequence_clip_high=sequence_clip_high)
    sequence_low, sequence_high = 1 - sequence_clip_low, 1 + sequence_clip_high

    def coefficient(tokens, state, stats):
        advantage_BT, log_ratio_BT = tokens.advantage_BT, log_ratio(tokens)
        token_BT, sequence_BT = jnp.exp(log_ratio_BT), jnp.exp(segment_mean(log_ratio_BT, tokens))
        of_token = gate(token_BT, advantage_BT, low, high)
        of_sequence = gate(sequence_BT, advantage_BT, sequence_low, sequence_high)
        weight_BT = mix * jnp.where(of_token.is_kept_BT, token_BT, 0)
        weight_BT = weight_BT + (1 - mix) * jnp.where(of_sequence.is_kept_BT, sequence_BT, 0)
        value_BT = mix * of_token.value_BT + (1 - mix) * of_sequence.value_BT
        return weight_only(jnp.where(is_free(token_BT), weight_BT, 0), -advantage_BT * value_BT)

    return Objective(coefficient)


def fiberpo(*, clip_base: float = 0.2, clip_residual: float = 0.2) -> Objective:
    """Experimental: FiberPO, a gate on the response's mean and one on each token's rest of it.

        base b = clip(mean_t log r_t, -clip_base, clip_base) over the response
        s_t = exp(b + clip(log r_t - b, -clip_residual, clip_residual))
        w_t = s_t [rest of t inside] + [base inside] mean_u(s_u [rest of u outside])

    Surrogate: ``-A s``; goes with ``sequence_mean``. Both gates are two-sided and blind to the
    sign of A; a token outside its gate still moves with the mean, unless that is clipped too.

    clip_base: largest mean log-ratio of a response, nats, 0 or more.
    clip_residual: largest distance of a token's log-ratio from it, nats, 0 or more.
    Meant for one advantage per sequence.
    Unverified: the gate itself. This is one of two third-party readings that disagree (the other
    gates inside the mean), and the widths are that package's, not the paper's.
    Source: arXiv 2603.08239; an unofficial package that cites its equations.
    Confidence: low: no official code, secondary readings conflict.
    """
    require_non_negative("fiberpo", clip_base=clip_base, clip_residual=clip_residual)

    def coefficient(tokens, state, stats):
        log_ratio_BT = log_ratio(tokens)
        mean_BT = segment_mean(log_ratio_BT, tokens)
        base_BT = jnp.clip(mean_BT, -clip_base, clip_base)
        rest_BT = log_ratio_BT - base_BT
        ratio_BT = jnp.exp(base_BT + jnp.clip(rest_BT, -clip_residual, clip_residual))
        is_inside_BT = jnp.abs(rest_BT) <= clip_residual
        carried_BT = segment_mean(jnp.where(is_inside_BT, 0, ratio_BT), tokens)
        weight_BT = jnp.where(is_inside_BT, ratio_BT, 0)
        weight_BT = weight_BT + jnp.where(jnp.abs(mean_BT) <= clip_base, carried_BT, 0)
        is_free_BT = is_free(jnp.exp(log_ratio_BT))
        return weight_only(jnp.where(is_free_BT, weight_BT, 0), -tokens.advantage_BT * ratio_BT)

    return Objective(coefficient)


def apc(*, delta: float) -> Objective:
    """Experimental: APC-Obj, all or nothing: a response counts while its mean change is small.

        w = r  if mean_t |r_t - 1| < delta over the response  else 0

    Surrogate: ``-A (1 + clip(r_t - 1, -B_t, B_t))`` with ``B_t = sg(max(n delta - sum_{u != t}
    |r_u - 1|, 0))``, n tokens long: what the other tokens leave of the response's budget.

    delta: the mean change allowed per token, above 0; the paper's number is not known, so there is
        no default.
    Unverified: delta, and that B_t is held constant; differentiated, it would couple the tokens.
    Source: arXiv 2603.08239 Eq. 3; an unofficial package that cites it.
    Confidence: low: no official code.
    """
    require_positive("apc", delta=delta)

    def coefficient(tokens, state, stats):
        ratio_BT = ratio(tokens)
        change_BT = jnp.abs(ratio_BT - 1)
        total_BT = to_tokens(sums_per_sequence(change_BT, tokens), tokens)
        budget_BT = delta * segment_count(tokens).astype(ratio_BT.dtype)
        own_BT = jnp.maximum(budget_BT - (total_BT - change_BT), 0)
        value_BT = 1 + jnp.clip(ratio_BT - 1, -own_BT, own_BT)
        weight_BT = jnp.where(total_BT < budget_BT, ratio_weight(ratio_BT), 0)
        return weight_only(weight_BT, -tokens.advantage_BT * value_BT)

    return Objective(coefficient)
