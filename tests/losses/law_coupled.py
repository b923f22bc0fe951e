"""Laws of the rules that are coupled over a mini-batch, and of Archer: as their papers write them.

What a rule gathers from the mini-batch is computed here in NumPy, on the host, by loops and sorts.
"""

import jax.numpy as jnp
import numpy as np
from law import Law, log_ratio_of, ratio_of, row_mean, sg
from law_ppo import low_entropy, ppo

from aspo_jax.losses import archer, bapo, clip_cov, hapo, kl_cov, p3o, real


def host(t, *names):
    """Fields of the tokens on the host in float64, response tokens only: flat, in order."""
    mask = np.asarray(t.is_response_BT)
    return [np.asarray(getattr(t, name), np.float64)[mask] for name in names]


def on_rows(flat, t):
    """The inverse of `host`; zeros elsewhere."""
    rows = np.zeros(t.logp_BT.shape, flat.dtype)
    rows[np.asarray(t.is_response_BT)] = flat
    return rows


def host_ratio(t, anchor="old_logp_BT"):
    logp, old = host(t, "logp_BT", anchor)
    return np.exp(np.clip(logp - old, -20, 20))


def clipped(adv, r, low, high, cap):
    value = jnp.maximum(-adv * r, -adv * jnp.clip(r, low, high))
    return jnp.where(adv < 0, jnp.minimum(-adv * cap, value), value)


def bapo_bounds(r, adv, target, lows, highs, step):
    """The published search, on the ratio of the two sums: the lower bound first, then the upper."""

    def positive_to_negative(low, high):
        effective = np.where(adv >= 0, np.minimum(r, high), np.maximum(r, low)) * adv
        negative = -effective[effective < 0].sum()
        return effective[effective > 0].sum() / negative if negative > 0 else np.inf

    low, high = lows[0], highs[0]
    while positive_to_negative(low, high) < target and low < lows[1]:
        low = min(low + step, lows[1])
    while positive_to_negative(low, high) < target and high < highs[1]:
        high = min(high + step, highs[1])
    return low, high


def bapo_surrogate(target=1.0, lows=(0.6, 0.9), highs=(1.2, 3.0), step=0.05):
    def surrogate(logp, t):
        (adv,) = host(t, "advantage_BT")
        low, high = bapo_bounds(host_ratio(t), adv, target, lows, highs, step)
        return clipped(t.advantage_BT, ratio_of(logp, t), low, high, 3.0)

    return surrogate


def p3o_surrogate(anchor):
    def surrogate(logp, t):
        r_all = host_ratio(t, anchor)
        ess = r_all.sum() ** 2 / (r_all.size * (r_all**2).sum())
        gap = logp - getattr(t, anchor)
        r = jnp.exp(jnp.clip(gap, -20, 20))
        gap = jnp.clip(gap, -10, 10)
        k3 = jnp.exp(-gap) - 1 + gap
        return -t.advantage_BT * sg(jnp.minimum(r, ess)) * logp + (1 - ess) * k3

    return surrogate


def hapo_rank(t, sign):
    """h of each token, with the published division by the root mean square."""
    (entropy,) = host(t, "entropy_BT")
    x = np.log(np.maximum(entropy, 1e-8))
    x = x - np.sort(x)[round(0.8 * (x.size - 1))]
    z = x / np.sqrt(np.mean(x**2)) if x.any() else x
    up, down = z[z > 0].max(initial=1e-8), z[z < 0].min(initial=-1e-8)
    return on_rows(np.where(z > 0, z / up, sign * z / -down), t)


def hapo_surrogate(sign):
    def surrogate(logp, t):
        h, r, adv = hapo_rank(t, sign), ratio_of(logp, t), t.advantage_BT
        below = 0.2 * np.where(h <= 0, 1 - h, 1)
        above = 0.2 * np.where(h > 0, 1 + h, 1)
        is_inside = (sg(r) > 1 - below / 2) & (sg(r) < 1 + above / 2)
        up = jnp.where(is_inside, adv, adv * (1 + h))
        down = jnp.where(is_inside, adv * (1 + h), adv)
        return clipped(jnp.where(h > 0, up, down), r, 1 - below, 1 + above, 10.0)

    return surrogate


def hapo_at_one(t):
    h = hapo_rank(t, 1)
    return np.where(h > 0, 1, 1 + h).astype(np.float32)


def archer_surrogate(logp, t):
    d = jnp.clip(t.ref_logp_BT - logp, -20, 20)
    k3 = jnp.clip(jnp.exp(d) - d - 1, -10, 10)
    is_low = low_entropy(t)
    narrow = ppo(0.2, 0.2, 10.0)(logp, t) + 0.1 * k3
    return jnp.where(is_low, narrow, ppo(0.5, 0.5, 10.0)(logp, t) + 0.02 * k3)


def covariance(t):
    adv, logp = host(t, "advantage_BT", "logp_BT")
    return (adv - adv.mean()) * (logp - logp.mean())


def candidates(t, low, high, clip_low, clip_high):
    cov, r, (adv,) = covariance(t), host_ratio(t), host(t, "advantage_BT")
    is_clipped = -adv * np.clip(r, 1 - clip_low, 1 + clip_high) > -adv * r
    return on_rows((cov > low) & (cov < high) & ~is_clipped, t)


def clip_cov_surrogate(logp, t):
    """With a share of 1 every candidate is drawn."""
    return jnp.where(candidates(t, 0.1, 1.0, 0.2, 0.3), 0, ppo(0.2, 0.3)(logp, t))


def top(t, share):
    cov = covariance(t)
    is_top = np.zeros(cov.shape, bool)
    is_top[np.argsort(-cov)[: max(1, int(share * cov.size))]] = True
    return on_rows(is_top, t)


def kl_cov_surrogate(logp, t):
    penalty = 0.7 * jnp.abs(log_ratio_of(logp, t))
    return -t.advantage_BT * ratio_of(logp, t) + jnp.where(top(t, 0.3), penalty, 0)


def by_group(t):
    """The rows of each group: one sequence a row."""
    group = np.asarray(t.group_id_BT).max(-1)
    return [np.flatnonzero(group == g) for g in np.unique(group)]


def is_right(t):
    return np.asarray(t.advantage_BT).max(-1, where=np.asarray(t.is_response_BT), initial=-9) > 0


def real_surrogate(logp, t):
    """Scaled for `sequence_mean`: a sequence's part of the gradient times N n_i, by the sum over
    its tokens and the factor N; the loss of a group shared by its sequences."""
    s = row_mean(log_ratio_of(logp, t), t)[:, 0] / 0.5
    groups, right = by_group(t), is_right(t)
    rows = {}
    for group in groups:
        for i in group:
            live = jnp.where(np.arange(len(right)) == i, s, sg(s))
            up = sum((jnp.exp(-live[j]) for j in group if right[j]), 0.0)
            down = sum((jnp.exp(live[j]) for j in group if not right[j]), 0.0)
            has_both = right[group].any() and not right[group].all()
            loss = jnp.log(1 + up) + jnp.log(1 + down) if has_both else 0.0 * live[i]
            rows[i] = len(right) / len(groups) * (sg(loss) / len(group) + loss - sg(loss))
    return jnp.broadcast_to(jnp.stack([rows[i] for i in range(len(right))])[:, None], logp.shape)


def real_at_one(t):
    """The bias at ratio 1: (N / groups) / tau over 1 + the number of its like, by sign."""
    groups, right, bias = by_group(t), is_right(t), np.zeros(t.logp_BT.shape, np.float32)
    for group in groups:
        for i in group:
            like = (right[group] == right[i]).sum()
            if like < len(group):
                slope = len(right) / len(groups) / 0.5 / (1 + like)
                bias[i] = slope if right[i] else -slope
    return bias


LAWS = {
    "archer": Law(
        archer(beta_low_entropy=0.1, beta_high_entropy=0.02), archer_surrogate, bias_at_one=None
    ),
    "bapo": Law(bapo(), bapo_surrogate()),
    "bapo_script": Law(
        bapo(share=1 / 3, ratio_min_start=0.8, ratio_min_end=0.95, ratio_max_end=2.0, step=0.1),
        bapo_surrogate(0.5, (0.8, 0.95), (1.2, 2.0), 0.1),
    ),
    "clip_cov": Law(
        clip_cov(share=1.0, covariance_min=0.1, covariance_max=1.0, clip_low=0.2, clip_high=0.3),
        clip_cov_surrogate,
        at_one=lambda t: 1.0 - candidates(t, 0.1, 1.0, 0.2, 0.3),
    ),
    "hapo": Law(hapo(), hapo_surrogate(1), at_one=hapo_at_one),
    "hapo_code_sign": Law(hapo(code_sign=True), hapo_surrogate(-1)),
    "kl_cov": Law(kl_cov(share=0.3, beta=0.7), kl_cov_surrogate),
    "p3o": Law(p3o(), p3o_surrogate("sampler_logp_BT")),
    "p3o_old": Law(p3o(anchor="old"), p3o_surrogate("old_logp_BT")),
    "real": Law(real(), real_surrogate, at_one=0.0, bias_at_one=real_at_one, per_token=False),
}
