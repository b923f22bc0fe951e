"""Laws of ASPO and of PPO's descendants: their surrogates as the papers write them."""

import jax.numpy as jnp
import numpy as np
from law import Law, ratio_of, row_mean, sg

from aspo_jax.losses import (
    archer2,
    aspo,
    chain,
    cispo,
    dapo,
    grpo,
    grpo_without_is,
    gspo,
    kl_penalty,
    low_entropy_kl,
    positive_response_mean,
    ppo_clip,
    reinforce,
)


def ppo(low=0.2, high=0.2, cap=None):
    def surrogate(logp, t):
        r, adv = ratio_of(logp, t), t.advantage_BT
        value = jnp.maximum(-adv * r, -adv * jnp.clip(r, 1 - low, 1 + high))
        if cap is None:
            return value
        return jnp.where(adv < 0, jnp.minimum(-adv * cap, value), value)

    return surrogate


def ppo_soft(logp, t):
    r, adv = ratio_of(logp, t), t.advantage_BT
    return jnp.where((adv < 0) & (r > 3), -adv * 3 * logp, ppo()(logp, t))


def aspo_surrogate(low=0.2, high=0.2, positive="soft", negative="soft", cap=3.0):
    def surrogate(logp, t):
        r, adv = ratio_of(logp, t), t.advantage_BT
        p = jnp.minimum(r, 1 + high)
        flipped = p / sg(p) / sg(p)
        up = -adv * flipped
        down = -adv * jnp.maximum(r, 1 - low)
        beyond = {"soft": -adv * cap * logp, "hard": -adv * cap}
        if positive != "none":
            up = jnp.where(1 / p > cap, beyond[positive], up)
        if negative != "none":
            down = jnp.where(jnp.maximum(r, 1 - low) > cap, beyond[negative], down)
        return jnp.where(adv > 0, up, down)

    return surrogate


def low_entropy(t):
    is_low = np.zeros(t.logp_BT.shape, bool)
    for b, mask in enumerate(np.asarray(t.is_response_BT)):
        entropy = np.asarray(t.entropy_BT[b], np.float64)
        is_low[b] = entropy <= np.quantile(entropy[mask], 0.8)
    return is_low


def archer2_surrogate(logp, t):
    wide, narrow = aspo_surrogate(0.4, 0.4)(logp, t), aspo_surrogate()(logp, t)
    return jnp.where(low_entropy(t), narrow, wide)


def gated_log(logp, t):
    r, adv = ratio_of(logp, t), t.advantage_BT
    is_open = jnp.where(adv > 0, r <= 1.2, r >= 0.8)
    return -adv * is_open * logp


def response_mean(gate):
    def surrogate(logp, t):
        r, adv = ratio_of(logp, t), t.advantage_BT
        free = jnp.where(jnp.abs(logp - t.old_logp_BT) < 20, r, 0)  # a clamped ratio counts 0
        mean = sg(jnp.broadcast_to(row_mean(free, t), r.shape))
        seen = row_mean(r, t) if gate == "response" else r
        shared = jnp.where(seen <= 1.2, mean * jnp.exp(logp - sg(logp)), 1.2)
        return jnp.where(adv > 0, -adv * shared, -adv * jnp.maximum(r, 0.8))

    return surrogate


def cispo_surrogate(low, high):
    def surrogate(logp, t):
        return -sg(jnp.clip(ratio_of(logp, t), low, high)) * t.advantage_BT * logp

    return surrogate


def gspo_surrogate(logp, t):
    """The true sequence ratio, differentiated through the mean."""
    s = jnp.exp(row_mean(jnp.clip(logp - t.old_logp_BT, -20, 20), t))
    s = jnp.broadcast_to(s, logp.shape)
    adv = t.advantage_BT
    return jnp.maximum(-adv * s, -adv * jnp.clip(s, 1 - 3e-2, 1 + 4e-2))


def with_kl(logp, t):
    d = jnp.clip(t.ref_logp_BT - logp, -20, 20)
    return aspo_surrogate()(logp, t) + 0.1 * jnp.clip(jnp.exp(d) - d - 1, -10, 10)


def with_unbiased_kl(logp, t):
    """k3 times the ratio; constant beyond the clamp of either, and of their product."""
    gap = jnp.abs(logp - t.old_logp_BT) < 20
    logp_kl = jnp.where(gap, logp, sg(logp))
    d = jnp.clip(t.ref_logp_BT - logp_kl, -20, 20)
    logp_kl = jnp.where(jnp.abs(t.ref_logp_BT - logp) < 20, logp_kl, sg(logp_kl))
    value = ratio_of(logp_kl, t) * (jnp.exp(d) - d - 1)
    return aspo_surrogate()(logp, t) + 0.1 * jnp.clip(value, -3, 3)


def low_entropy_kl_surrogate(logp, t):
    d = jnp.clip(t.ref_logp_BT - logp, -20, 20)
    kl = jnp.clip(jnp.exp(d) - d - 1, -10, 10)
    is_low = low_entropy(t)
    mask = t.is_response_BT
    share = (is_low & mask).sum() / mask.sum()
    return -t.advantage_BT * logp + 0.1 * kl * is_low / share


LAWS = {
    "ppo_clip": Law(ppo_clip(), ppo()),
    "ppo_clip_hard": Law(ppo_clip(dual_clip="hard"), ppo(cap=3.0)),
    "ppo_clip_soft": Law(ppo_clip(dual_clip="soft"), ppo_soft),
    "grpo": Law(grpo(0.1, 0.3), ppo(0.1, 0.3)),
    "dapo": Law(dapo(), ppo(0.2, 0.28, 10.0)),
    "grpo_without_is": Law(grpo_without_is(), gated_log),
    "reinforce": Law(reinforce(), lambda logp, t: -t.advantage_BT * logp),
    "positive_response_mean": Law(positive_response_mean(), response_mean("token")),
    "positive_response_mean_gate": Law(
        positive_response_mean(gate="response"), response_mean("response")
    ),
    "aspo": Law(aspo(), aspo_surrogate()),
    "aspo_hard": Law(
        aspo(positive_cap="hard", negative_cap="hard"),
        aspo_surrogate(positive="hard", negative="hard"),
    ),
    "aspo_none": Law(
        aspo(positive_cap="none", negative_cap="none"),
        aspo_surrogate(positive="none", negative="none"),
    ),
    "archer2": Law(archer2(), archer2_surrogate),
    "cispo": Law(cispo(0.5, 2.0), cispo_surrogate(0.5, 2.0)),
    "gspo": Law(gspo(3e-2, 4e-2), gspo_surrogate, per_token=False),
    "kl_penalty": Law(chain(aspo(), kl_penalty(0.1)), with_kl, bias_at_one=None),
    "kl_penalty_k3_is": Law(
        chain(aspo(), kl_penalty(0.1, "k3_is", clamp=3.0)), with_unbiased_kl, bias_at_one=None
    ),
    "low_entropy_kl": Law(
        chain(reinforce(), low_entropy_kl(0.1)), low_entropy_kl_surrogate, bias_at_one=None
    ),
}
