"""Rules that fit log-ratios to advantages, or leave the ratio out: no ratio times a PPO gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import is_kept, ratio_weight
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    accurate,
    choose,
    log_ratio,
    ratio_bounds,
    require_non_negative,
    require_positive,
    weight_only,
)
from aspo_jax.losses.segment import segment_mean


class _Seen(NamedTuple):
    """What a gate or a weight of `rec` looks at: both ratios and the advantage, ``[B, T]``."""

    ratio_BT: Array
    sequence_BT: Array
    advantage_BT: Array


class _Bounds(NamedTuple):
    """Absolute ratios: the clip range, and where the ring around it begins on either side."""

    low: float
    high: float
    ring_low: float
    ring_high: float


def _is_within(seen: _Seen, bounds: _Bounds) -> Array:
    return (seen.ratio_BT >= bounds.low) & (seen.ratio_BT <= bounds.high)


def _is_in_ring(seen: _Seen, bounds: _Bounds) -> Array:
    below_BT, beyond_BT = seen.ratio_BT <= bounds.ring_low, seen.ratio_BT >= bounds.ring_high
    return _is_within(seen, bounds) | jnp.where(seen.advantage_BT > 0, below_BT, beyond_BT)


_GATES: Mapping[str, Callable[[_Seen, _Bounds], Array]] = {
    "none": lambda seen, bounds: jnp.ones_like(seen.ratio_BT, bool),
    "two_side": _is_within,
    "one_side": lambda seen, bounds: is_kept(
        seen.ratio_BT, seen.advantage_BT, bounds.low, bounds.high
    ),
    "sequence_one_side": lambda seen, bounds: is_kept(
        seen.sequence_BT, seen.advantage_BT, bounds.low, bounds.high
    ),
    "ring": _is_in_ring,
}

_WEIGHTS: Mapping[str, Callable[[_Seen, float], Array]] = {
    "none": lambda seen, temperature: jnp.ones_like(seen.ratio_BT),
    "ratio": lambda seen, temperature: ratio_weight(seen.ratio_BT),
    "sequence_ratio": lambda seen, temperature: ratio_weight(seen.sequence_BT),
    "advantage": lambda seen, temperature: jnp.exp(seen.advantage_BT / temperature),
}

# (log pi, log pi - log pi_old) -> the penalty of a token, and minus its derivative
_REGULARIZERS: Mapping[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "none": lambda logp_BT, gap_BT: (jnp.zeros_like(gap_BT), jnp.zeros_like(gap_BT)),
    "k2": lambda logp_BT, gap_BT: (jnp.square(gap_BT), -2 * gap_BT),
    "forward_kl": lambda logp_BT, gap_BT: (-logp_BT, jnp.ones_like(gap_BT)),
}


def rec(
    *,
    clip_mode: Literal["none", "two_side", "one_side", "sequence_one_side", "ring"] = "none",
    weight: Literal["none", "ratio", "sequence_ratio", "advantage"] = "none",
    regularizer: Literal["none", "k2", "forward_kl"] = "none",
    coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ring: tuple[float, float] = (0.6, 2.0),
    temperature: float = 1.0,
) -> Objective:
    """REC, group-relative REINFORCE: a gate, a weight and a regulariser, each by name.

        w = W [kept]

        clip_mode            kept are
        "none"               all tokens
        "two_side"           1 - clip_low <= r <= 1 + clip_high
        "one_side"           A > 0: r <= 1 + clip_high        A < 0: r >= 1 - clip_low
        "sequence_one_side"  the same of s, the geometric mean of r over the response
        "ring"               as "two_side", and A > 0: r <= 1 - ring[0]
                                                A < 0: r >= 1 + ring[1]

        weight       "none": W = 1    "ratio": r    "sequence_ratio": s
                     "advantage": exp(A / temperature)
        regularizer  "none": b = 0    "k2": b = -2 coef log r    "forward_kl": b = coef

    Published surrogate: ``-A sg(w) log pi``, plus ``coef (log r)^2`` or ``-coef log pi``. Goes
    with ``group_mean`` and ``token_mean``, "sequence_one_side" with ``sequence_mean``.

    clip_mode: which tokens keep the policy term; the regulariser acts on all of them.
    weight: what multiplies the advantage.
    regularizer: what is added.
    coef: weight of the regulariser, per squared nat or per nat, 0 or more.
    clip_low, clip_high: the clip range, widths around 1.
    ring: where tokens on the harmless side count again, widths below and above 1.
    temperature: of weight "advantage", in advantage, above 0.

    The authors' names: REC-OneSide-IS is "one_side" with "ratio", -NoIS the same with "none",
    RED-Weight is weight "advantage"; GRPO is REC-OneSide-IS with z-scores. They have no clamp:
    here a ratio beyond +-20 nats is no weight.
    Source: arXiv 2509.24203; the authors' code in Trinity-RFT.
    Confidence: high: the authors' code.
    """
    gate = choose(_GATES, clip_mode, "rec.clip_mode")
    weigh = choose(_WEIGHTS, weight, "rec.weight")
    penalty = choose(_REGULARIZERS, regularizer, "rec.regularizer")
    require_non_negative("rec", coef=coef)
    require_positive("rec", temperature=temperature)
    if not (len(ring) == 2 and 0 <= ring[0] <= 1 and ring[1] >= 0):
        raise ValueError(
            f"rec.ring = {ring}; expected two widths, from 0 to 1 below ratio 1 and 0 or more above"
        )
    bounds = _Bounds(*ratio_bounds("rec", clip_low, clip_high), 1 - ring[0], 1 + ring[1])

    def coefficient(tokens, state, stats):
        advantage_BT, logp_BT = tokens.advantage_BT, accurate(tokens.logp_BT)
        log_ratio_BT = log_ratio(tokens)
        sequence_BT = jnp.exp(segment_mean(log_ratio_BT, tokens))
        seen = _Seen(jnp.exp(log_ratio_BT), sequence_BT, advantage_BT)
        weight_BT = jnp.where(gate(seen, bounds), weigh(seen, temperature), 0)
        penalty_BT, pull_BT = penalty(logp_BT, logp_BT - accurate(tokens.old_logp_BT))
        value_BT = -advantage_BT * weight_BT * logp_BT + coef * penalty_BT
        return Coefficient(weight_BT, coef * pull_BT, {}, value_BT)

    return Objective(coefficient)


def opmd(*, tau: float = 1.0) -> Objective:
    """OPMD as Trinity-RFT has it: REINFORCE divided by 1 + tau; the old policy is not looked at.

        w = 1 / (1 + tau)        surrogate: -A log pi / (1 + tau)

    tau: temperature of the mirror descent, 0 or more; here a factor on the learning rate alone.

    `kimi_opmd` is another rule of the same name.
    Source: Trinity-RFT, arXiv 2505.17826.
    Confidence: high: the authors' code.
    """
    require_non_negative("opmd", tau=tau)

    def coefficient(tokens, state, stats):
        logp_BT = accurate(tokens.logp_BT)
        weight_BT = jnp.full_like(logp_BT, 1 / (1 + tau))
        return weight_only(weight_BT, -tokens.advantage_BT * weight_BT * logp_BT)

    return Objective(coefficient)


def kimi_opmd(*, tau: float = 0.1) -> Objective:
    """Kimi k1.5's policy mirror descent, also known as DRO: `rec` with "k2" at coef = tau / 2.

        w = 1        b = -tau log r

    Published surrogate: ``-A log pi + tau / 2 (log r)^2``: no ratio, no clip, a quadratic pull to
    the old policy that grows without a bound.

    tau: strength of the pull, in advantage per nat, 0 or more. verl's `dro` has the same number as
        beta, Trinity-RFT half of it.

    The paper squares the log-ratio of the whole response; all ports, and this, that of each token.
    Source: arXiv 2501.12599 Eq. 3 as ROLL, verl and Trinity-RFT have it; DRO is arXiv 2405.19107.
    Confidence: medium: three agreeing ports.
    """
    require_non_negative("kimi_opmd", tau=tau)
    return rec(regularizer="k2", coef=tau / 2)


def asymre(*, shift: float = -0.1) -> Objective:
    """AsymRE: REINFORCE whose baseline is shifted; `rec` with "forward_kl" at coef = -shift.

        w = 1        b = -shift

    Surrogate: ``-(A - shift) log pi``; goes with ``group_mean``.

    shift: what is added to the baseline, in advantage, 0 or less: below the mean reward right
        answers count for more than wrong ones.

    The pull of b is on every answer that is trained on, whatever its A; groups without a signal are
    dropped by the data loop and have none. Trinity-RFT's `asymre` also halves the loss.
    Source: arXiv 2506.20520; -0.1 as in Trinity-RFT.
    Confidence: high: the authors of REC run it so.
    """
    if not shift <= 0:
        raise ValueError(f"asymre.shift = {shift}; expected a number <= 0")
    return rec(regularizer="forward_kl", coef=-shift)
