"""On-policy distillation: the log-ratio to a teacher, beside a rule or in its advantage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import ratio_weight
from aspo_jax.losses.objective import (
    ANCHORS,
    Coefficient,
    Objective,
    accurate,
    choose,
    require,
    require_non_negative,
)
from aspo_jax.losses.objective import ratio as importance_ratio
from aspo_jax.losses.report import mean_over
from aspo_jax.structs import Tokens

POLICIES = {"current": "logp_BT", **ANCHORS}
PolicyName = Literal["current", "old", "sampler"]
RATIOS = {"none": None, "old": "old", "sampler": "sampler"}


def _check(rule: str, coef: float, anchor: str, floor: float) -> None:
    require_non_negative(rule, coef=coef)
    choose(POLICIES, anchor, f"{rule}.anchor")
    if not -math.inf < floor < 0:
        raise ValueError(f"{rule}.floor = {floor}; expected a finite number of nats below 0")


def _policy(tokens: Tokens, name: str, rule: str) -> Array:
    return accurate(require(tokens, POLICIES[name], rule))


def _gap(tokens: Tokens, anchor: str, floor: float, rule: str) -> Array:
    """``log pi_T - log pi_anchor``, the teacher's at least the floor, ``[B, T]`` in nats."""
    teacher_BT = accurate(require(tokens, "teacher_logp_BT", rule))
    return jnp.maximum(teacher_BT, floor) - _policy(tokens, anchor, rule)


def _teacher_kl(tokens: Tokens, floor: float, rule: str) -> dict[str, Any]:
    kl_BT = -_gap(tokens, "current", floor, rule)
    return {"teacher_kl": mean_over(kl_BT, tokens.is_response_BT)}


def distill(
    *,
    coef: float = 1.0,
    anchor: PolicyName = "current",
    ratio: Literal["none", "old", "sampler"] = "none",
    floor: float = -20.0,
    estimator: str = "k1",
) -> Objective:
    """On-policy distillation: the reverse KL divergence to a teacher, as a bias.

        w = 1        b = coef w_ratio (log pi_T - log pi_anchor)
        ratio "none":  w_ratio = 1, surrogate ``-coef sg(log pi_T - log pi_anchor) log pi``
        else:  w_ratio = pi / pi_ratio, surrogate ``-coef sg(log pi_T - log pi_anchor) w_ratio``

    Alone it goes with the advantage ``none``: with another it is REINFORCE plus distillation.
    Chained behind a rule as a penalty it adds to the rule's gradient, and no gate of that rule
    stops it; `with_teacher` puts it inside. Teacher and student share tokenizer, temperature
    and vocabulary mask.

    coef: weight per nat, 0 or more.
    anchor: the policy that the teacher is compared with: the "current" one, the "old" one that
        the update started from, or the "sampler" as it reported its own.
    ratio: the policy to which w_ratio is taken, for data that the current policy did not draw;
        0 beyond 20 nats.
    floor: least log-probability of the teacher, in nats below 0: -inf would be an infinite push.
    estimator: of the divergence, "k1" alone. The values of k2 and k3 are never negative: as an
        advantage they push down whatever the teacher finds different, likelier or not.
    Needs ``teacher_logp_BT``, and ``sampler_logp_BT`` where it is named.
    Source: tinker-cookbook 0.6.1 (both "sampler"), prime-rl ``opd`` ("current", "sampler", without
    its mask), NeMo-RL MOPD, arXiv 2601.02780 Eq. 8 ("old", "none").
    Confidence: high: the frameworks' code; checked against autodiff.
    """
    rule = "distill"
    _check(rule, coef, anchor, floor)
    to = choose(RATIOS, ratio, f"{rule}.ratio")
    if estimator != "k1":
        raise ValueError(
            f"{rule}.estimator = {estimator!r}; expected 'k1': used as an advantage, the values of "
            "k2 and k3, never negative, push down tokens that the teacher likes better too, and k1 "
            "differentiated as a loss pushes every token down alike; leave it out"
        )

    def coefficient(tokens, state, stats):
        gap_BT, logp_BT = _gap(tokens, anchor, floor, rule), accurate(tokens.logp_BT)
        scale_BT, value_BT = jnp.ones_like(gap_BT), logp_BT
        if to is not None:
            value_BT = importance_ratio(tokens, to, rule)
            scale_BT = ratio_weight(value_BT)
        return Coefficient(
            weight_BT=jnp.ones_like(gap_BT),
            bias_BT=coef * scale_BT * gap_BT,
            metrics=_teacher_kl(tokens, floor, rule),
            surrogate_BT=-coef * gap_BT * value_BT,
        )

    return Objective(coefficient)


def with_teacher(
    rule: Objective, *, coef: float = 1.0, anchor: PolicyName = "old", floor: float = -20.0
) -> Objective:
    """A rule that sees ``A + coef (log pi_T - log pi_anchor)`` in place of each token's advantage.

        w = w_rule        b = b_rule + w_rule coef (log pi_T - log pi_anchor)

    So the rule's gate, flip or cap acts by the sign of the sum, where a chained `distill` is never
    gated. w and b are those with which ``w A + b`` is the rule's coefficient of the sum; figures
    by the sign of A, `clip_share` and the like, still speak of the reward's advantage.

    coef: weight per nat, 0 or more.
    anchor: the policy that the teacher is compared with: "current", "old" or "sampler".
    floor: least log-probability of the teacher, in nats below 0.
    A rule that takes its advantages to be one number per sequence (`gspo`) sees them differ.
    Needs ``teacher_logp_BT``, and ``sampler_logp_BT`` where it is named.
    Source: slime 624b824 (on top of any estimator), ms-swift 4.6.0 OPD-RL.
    Confidence: high: the framework's code.
    """
    name = "with_teacher"
    _check(name, coef, anchor, floor)

    def shift(tokens: Tokens) -> Array:
        return coef * _gap(tokens, anchor, floor, name)

    def shifted(tokens: Tokens) -> Tokens:
        return dataclasses.replace(tokens, advantage_BT=tokens.advantage_BT + shift(tokens))

    def prepare(tokens, state):
        return rule.prepare(shifted(tokens), state) if rule.prepare else None

    def coefficient(tokens, state, stats):
        made = rule.coefficient(shifted(tokens), state, stats)
        return made._replace(
            bias_BT=made.bias_BT + made.weight_BT * shift(tokens),
            metrics={**made.metrics, **_teacher_kl(tokens, floor, name)},
        )

    return rule._replace(coefficient=coefficient, prepare=rule.prepare and prepare)
