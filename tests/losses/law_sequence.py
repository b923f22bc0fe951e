"""Laws of the rules that weigh a whole response, as their papers write them."""

import jax.numpy as jnp
from law import Law, log_ratio_of, ratio_of, row_mean, row_sum, sg
from law_ppo import gspo_surrogate, ppo

from aspo_jax.losses import apc, dhpo, fiberpo, gmpo, gspo, vespo


def gmpo_surrogate(logp, t):
    log_r, adv = log_ratio_of(logp, t), t.advantage_BT
    sign = jnp.sign(adv)
    clipped = sign * jnp.minimum(sign * log_r, sign * jnp.clip(log_r, -0.4, 0.4))
    return -adv * jnp.exp(row_mean(clipped, t))


def vespo_surrogate(anchor):
    def surrogate(logp, t):
        log_w = row_sum(jnp.clip(logp - getattr(t, anchor), -20, 20), t)
        log_w, adv = jnp.clip(log_w, -20, 20), t.advantage_BT
        up = jnp.exp(3 + 2 * log_w - 3 * jnp.exp(log_w))
        down = jnp.exp(2 + 3 * log_w - 2 * jnp.exp(log_w))
        return -adv * sg(jnp.where(adv >= 0, up, down)) * logp

    return surrogate


def dhpo_surrogate(logp, t):
    """Half PPO's loss, half that of the sequence ratio, differentiated through the mean."""
    return 0.7 * ppo(0.2, 0.28)(logp, t) + 0.3 * gspo_surrogate(logp, t)


def fiberpo_surrogate(logp, t):
    log_r = log_ratio_of(logp, t)
    base = jnp.clip(row_mean(log_r, t), -0.1, 0.1)
    return -t.advantage_BT * jnp.exp(base + jnp.clip(log_r - base, -0.3, 0.3))


def apc_surrogate(logp, t):
    r, n = ratio_of(logp, t), t.is_response_BT.sum(-1, keepdims=True)
    others = row_sum(jnp.abs(r - 1), t) - jnp.abs(r - 1)
    left = sg(jnp.maximum(n * 0.3 - others, 0))
    return -t.advantage_BT * (1 + jnp.clip(r - 1, -left, left))


LAWS = {
    "gspo_coupled": Law(
        gspo(3e-2, 4e-2, coupled=True),
        gspo_surrogate,
        bias_at_one=lambda t: row_mean(t.advantage_BT, t) - t.advantage_BT,
    ),
    "gmpo": Law(gmpo(), gmpo_surrogate, per_token=False),
    "vespo": Law(vespo(), vespo_surrogate("old_logp_BT")),
    "vespo_sampler": Law(vespo(anchor="sampler"), vespo_surrogate("sampler_logp_BT")),
    "dhpo": Law(
        dhpo(mix=0.7, sequence_clip_low=3e-2, sequence_clip_high=4e-2),
        dhpo_surrogate,
        per_token=False,
    ),
    "fiberpo": Law(fiberpo(clip_base=0.1, clip_residual=0.3), fiberpo_surrogate, per_token=False),
    "apc": Law(apc(delta=0.3), apc_surrogate),
}
