"""Laws of distillation: the published losses of the frameworks that ship it."""

import jax.numpy as jnp
from law import Law, ratio_of, sg
from law_ppo import gated_log, ppo

from aspo_jax.losses import (
    chain,
    distill,
    grpo,
    grpo_without_is,
    kl_penalty,
    reinforce,
    with_teacher,
)

FLOOR = -4.0  # so that some tokens of every case are below it


def teacher_of(t):
    return jnp.clip(t.teacher_logp_BT, FLOOR, None)


def to_sampler(logp, t):
    return jnp.exp(jnp.clip(logp - t.sampler_logp_BT, -20, 20))


def reverse_kl(logp, t):
    """The score-function form: its gradient is that of KL(pi || teacher) in expectation."""
    return -0.5 * sg(teacher_of(t) - logp) * logp


def importance_sampled(logp, t):
    """The sampler's log-ratio to the teacher as an advantage, by importance sampling."""
    return -(teacher_of(t) - t.sampler_logp_BT) * to_sampler(logp, t)


def old_ratio(logp, t):
    return -ratio_of(logp, t) * sg(teacher_of(t) - logp)


def old_anchor(logp, t):
    return -(teacher_of(t) - t.old_logp_BT) * logp


def beside(rule, loss):
    """A chain: the sum of the losses."""
    return lambda logp, t: rule(logp, t) + loss(logp, t)


def beside_reinforce(loss):
    return beside(lambda logp, t: -t.advantage_BT * logp, loss)


def distilled(**settings):
    """With the reward's advantage, which `distill` itself multiplies by 1."""
    return chain(reinforce(), distill(floor=FLOOR, **settings))


def summed(loss, anchor, coef):
    """A loss whose advantage is the reward's plus the log-ratio to the teacher."""

    def surrogate(logp, t):
        own = getattr(t, anchor) if anchor else sg(logp)
        summed = t.advantage_BT + coef * (teacher_of(t) - own)
        return loss(logp, type(t)(**{**vars(t), "advantage_BT": summed}))

    return surrogate


def pull(coef, anchor):
    return lambda t: coef * (teacher_of(t) - getattr(t, anchor))


def with_kl(logp, t):
    d = t.ref_logp_BT - logp
    return summed(ppo(), "old_logp_BT", 0.3)(logp, t) + 0.1 * d**2 / 2


def kl_bias(t):
    return pull(0.3, "logp_BT")(t) + 0.1 * (t.ref_logp_BT - t.logp_BT)


LAWS = {
    "distill": Law(
        distilled(coef=0.5), beside_reinforce(reverse_kl), bias_at_one=pull(0.5, "logp_BT")
    ),
    "distill_sampler": Law(
        distilled(anchor="sampler", ratio="sampler"),
        beside_reinforce(importance_sampled),
        bias_at_one=pull(1, "logp_BT"),
    ),
    "distill_ratio": Law(
        distilled(ratio="old"), beside_reinforce(old_ratio), bias_at_one=pull(1, "logp_BT")
    ),
    "distill_old": Law(
        distilled(anchor="old"), beside_reinforce(old_anchor), bias_at_one=pull(1, "logp_BT")
    ),
    "distill_beside_grpo": Law(
        chain(grpo(), distill(coef=0.5, floor=FLOOR)),
        beside(ppo(), reverse_kl),
        bias_at_one=pull(0.5, "logp_BT"),
    ),
    "with_teacher": Law(
        with_teacher(grpo(), floor=FLOOR),
        summed(ppo(), "old_logp_BT", 1),
        bias_at_one=pull(1, "logp_BT"),
    ),
    "with_teacher_current": Law(
        with_teacher(grpo_without_is(), coef=2.0, anchor="current", floor=FLOOR),
        summed(gated_log, "", 2),
        bias_at_one=pull(2, "logp_BT"),
    ),
    "with_teacher_and_kl": Law(
        chain(with_teacher(grpo(), coef=0.3, floor=FLOOR), kl_penalty(0.1, "k2")),
        with_kl,
        bias_at_one=kl_bias,
    ),
}
