"""Laws of the rules that read the tokens before or behind, as their papers write them."""

import jax.numpy as jnp
from law import Law, log_ratio_of, ratio_of, sg
from law_ppo import ppo

from aspo_jax.losses import ctpo, fipo, minpro


def counts(t):
    """[B, T]: 1, 2, ... for the response tokens of a row."""
    return jnp.maximum(jnp.cumsum(t.is_response_BT, -1), 1)


def ctpo_surrogate(low, high, cap, power=0.5, is_mean=False):
    def surrogate(logp, t):
        adv, n = t.advantage_BT, counts(t).astype(logp.dtype)
        prefix = jnp.cumsum(jnp.where(t.is_response_BT, log_ratio_of(logp, t), 0), -1)
        prefix = prefix / n if is_mean else prefix
        log_r = jnp.minimum(sg(prefix) + logp - sg(logp), 10)
        scale = n**power
        held = jnp.exp(jnp.clip(log_r, -low * scale, high * scale))
        value = jnp.maximum(-adv * jnp.exp(log_r), -adv * held)
        return jnp.where(adv < 0, jnp.minimum(-adv * jnp.exp(cap * scale), value), value)

    return surrogate


def fipo_surrogate(low=1.0, high=1.2, half_life=32.0, safety=4.0, cap=None):
    def surrogate(logp, t):
        log_r, r, adv = log_ratio_of(logp, t), ratio_of(logp, t), t.advantage_BT
        counted = jnp.where(t.is_response_BT, log_r, 0)
        if cap is not None:
            counted = jnp.where(r > cap, 0, counted)
        distance = counts(t)[:, None, :] - counts(t)[:, :, None]  # [B, from, to]
        discount = jnp.where(distance >= 0, 2.0 ** (-distance / half_life), 0)
        future = (discount * counted[:, None, :]).sum(-1)
        f = jnp.clip(jnp.exp(future), low, high)
        f = jnp.where((adv < 0) & (r > safety), jnp.clip(f, 0.8, 1), f)
        return sg(f) * ppo(cap=cap)(logp, t)

    return surrogate


def minpro_surrogate(logp, t):
    r = ratio_of(logp, t)
    is_before = counts(t)[:, None, :] < counts(t)[:, :, None]
    is_before = is_before & t.is_response_BT[:, None, :]
    least = jnp.where(is_before, r[:, None, :], jnp.inf).min(-1)
    least = jnp.where(is_before.any(-1), least, 1)
    return -t.advantage_BT * sg(jnp.clip(r * least, None, 1.5)) * logp


LAWS = {
    "ctpo": Law(ctpo(clip_low=0.3, clip_high=0.5, dual_cap=0.8), ctpo_surrogate(0.3, 0.5, 0.8)),
    "ctpo_wide": Law(
        ctpo(clip_low=5.0, clip_high=5.0, dual_cap=6.0), ctpo_surrogate(5.0, 5.0, 6.0)
    ),
    "ctpo_mean": Law(
        ctpo(clip_low=0.3, clip_high=0.5, dual_cap=0.4, power=-0.5, prefix="mean"),
        ctpo_surrogate(0.3, 0.5, 0.4, -0.5, is_mean=True),
    ),
    "fipo": Law(fipo(), fipo_surrogate()),
    "fipo_wide": Law(
        fipo(half_life=2.0, influence_min=0.5, influence_max=2.0, safety_ratio=1.5, dual_cap=3.0),
        fipo_surrogate(0.5, 2.0, 2.0, 1.5, 3.0),
    ),
    "minpro": Law(minpro(ratio_max=1.5), minpro_surrogate),
}
