"""Laws of the trust regions in probabilities, as their papers write them."""

import jax.numpy as jnp
from law import Law, row_sum, sg
from law_ppo import ppo

from aspo_jax.losses import cppo, dis, dppo_kl, dppo_tv, drpo, ripo, up


def policies(logp, t, x):
    """pi, x and their ratio."""
    anchor = getattr(t, x)
    return jnp.exp(logp), jnp.exp(anchor), jnp.exp(jnp.clip(logp - anchor, -20, 20))


def detached(w, logp, t):
    return -t.advantage_BT * sg(w) * logp


def dppo_tv_surrogate(logp, t):
    p, x, r = policies(logp, t, "sampler_logp_BT")
    is_up, is_down = p - x > 0.08, p - x < -0.05
    is_kept = jnp.where(t.advantage_BT > 0, ~is_up, ~is_down)
    return detached(is_kept * jnp.minimum(r, 1.5), logp, t)


def both_sides(logp, t):
    p, x, r = policies(logp, t, "old_logp_BT")
    return jnp.where(jnp.abs(p - x) > 0.05, 0, -t.advantage_BT * r)


def dppo_kl_surrogate(logp, t):
    p, x, r = policies(logp, t, "sampler_logp_BT")
    kl = x * jnp.log(x / p) + (1 - x) * jnp.log((1 - x + 1e-8) / (1 - p + 1e-8))
    is_outward = jnp.where(t.advantage_BT > 0, p > x, p < x)
    return detached(~((kl > 0.01) & is_outward) * jnp.minimum(r, 1.5), logp, t)


def dis_surrogate(logp, t):
    r = jnp.exp(logp - t.sampler_logp_BT)
    return detached(jnp.where((r > 0.7) & (r < 1.4), r, 0), logp, t)


def prefix_kept(logp, t, delta, delta_b, w_min):
    """By a loop over positions, with the budget's books kept in two running sums."""
    p, x, r = policies(logp, t, "sampler_logp_BT")
    mask, distance = t.is_response_BT, jnp.abs(p - x)
    p90 = jnp.nanquantile(jnp.where(mask, distance, jnp.nan), 0.9, axis=-1)
    budget = jnp.clip(p90, delta_b, 2 * delta_b)
    n, seen = row_sum(mask, t)[:, 0], jnp.zeros(len(p))
    spent, weights, kept = seen, seen, []
    for k in range(p.shape[1]):
        v = 1 - (1 - w_min) * seen / jnp.maximum(n - 1, 1)
        z = v * distance[:, k]
        room = jnp.minimum(delta, delta + budget * weights - spent)
        kept.append((t.advantage_BT[:, k] * (r[:, k] - 1) <= 0) | (z <= room))
        own = mask[:, k]
        spent, weights, seen = spent + own * z, weights + own * v, seen + own
    return jnp.stack(kept, axis=1)


def cppo_surrogate(logp, t):
    r = policies(logp, t, "sampler_logp_BT")[2]
    return jnp.where(prefix_kept(sg(logp), t, 0.1, 0.02, 0.5), -t.advantage_BT * r, 0)


def drpo_surrogate(epsilon, is_spo=False):
    def surrogate(logp, t):
        _, x, r = policies(logp, t, "sampler_logp_BT")
        penalty = jnp.abs(t.advantage_BT) * (r - 1) ** 2 / (2 * epsilon)
        return -t.advantage_BT * r + (penalty if is_spo else x * penalty)

    return surrogate


def ripo_surrogate(logp, t):
    _, q, r = policies(logp, t, "old_logp_BT")
    low = jnp.maximum(1 - jnp.sqrt(0.05 / q), 0.7)
    high = jnp.minimum(1 + jnp.sqrt(0.02 / q), 1.5)
    return jnp.maximum(-t.advantage_BT * r, -t.advantage_BT * jnp.clip(r, low, high))


def up_surrogate(logp, t):
    return jnp.where(t.advantage_BT > 0, -t.advantage_BT * logp, ppo()(logp, t))


LAWS = {
    "dppo_tv": Law(dppo_tv(delta_low=0.05, delta_high=0.08, cap=1.5), dppo_tv_surrogate),
    "dppo_tv_both": Law(  # prime-rl's ipo, of the old policy
        dppo_tv(delta_low=0.05, delta_high=0.05, cap=None, anchor="old", sides="both"), both_sides
    ),
    "dppo_kl": Law(dppo_kl(delta=0.01, cap=1.5), dppo_kl_surrogate),
    "dis": Law(dis(clip_low=0.3, clip_high=0.4), dis_surrogate),
    "cppo": Law(cppo(delta=0.1, w_min=0.5), cppo_surrogate),
    "drpo": Law(drpo(epsilon=0.5), drpo_surrogate(0.5)),
    "drpo_spo": Law(drpo(epsilon=2.0, is_mu_weighted=False), drpo_surrogate(2.0, is_spo=True)),
    "ripo": Law(ripo(delta_high=0.02, ratio_min=0.7, ratio_max=1.5), ripo_surrogate),
    "up": Law(up(), up_surrogate),
}
