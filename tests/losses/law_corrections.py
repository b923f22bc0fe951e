"""Laws of the corrections between sampler and old policy: PPO's loss times a detached factor."""

import jax.numpy as jnp
from law import Law, row_mean, row_sum, sg
from law_ppo import ppo

from aspo_jax.losses import (
    chain,
    geometric_rejection,
    icepop,
    k3_rejection,
    kl_penalty,
    mis,
    opsm,
    outlier_veto,
    ppo_clip,
    seq_mask_tis,
    sequence_mask,
    tis,
)


def log_rho(t):
    return jnp.where(t.is_response_BT, t.old_logp_BT - t.sampler_logp_BT, 0)


def rho(t):
    return jnp.exp(jnp.clip(log_rho(t), -20, 20))


def product(t):
    return jnp.exp(jnp.clip(row_sum(log_rho(t), t), -20, 20)) * jnp.ones_like(log_rho(t))


def geometric(t):
    return jnp.exp(jnp.clip(row_mean(log_rho(t), t), -20, 20)) * jnp.ones_like(log_rho(t))


def k3(t):
    return rho(t) - 1 - jnp.clip(log_rho(t), -20, 20)


def is_within(x, low, high):
    return (low <= x) & (x <= high)


def all_of_row(is_true, t):
    return (is_true | ~t.is_response_BT).all(-1, keepdims=True)


def normalized_tokens(t):
    w = jnp.minimum(rho(t), 1.5)
    return w / w.mean(where=t.is_response_BT)


def normalized_sequences(t):
    w = jnp.minimum(product(t), 1.5)
    return w / w[:, 0].mean()


def corrected(correction, factor):
    """The law of a correction behind PPO."""
    return Law(chain(ppo_clip(), correction), lambda logp, t: factor(t) * ppo()(logp, t))


def masked_off_policy(x, delta):
    def surrogate(logp, t):
        drift = sg(row_mean(getattr(t, x) - logp, t))
        return jnp.where((t.advantage_BT >= 0) | (drift <= delta), ppo()(logp, t), 0)

    return surrogate


def corrected_with_kl(logp, t):
    d = jnp.clip(t.ref_logp_BT - logp, -20, 20)
    kl = jnp.clip(jnp.exp(d) - d - 1, -10, 10)
    return rho(t) * is_within(rho(t), 0.5, 5) * ppo()(logp, t) + 0.1 * kl


LAWS = {
    "tis": corrected(tis(ratio_min=0.8, ratio_max=1.5), lambda t: jnp.clip(rho(t), 0.8, 1.5)),
    "tis_normalized": corrected(tis(ratio_max=1.5, normalize=True), normalized_tokens),
    "tis_sequence": corrected(
        tis(level="sequence", ratio_max=1.5, normalize=True), normalized_sequences
    ),
    "mis": corrected(mis(), lambda t: rho(t) * (rho(t) <= 2)),
    "mis_mean": corrected(  # AReaL's sequence level
        mis(level="mean", weight="mean", high=1.1), lambda t: geometric(t) * (geometric(t) <= 1.1)
    ),
    "mis_every": corrected(  # verl's seq_max_k3
        mis(level="every", kind="k3", weight="none", high=0.3),
        lambda t: all_of_row(k3(t) <= 0.3, t) * jnp.ones_like(rho(t)),
    ),
    "icepop": Law(  # a correction leaves the penalty alone
        chain(ppo_clip(), kl_penalty(0.1), icepop()), corrected_with_kl, bias_at_one=None
    ),
    "sequence_mask": corrected(sequence_mask(), lambda t: product(t) * (product(t) <= 3)),
    "seq_mask_tis": corrected(
        seq_mask_tis(ratio_min=0.9, ratio_max=1.2),
        lambda t: rho(t) * is_within(geometric(t), 0.9, 1.2),
    ),
    "geometric_rejection": corrected(
        geometric_rejection(ratio_min=0.9, ratio_max=1.2),
        lambda t: is_within(geometric(t), 0.9, 1.2) * 1.0,
    ),
    "k3_rejection": corrected(
        k3_rejection(k3_max=0.05), lambda t: (row_mean(k3(t), t) <= 0.05) * jnp.ones_like(rho(t))
    ),
    "opsm": Law(chain(ppo_clip(), opsm(delta=0.05)), masked_off_policy("sampler_logp_BT", 0.05)),
    "outlier_veto": corrected(
        outlier_veto(ratio_min=0.6, ratio_max=2.0),
        lambda t: all_of_row(is_within(rho(t), 0.6, 2), t) * jnp.ones_like(rho(t)),
    ),
}
