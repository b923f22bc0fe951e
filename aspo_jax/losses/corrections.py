"""Corrections for data that another policy drew: factors of the weight, chained behind a rule.

    rho = pi_old / mu        mu: the distribution that the sampler says it drew from

Other kernels, a smaller type or older weights make the two differ, and what mu drew is then no
sample of pi_old. A correction multiplies the weight of the rule, whose own gates do not see it, and
leaves biases alone. A token that it drops stays in the denominators. Its own surrogate is 0:
`chain` multiplies that of the rule. Each reports ``NAME_share``, the share of response tokens on
which its bounds acted.

    chain(ppo_clip(), tis(), kl_penalty())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.objective import (
    ANCHORS,
    LOG_RATIO_LIMIT,
    AnchorName,
    Coefficient,
    Objective,
    accurate,
    anchor_logp,
    choose,
    require_non_negative,
    weight_only,
)
from aspo_jax.losses.report import mean_over
from aspo_jax.losses.segment import segment_count, segment_mean, sums_per_sequence, to_tokens
from aspo_jax.structs import Tokens

Level = Literal["token", "sequence", "mean"]
Kind = Literal["ratio", "k2", "k3"]


def _clamp(x: Array) -> Array:
    return jnp.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


LEVELS: Mapping[str, Callable[[Array, Tokens], Array]] = {
    "token": lambda x_BT, tokens: x_BT,
    "sequence": lambda x_BT, tokens: to_tokens(sums_per_sequence(x_BT, tokens), tokens),
    "mean": segment_mean,
}
# log rho of a token -> what is summed; the sum -> the statistic
KINDS: Mapping[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "ratio": (lambda x: x, lambda total: jnp.exp(_clamp(total))),
    "k2": (lambda x: jnp.square(x) / 2, lambda total: total),
    "k3": (lambda x: jnp.expm1(_clamp(x)) - _clamp(x), lambda total: total),
}


def _log_rho(tokens: Tokens, rule: str) -> Array:
    return accurate(tokens.old_logp_BT) - anchor_logp(tokens, "sampler", rule)


def statistic(log_rho_BT: Array, tokens: Tokens, level: str, kind: str) -> Array:
    """What a correction looks at, on each token: ``[B, T]``.

    kind: "ratio": rho; "k2": ``log^2 rho / 2``, "k3": ``rho - 1 - log rho``, in nats.
    level: of the "token" alone; of its "sequence": the product of the ratios, the sum of the
        divergences over the response; their geometric or arithmetic "mean" there.
    Logarithms are clamped to +-20 before they become ratios, so a long response saturates.
    """
    measure, finish = KINDS[kind]
    return finish(LEVELS[level](measure(log_rho_BT), tokens))


def _check_bounds(rule: str, **bounds: float) -> None:
    (low_name, low), (high_name, high) = bounds.items()
    if not (0 <= low <= high and high > 0):
        raise ValueError(
            f"{rule}.{low_name} = {low}, {rule}.{high_name} = {high}; "
            f"expected 0 <= {low_name} <= {high_name}, above 0"
        )


def _factor(rule: str, factor_BT: Array, is_bounded_BT: Array, tokens: Tokens) -> Coefficient:
    share = mean_over(is_bounded_BT, tokens.is_response_BT)
    return weight_only(factor_BT, jnp.zeros_like(factor_BT), **{f"{rule}_share": share})


def tis(
    *,
    level: Level = "token",
    ratio_min: float = 0.0,
    ratio_max: float = 2.0,
    normalize: bool = False,
) -> Objective:
    """Truncated importance sampling (TIS) from the sampler to the trainer's old policy.

        w = clip(rho, ratio_min, ratio_max)

    Surrogate: that of the rule before it, times w.

    level: rho is the "token"'s ratio; or the product over its "sequence", clamped to e^+-20; or the
        geometric "mean" there.
    ratio_min, ratio_max: absolute bounds of rho, 0 or more. SkyRL's for the sequence: 5.
    normalize: divide by the mean of w over the mini-batch's tokens, or over its sequences where the
        level is not the token. This costs a forward pass before the update.
    Metrics: ``tis_share``, share of response tokens whose rho is outside the bounds.
    Traps: 1,000 tokens that differ by 1e-3 nats to one side make a product of e, a whole response's
    weight: at the level "sequence" bfloat16 noise alone truncates long answers.
    Needs ``sampler_logp_BT``.
    Source: verl 0.9.1 rollout correction (2, token and sequence, normalisation off); slime,
    OpenRLHF, NeMo-RL, SkyRL, ms-swift (token); AReaL's clamp (mean).
    Confidence: high: the frameworks' code.
    """
    choose(LEVELS, level, "tis.level")
    _check_bounds("tis", ratio_min=ratio_min, ratio_max=ratio_max)

    def rho(tokens: Tokens) -> Array:
        return statistic(_log_rho(tokens, "tis"), tokens, level, "ratio")

    def prepare(tokens, state):
        kept_BT = jnp.clip(rho(tokens), ratio_min, ratio_max)
        share_BT = jnp.where(tokens.is_response_BT, jnp.ones_like(kept_BT), 0)
        if level != "token":
            share_BT = share_BT / segment_count(tokens)
        total = (share_BT * kept_BT).sum()
        return jnp.where(total > 0, total / share_BT.sum(), 1)

    def coefficient(tokens, state, stats):
        rho_BT = rho(tokens)
        kept_BT = jnp.clip(rho_BT, ratio_min, ratio_max)
        factor_BT = kept_BT if stats is None else kept_BT / stats.astype(kept_BT.dtype)
        return _factor("tis", factor_BT, kept_BT != rho_BT, tokens)

    return Objective(coefficient, prepare=prepare if normalize else None)


# --- masks: where the statistic is outside its bounds, the weight is 0 --------------------------


def _everywhere(is_inside_BT: Array, tokens: Tokens) -> Array:
    outside_BN = sums_per_sequence(~is_inside_BT, tokens)
    return to_tokens(outside_BN, tokens) == 0


def _mask(
    rule: str, low: float, high: float, *, level: str, kind: str = "ratio", weight: str = "none"
) -> Objective:
    """A mask by name; the arguments are those of `mis`."""

    def coefficient(tokens, state, stats):
        log_rho_BT = _log_rho(tokens, rule)
        seen_BT = statistic(log_rho_BT, tokens, "token" if level == "every" else level, kind)
        is_kept_BT = (seen_BT >= low) & (seen_BT <= high)  # False for NaN
        if level == "every":
            is_kept_BT = _everywhere(is_kept_BT, tokens)
        factor_BT = jnp.ones_like(log_rho_BT)
        if weight != "none":
            factor_BT = statistic(log_rho_BT, tokens, weight, "ratio")
        return _factor(rule, jnp.where(is_kept_BT, factor_BT, 0), ~is_kept_BT, tokens)

    return Objective(coefficient)


def mis(
    *,
    level: Literal["token", "sequence", "mean", "every"] = "token",
    kind: Kind = "ratio",
    low: float = 0.0,
    high: float = 2.0,
    weight: Literal["none", "token", "sequence", "mean"] = "token",
) -> Objective:
    """Masked importance sampling (MIS): beyond its bounds a ratio to the sampler counts nothing.

        w = rho_weight  if low <= statistic(level, kind) <= high  else 0

    Surrogate: that of the rule before it, times w. The masks below are settings of this one.

    level: the statistic is of the "token"; of its "sequence": the product of the ratios or the sum
        of the divergences; their geometric or arithmetic "mean" there; or the bounds must hold for
        "every" token of the response.
    kind: "ratio" is rho, "k2" is ``log^2 rho / 2`` and "k3" ``rho - 1 - log rho``, in nats.
    low, high: bounds of the statistic, 0 or more. On rho, not on its inverse as in verl's k1.
    weight: rho of what is kept, of the "token", the "sequence" (product) or the "mean"; "none": 1.
    Metrics: ``mis_share``, share of response tokens that it drops.
    Traps: rho is not truncated, and at a level beyond the token a single one may be large.
    Needs ``sampler_logp_BT``.
    Source: ms-swift 4.6.0 ``token_mask`` (2) and ``sequence_mask`` (level "sequence", weight
    "token", 2); AReaL's mask (high 5; at level "mean" its weight is the "mean"); verl's
    ``seq_max_k3`` is level "every".
    Confidence: high: the frameworks' code.
    """
    choose({**LEVELS, "every": None}, level, "mis.level")
    choose(KINDS, kind, "mis.kind")
    choose({**LEVELS, "none": None}, weight, "mis.weight")
    _check_bounds("mis", low=low, high=high)
    return _mask("mis", low, high, level=level, kind=kind, weight=weight)


def icepop(*, ratio_min: float = 0.5, ratio_max: float = 5.0) -> Objective:
    """IcePop: a token's ratio to the sampler, where it is within two bounds.

        w = rho  if ratio_min <= rho <= ratio_max  else 0

    Surrogate: that of the rule before it, times w.

    ratio_min, ratio_max: absolute bounds of rho, 0 or more; slime: 0 and 2.
    Metrics: ``icepop_share``, share of response tokens that it drops.
    Needs ``sampler_logp_BT``.
    Source: NeMo-RL's reference bounds; OpenRLHF; slime; verl 0.9.1's threshold "0.5_5.0".
    Confidence: high: the frameworks' code.
    """
    _check_bounds("icepop", ratio_min=ratio_min, ratio_max=ratio_max)
    return _mask("icepop", ratio_min, ratio_max, level="token", weight="token")


def sequence_mask(*, ratio_max: float = 3.0) -> Objective:
    """Sequence mask, TRL's default: the product of a response's ratios, up to a bound.

        w = prod_t rho_t  if it is at most ratio_max  else 0

    Surrogate: that of the rule before it, times w.

    ratio_max: largest product, above 0.
    Metrics: ``sequence_mask_share``, share of response tokens that it drops.
    Traps: the name means a token's own rho as the weight in ms-swift, ``mis(level="sequence")``
    here. A product over thousands of tokens of bfloat16 noise is far from 1 either way.
    Needs ``sampler_logp_BT``.
    Source: TRL 1.16.0, ``vllm_importance_sampling_mode="sequence_mask"``, cap 3.
    Confidence: high: the framework's code.
    """
    _check_bounds("sequence_mask", minimum=0.0, ratio_max=ratio_max)
    return _mask("sequence_mask", 0.0, ratio_max, level="sequence", weight="sequence")


def seq_mask_tis(*, ratio_min: float = 0.999, ratio_max: float = 1.002) -> Objective:
    """Sequence-masked TIS: a token's ratio where its response's geometric mean is within bounds.

        w = rho_t  if ratio_min <= exp(mean_t log rho_t) <= ratio_max  else 0

    Surrogate: that of the rule before it, times w.

    ratio_min, ratio_max: absolute bounds of the geometric mean, 0 or more.
    Metrics: ``seq_mask_tis_share``, share of response tokens that it drops.
    Traps: despite its name nothing is truncated.
    Needs ``sampler_logp_BT``.
    Source: NeMo-RL ``seq-mask-tis``; OpenRLHF.
    Confidence: high: the frameworks' code.
    """
    _check_bounds("seq_mask_tis", ratio_min=ratio_min, ratio_max=ratio_max)
    return _mask("seq_mask_tis", ratio_min, ratio_max, level="mean", weight="token")


def geometric_rejection(*, ratio_min: float = 0.999, ratio_max: float = 1.001) -> Objective:
    """Geometric rejection: responses whose geometric mean ratio is within bounds, at weight 1.

        w = 1  if ratio_min <= exp(mean_t log rho_t) <= ratio_max  else 0

    Surrogate: that of the rule before it, times w.

    ratio_min, ratio_max: absolute bounds of the geometric mean, 0 or more; SkyRL: 0.99 and 1.01.
    Metrics: ``geometric_rejection_share``, share of response tokens that it drops.
    Traps: verl's ``seq_mean_k1`` bounds the inverse; an asymmetric pair is to be inverted. verl
    takes what it drops out of the denominators too; here they count every response token.
    Needs ``sampler_logp_BT``.
    Source: verl 0.9.1 ``seq_mean_k1`` "0.999_1.001"; SkyRL ``geometric``.
    Confidence: high: the frameworks' code.
    """
    rule = "geometric_rejection"
    _check_bounds(rule, ratio_min=ratio_min, ratio_max=ratio_max)
    return _mask(rule, ratio_min, ratio_max, level="mean")


def k3_rejection(*, k3_max: float = 0.01) -> Objective:
    """k3 rejection: responses whose mean divergence from the sampler is small, at weight 1.

        w = 1  if mean_t (rho_t - 1 - log rho_t) <= k3_max  else 0

    Surrogate: that of the rule before it, times w.

    k3_max: largest mean over the response, nats, above 0.
    Metrics: ``k3_rejection_share``, share of response tokens that it drops.
    Traps: as for `geometric_rejection`, verl takes what it drops out of the denominators.
    Needs ``sampler_logp_BT``.
    Source: verl 0.9.1 ``seq_mean_k3``.
    Confidence: high: the framework's code.
    """
    _check_bounds("k3_rejection", minimum=0.0, k3_max=k3_max)
    return _mask("k3_rejection", 0.0, k3_max, level="mean", kind="k3")


def outlier_veto(*, ratio_min: float = 1e-4, ratio_max: float = 100.0) -> Objective:
    """Outlier veto: a response with a single ratio to the sampler outside the bounds is dropped.

        w = 1  if ratio_min <= rho_t <= ratio_max for every token t of the response  else 0

    Surrogate: that of the rule before it, times w.

    ratio_min, ratio_max: absolute bounds of rho, 0 or more.
    Metrics: ``outlier_veto_share``, share of response tokens that it drops.
    Needs ``sampler_logp_BT``.
    Source: SkyRL (1e-4 and 100 suggested); slime's mis.yaml (veto 1e-4).
    Confidence: high: the frameworks' code.
    """
    _check_bounds("outlier_veto", ratio_min=ratio_min, ratio_max=ratio_max)
    return _mask("outlier_veto", ratio_min, ratio_max, level="every")


def opsm(*, delta: float, anchor: AnchorName = "sampler") -> Objective:
    """Off-policy sequence masking (OPSM): a bad response that has become improbable is dropped.

        w = 0  if A < 0 and mean_t (log pi_anchor - log pi) > delta  else 1

    Surrogate: that of the rule before it, times w.

    delta: largest mean over the response, nats, 0 or more. There is no common default: slime has
        1e-4, TRL suggests 0.5.
    anchor: the mean is of the log-ratio to the "sampler" (TRL, ms-swift) or to the "old" policy
        that the update started from (slime), always of the current policy.
    Metrics: ``opsm_share``, share of response tokens that it drops.
    Traps: the mean is signed: a response that has become likelier is never dropped. In ms-swift's
    GRPO what is dropped leaves the denominators too; here they count every response token.
    Needs ``sampler_logp_BT`` where it is the anchor.
    Source: DeepSeek-V3.2, arXiv 2512.02556 Eq. 9; slime, TRL 1.16.0, ms-swift 4.6.0.
    Confidence: medium: three agreeing frameworks.
    """
    require_non_negative("opsm", delta=delta)
    choose(ANCHORS, anchor, "opsm.anchor")

    def coefficient(tokens, state, stats):
        loss_BT = anchor_logp(tokens, anchor, "opsm") - accurate(tokens.logp_BT)
        is_near_BT = segment_mean(loss_BT, tokens) <= delta
        is_kept_BT = is_near_BT | (tokens.advantage_BT >= 0)
        return _factor("opsm", is_kept_BT.astype(loss_BT.dtype), ~is_kept_BT, tokens)

    return Objective(coefficient)
