"""Trust regions in probabilities: how far pi may be from the policy x that it is anchored to.

PPO's clip bounds the ratio r = pi / x, which lets a token of probability 0.9 move by 0.18 and one
of 1e-4 by 2e-5. Most rules here bound the move of the probability itself. So they depend on pi as
it is: temperature, vocabulary mask and truncation must be the sampler's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import clipped, ratio_weight
from aspo_jax.losses.objective import (
    ANCHORS,
    AnchorName,
    Coefficient,
    Objective,
    accurate,
    anchor_logp,
    choose,
    ratio,
    ratio_bounds,
    require,
    require_non_negative,
    require_positive,
    require_share,
    select,
    weight_only,
)
from aspo_jax.losses.ppo import ppo_clip, reinforce
from aspo_jax.losses.segment import running_sum, segment_count, segment_quantile
from aspo_jax.structs import Tokens


class Move(NamedTuple):
    """From the anchor x to the policy pi, ``[B, T]`` each.

    logp_BT, anchor_BT: log pi and log x.
    ratio_BT: pi / x, its logarithm clamped to +-20.
    gap_BT: pi - x.
    """

    logp_BT: Array
    anchor_BT: Array
    ratio_BT: Array
    gap_BT: Array


def _move(tokens: Tokens, anchor: str, rule: str) -> Move:
    logp_BT, anchor_BT = accurate(tokens.logp_BT), anchor_logp(tokens, anchor, rule)
    gap_BT = jnp.exp(logp_BT) - jnp.exp(anchor_BT)
    return Move(logp_BT, anchor_BT, ratio(tokens, anchor, rule), gap_BT)


def _pushed(advantage_BT: Array, up_BT: Array, down_BT: Array) -> Array:
    """``up`` where the advantage pushes the token up, A > 0, ``down`` elsewhere."""
    return jnp.where(advantage_BT > 0, up_BT, down_BT)


def _capped(move: Move, cap: float) -> tuple[Array, Array]:
    weight_BT = jnp.minimum(move.ratio_BT, cap)
    return weight_BT, weight_BT * move.logp_BT


def _differentiated(move: Move) -> tuple[Array, Array]:
    return ratio_weight(move.ratio_BT), move.ratio_BT


def _masked(
    rule: str,
    anchor: str,
    cap: float | None,
    keeps: Callable[[Move, Tokens], Array],
) -> Objective:
    """The ratio to the anchor as weight where a token is kept.

    cap: the weight is ``sg(min(r, cap))``; None: r, differentiated, 0 beyond +-20 nats.
    """
    choose(ANCHORS, anchor, f"{rule}.anchor")
    if cap is not None:
        require_positive(rule, cap=cap)
    weigh = _differentiated if cap is None else partial(_capped, cap=cap)

    def coefficient(tokens, state, stats):
        move = _move(tokens, anchor, rule)
        is_kept_BT = keeps(move, tokens)
        weight_BT, value_BT = (jnp.where(is_kept_BT, x, 0) for x in weigh(move))
        return weight_only(weight_BT, -tokens.advantage_BT * value_BT)

    return Objective(coefficient)


# Which moves are too far, of (advantage, too far up, too far down).
SIDES: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "outward": _pushed,
    "both": lambda advantage_BT, up_BT, down_BT: up_BT | down_BT,
}


def dppo_tv(
    *,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    cap: float | None = 10.0,
    anchor: AnchorName = "sampler",
    sides: Literal["outward", "both"] = "outward",
) -> Objective:
    """DPPO, binary total variation: no gradient where the probability has moved too far outward.

        A > 0:  w = min(r, cap)  if pi - x <= delta_high  else 0
        A < 0:  w = min(r, cap)  if pi - x >= -delta_low  else 0        r = pi / x

    Surrogate: ``-A sg(w) log pi``. With ``cap=None`` it is ``-A r`` where kept, and w = r.

    delta_low, delta_high: largest loss and gain of probability, 0 or more.
    cap: largest weight, above 0; None: r itself, differentiated, with weight 0 beyond +-20 nats.
    anchor: x is the "sampler" or the "old" policy.
    sides: only moves "outward", in the direction of the advantage, or "both" ways.
    Others' settings: verl cap 20, anchor "old" (its script: 0.15, cap 1e4); SkyRL and prime-rl's
    default no cap; prime-rl's ``ipo`` no cap, both sides, 0.1.
    Traps: pi is compared with x on the first mini-batch already if x is the sampler, so that
    temperature, vocabulary mask and truncation must be the sampler's.
    Needs ``sampler_logp_BT`` where it is the anchor.
    Source: arXiv 2602.04879; the authors' core_algos.py (sail-sg/Stable-RL, cap and anchor; their
    deltas are in no script read: those here are SkyRL's and prime-rl's).
    Confidence: high: the authors' code.
    """
    rule = "dppo_tv"
    require_non_negative(rule, delta_low=delta_low, delta_high=delta_high)
    too_far = choose(SIDES, sides, f"{rule}.sides")

    def keeps(move: Move, tokens: Tokens) -> Array:
        return ~too_far(tokens.advantage_BT, move.gap_BT > delta_high, move.gap_BT < -delta_low)

    return _masked(rule, anchor, cap, keeps)


def _rest(logp_BT: Array) -> Array:
    """1 - pi, to the last digit where pi is almost 1."""
    return jnp.maximum(-jnp.expm1(logp_BT), 0)


def dppo_kl(
    *, delta: float = 0.05, cap: float | None = 10.0, anchor: AnchorName = "sampler"
) -> Objective:
    """DPPO, binary KL: no gradient where the token has diverged outward.

        D = x log(x / pi) + (1 - x) log((1 - x + 1e-8) / (1 - pi + 1e-8))
        A > 0:  w = min(r, cap)  if D <= delta or pi <= x  else 0
        A < 0:  w = min(r, cap)  if D <= delta or pi >= x  else 0        r = pi / x

    Surrogate: ``-A sg(w) log pi``. With ``cap=None`` it is ``-A r`` where kept, and w = r.

    delta: largest divergence of "this token or another", nats, 0 or more.
    cap: largest weight, above 0; None: r itself, differentiated, with weight 0 beyond +-20 nats.
    anchor: x is the "sampler" or the "old" policy (verl, with cap 20).
    Needs ``sampler_logp_BT`` where it is the anchor.
    Source: arXiv 2602.04879; the authors' core_algos.py (sail-sg/Stable-RL); delta as in verl's
    script.
    Confidence: high: the authors' code.
    """
    require_non_negative("dppo_kl", delta=delta)

    def keeps(move: Move, tokens: Tokens) -> Array:
        x_BT = jnp.exp(move.anchor_BT)
        rest_x_BT, rest_BT = _rest(move.anchor_BT), _rest(move.logp_BT)
        kl_BT = x_BT * (move.anchor_BT - move.logp_BT)
        kl_BT = kl_BT + rest_x_BT * jnp.log((rest_x_BT + 1e-8) / (rest_BT + 1e-8))
        is_outward_BT = _pushed(tokens.advantage_BT, move.gap_BT > 0, move.gap_BT < 0)
        return (kl_BT <= delta) | ~is_outward_BT

    return _masked("dppo_kl", anchor, cap, keeps)


def dis(
    *, clip_low: float = 0.2, clip_high: float = 0.2, anchor: AnchorName = "sampler"
) -> Objective:
    """Double-sided importance sampling (DIS): outside two bounds a token has no gradient.

        w = r  if 1 - clip_low < r < 1 + clip_high  else 0        r = pi / x

    Surrogate: ``-A sg(w) log pi``. The bounds are strict and hold for either sign of A.

    clip_low, clip_high: widths around 1, clip_low from 0 to 1, clip_high 0 or more. None are
        published; these are SkyRL's.
    anchor: x is the "sampler" or the "old" policy.
    Traps: not CISPO, which keeps the clipped weight outside. GLM-5 names it for agents; its
    reasoning uses IcePop.
    Needs ``sampler_logp_BT`` where it is the anchor.
    Source: GLM-5, arXiv 2602.15763 §4.1.2; SkyRL 0.3.0 ``rollout_is``.
    Confidence: medium: two agreeing ports.
    """
    low, high = ratio_bounds("dis", clip_low, clip_high)

    def keeps(move: Move, tokens: Tokens) -> Array:
        unclamped_BT = jnp.exp(move.logp_BT - move.anchor_BT)
        return (unclamped_BT > low) & (unclamped_BT < high)

    return _masked("dis", anchor, math.inf, keeps)


def cppo(
    *,
    delta: float = 0.2,
    delta_b: float = 0.02,
    w_min: float = 0.8,
    cap: float | None = None,
    anchor: AnchorName = "sampler",
) -> Objective:
    """CPPO, cumulative prefix divergence: a response has a budget, spent by its earlier tokens.

        D_t = |pi - x|, v_t = 1 - (1 - w_min) (t - 1) / (n - 1), Z_t = v_t D_t, t = 1 .. n
        B = clip(P90(D), delta_b, 2 delta_b) of the response
        room_t = min(delta, delta + sum_{s<t} (B v_s - Z_s))
        w = r  if A (r - 1) <= 0 or Z_t <= room_t  else 0        r = pi / x

    Surrogate: ``-A r`` where kept. With a cap it is ``-A sg(min(r, cap)) log pi``.

    delta: largest weighted move of a probability while the budget lasts, 0 or more.
    delta_b: budget per token, a probability, 0 or more; at most twice that.
    w_min: weight of the last token's move, above 0, at most 1; the first one's is 1.
    cap: largest weight, above 0; None: r itself, differentiated, with weight 0 beyond +-20 nats.
    anchor: x is the "sampler" or the "old" policy.
    Goes with ``token_mean``. Every earlier token spends, kept or not, moved inward or outward.
    Only response tokens count; the authors' code counts observations of a tool too.
    Not Completion Pruning Policy Optimization, which has the same letters.
    Needs ``position_BT``, and ``sampler_logp_BT`` where it is the anchor.
    Source: arXiv 2606.10968; the authors' cppo.py (Tencent-Hunyuan/UniRL), its binary TV.
    Confidence: high: the authors' code. A port has delta 0.15 and cap 20.
    """
    require_non_negative("cppo", delta=delta, delta_b=delta_b)
    require_share("cppo", w_min=w_min)
    require_positive("cppo", w_min=w_min)

    def keeps(move: Move, tokens: Tokens) -> Array:
        moved_BT = jnp.abs(move.gap_BT)
        last_BT = jnp.maximum(segment_count(tokens) - 1, 1).astype(moved_BT.dtype)
        weight_BT = 1 - (1 - w_min) * require(tokens, "position_BT", "cppo") / last_BT
        spent_BT = weight_BT * moved_BT
        share_BT = jnp.clip(segment_quantile(moved_BT, tokens, 0.9), delta_b, 2 * delta_b)
        left_BT = share_BT * weight_BT - spent_BT
        earlier_BT = running_sum(left_BT, tokens) - left_BT
        is_inward_BT = tokens.advantage_BT * (move.ratio_BT - 1) <= 0
        return is_inward_BT | (spent_BT <= delta + jnp.minimum(earlier_BT, 0))

    return _masked("cppo", anchor, cap, keeps)


def drpo(
    *, epsilon: float = 12.5, anchor: AnchorName = "sampler", is_mu_weighted: bool = True
) -> Objective:
    """DRPO: in place of a mask a quadratic penalty of the move, weighted by |A|.

        w = r        b = -|A| r (pi - x) / epsilon        r = pi / x
        not mu-weighted (SPO):  b = -|A| r (r - 1) / epsilon

    Surrogate: ``-A r + |A| x (r - 1)^2 / (2 epsilon)``, without the factor x for SPO. Together w
    and b are ``A r (1 - sign(A) (pi - x) / epsilon)``: less than r as the token moves outward, more
    as it comes back. Beyond +-20 nats both are 0.

    epsilon: the move at which the weight would be 0, a probability (a ratio for SPO), above 0. At
        the published 12.5 DRPO's weight stays within 8 % of r; the paper also tries 2.5.
    anchor: x is the "sampler", for all updates, or the "old" policy.
    is_mu_weighted: False is Simple Policy Optimization (SPO).
    Goes with ``group_mean`` and ``fixed_length``.
    Traps: chained behind it, a correction scales w and not b; anchored to the sampler it needs
    none. Not Decoupled Reward Policy Optimization, which has the same letters.
    Needs ``sampler_logp_BT`` where it is the anchor.
    Source: arXiv 2606.09821; the authors' drpo.py (Tencent-Hunyuan/UniRL).
    Confidence: high: the authors' code.
    """
    require_positive("drpo", epsilon=epsilon)
    choose(ANCHORS, anchor, "drpo.anchor")
    share = jnp.exp if is_mu_weighted else jnp.ones_like  # of |A| / epsilon, from log x

    def coefficient(tokens, state, stats):
        move, advantage_BT = _move(tokens, anchor, "drpo"), tokens.advantage_BT
        scale_BT = jnp.abs(advantage_BT) / epsilon * share(move.anchor_BT)
        weight_BT, past_BT = ratio_weight(move.ratio_BT), move.ratio_BT - 1
        return Coefficient(
            weight_BT=weight_BT,
            bias_BT=-scale_BT * weight_BT * past_BT,
            metrics={},
            surrogate_BT=-advantage_BT * move.ratio_BT + scale_BT * jnp.square(past_BT) / 2,
        )

    return Objective(coefficient)


def ripo(
    *,
    delta_low: float = 0.05,
    delta_high: float = 0.05,
    ratio_min: float = 0.5,
    ratio_max: float = 10.0,
) -> Objective:
    """Experimental: RIPO, PPO's clip with widths that grow as the token is rarer.

        low = max(1 - sqrt(delta_low / q), ratio_min)        q = pi_old
        high = min(1 + sqrt(delta_high / q), ratio_max)
        A > 0:  w = r  if r <= high  else 0
        A < 0:  w = r  if r >= low   else 0

    Published surrogate: ``max(-A r, -A clip(r, low, high))``.

    delta_low, delta_high: squared width at q = 1, above 0. At q = 0.9 the bounds are 0.764 and
        1.236, at 0.05 they are 0.5 and 2, below 6e-4 they are 0.5 and 10.
    ratio_min, ratio_max: absolute bounds of the bounds, ratio_min from 0 to 1, ratio_max from 1.
    Unverified: the paper itself; the only implementation read is a fork's.
    Source: arXiv 2607.10169; L-hongbin/slime-kernel-agent.
    Confidence: medium: one port.
    """
    require_positive("ripo", delta_low=delta_low, delta_high=delta_high)
    require_share("ripo", ratio_min=ratio_min)
    if not ratio_max >= 1:
        raise ValueError(f"ripo.ratio_max = {ratio_max}; expected a ratio of at least 1")

    def coefficient(tokens, state, stats):
        advantage_BT, ratio_BT = tokens.advantage_BT, ratio(tokens)
        scale_BT = jnp.exp(-accurate(tokens.old_logp_BT) / 2)
        low_BT = jnp.maximum(1 - math.sqrt(delta_low) * scale_BT, ratio_min)
        high_BT = jnp.minimum(1 + math.sqrt(delta_high) * scale_BT, ratio_max)
        weight_BT, value_BT = clipped(ratio_BT, advantage_BT, low_BT, high_BT)
        return weight_only(weight_BT, -advantage_BT * value_BT)

    return Objective(coefficient)


def up(*, clip_low: float = 0.2) -> Objective:
    """Experimental: UP, REINFORCE for positive tokens and PPO for negative ones.

        A > 0:  w = 1
        A < 0:  w = r  if r >= 1 - clip_low  else 0

    Surrogate: ``-A log pi`` for A > 0, PPO's for A < 0; the two do not add up to anything.

    clip_low: a negative token counts while its ratio is at least 1 - clip_low; 0 to 1.
    Goes with the aggregate of its base: ``sequence_mean`` (UP-GRPO), ``token_mean`` (UP-DAPO).
    Traps: the positive side has no ratio, so nothing bounds how stale its data may be.
    Unverified: the paper itself; read are a fork's port and an author's note, which agree.
    Source: arXiv 2607.06987; L-hongbin/slime-kernel-agent.
    Confidence: medium: one port.
    """
    ratio_bounds("up", clip_low, 0)
    return select(lambda tokens: tokens.advantage_BT > 0, reinforce(), ppo_clip(clip_low))
