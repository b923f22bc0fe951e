"""Laws of the rules whose bounds depend on the token."""

import jax.numpy as jnp
from law import Law, ratio_of, sg

from aspo_jax.losses import ce_gppo, chain, cispo, dcpo, dispo, gppo, minirl, nll_bonus


def kept_at_the_bound(low, high, beta_low=1.0, beta_high=1.0, cap=10.0):
    """The clipped ratio is the bound times pi / sg(pi): its value, with a gradient."""

    def surrogate(logp, t):
        r, adv = ratio_of(logp, t), t.advantage_BT
        one = jnp.exp(logp - sg(logp))
        up = jnp.where(r > 1 + high, beta_high * (1 + high) * one, r)
        down = jnp.where(r < 1 - low, beta_low * (1 - low) * one, jnp.minimum(r, cap))
        return -adv * jnp.where(adv > 0, up, down)

    return surrogate


def with_likelihood(logp, t):
    is_right = t.is_response_BT & (t.advantage_BT > 0)
    share = is_right.sum() / t.is_response_BT.sum()
    nll = jnp.where(is_right, -logp, 0) / share
    return kept_at_the_bound(0.2, 0.28)(logp, t) + 0.1 * nll


def dispo_surrogate(logp, t):
    r, adv = ratio_of(logp, t), t.advantage_BT
    w = jnp.where(adv > 0, jnp.clip(r, 0.9, 1.3), jnp.clip(r, 0.4, 3.0))
    return -sg(w) * adv * logp


def dcpo_surrogate(low, high, r_max=10.0, cap=10.0):
    def surrogate(logp, t):
        r, adv, q = ratio_of(logp, t), t.advantage_BT, jnp.exp(t.old_logp_BT)
        lo = 0.5 + 0.5 * jnp.sqrt(jnp.maximum(1 - 4 * low / q, 0))
        hi = jnp.minimum(0.5 + 0.5 * jnp.sqrt(1 + 4 * high / q), r_max)
        value = jnp.maximum(-adv * r, -adv * jnp.clip(r, lo, hi))
        return jnp.where(adv < 0, jnp.minimum(-adv * cap, value), value)

    return surrogate


def unified(logp, t):
    r, adv = ratio_of(logp, t), t.advantage_BT
    is_dropped = ((adv > 0) & (r > 2)) | ((adv < 0) & (r < 0.5))
    return -sg(jnp.clip(r, 0.5, 2) * ~is_dropped) * adv * logp


def minirl_surrogate(cap_on):
    def surrogate(logp, t):
        r, adv, mu = ratio_of(logp, t), t.advantage_BT, t.sampler_logp_BT
        is_open = jnp.where(adv > 0, r <= 1.27, r >= 0.8)
        if cap_on == "ratio":
            w = jnp.minimum(jnp.exp(jnp.clip(logp - mu, -20, 20)), 1.5)
        else:
            free = jnp.where(jnp.abs(logp - t.old_logp_BT) < 20, r, 0)
            w = free * jnp.minimum(jnp.exp(jnp.clip(t.old_logp_BT - mu, -20, 20)), 1.5)
        return -adv * sg(is_open * w) * logp

    return surrogate


LAWS = {
    "gppo": Law(gppo(), kept_at_the_bound(0.2, 0.28)),
    "ce_gppo": Law(
        ce_gppo(beta_high=0.7, dual_cap=3.0), kept_at_the_bound(0.2, 0.2, 0.5, 0.7, 3.0)
    ),
    "nll_bonus": Law(chain(gppo(), nll_bonus()), with_likelihood, bias_at_one=None),
    "dispo": Law(
        dispo(
            clip_low_positive=0.1,
            clip_high_positive=0.3,
            clip_low_negative=0.6,
            clip_high_negative=2.0,
        ),
        dispo_surrogate,
    ),
    "dcpo": Law(dcpo(), dcpo_surrogate(0.16, 0.2)),
    "dcpo_scripts": Law(
        dcpo(clip_low=0.2, clip_high=0.28, ratio_max=3.0, dual_cap=4.0),
        dcpo_surrogate(0.2, 0.28, 3.0, 4.0),
    ),
    "minirl": Law(minirl(cap=1.5), minirl_surrogate("ratio")),
    "minirl_mismatch": Law(minirl(cap=1.5, cap_on="mismatch"), minirl_surrogate("mismatch")),
    "cispo_unified": Law(cispo(0.5, 2.0, unified_mask=True), unified),
}
