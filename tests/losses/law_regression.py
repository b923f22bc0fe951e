"""Laws of the rules without a ratio times a PPO gate."""

import jax.numpy as jnp
from law import Law, ratio_of, row_mean, sg

from aspo_jax.losses import asymre, kimi_opmd, opmd, rec


def free_ratio(logp, t):
    return jnp.where(jnp.abs(logp - t.old_logp_BT) < 20, ratio_of(logp, t), 0)


def one_side_is_k2(logp, t):
    r, adv = ratio_of(logp, t), t.advantage_BT
    in_range = jnp.where(adv >= 0, r <= 1.2, r >= 0.8)
    return -adv * sg(free_ratio(logp, t) * in_range) * logp + 0.3 * (logp - t.old_logp_BT) ** 2


def two_side(logp, t):
    r = ratio_of(logp, t)
    return -t.advantage_BT * sg((r >= 0.9) & (r <= 1.3)) * logp


def ring_weighted_forward_kl(logp, t):
    r, adv = ratio_of(logp, t), t.advantage_BT
    inside = (r >= 0.8) & (r <= 1.2)
    harmless = ((adv >= 0) & (r <= 0.6)) | ((adv <= 0) & (r >= 1.5))
    weight = jnp.exp(adv / 2) * (inside | harmless)
    return -adv * sg(weight) * logp - 0.2 * logp


def sequence_one_side(logp, t):
    adv = t.advantage_BT
    s = jnp.exp(row_mean(jnp.clip(logp - t.old_logp_BT, -20, 20), t))
    in_range = jnp.where(adv >= 0, s <= 1.02, s >= 0.98)
    return -adv * sg(s * in_range) * logp


def squared_log_ratio(logp, t):
    return -t.advantage_BT * logp + 0.25 / 2 * (logp - t.old_logp_BT) ** 2


LAWS = {
    "rec": Law(
        rec(clip_mode="one_side", weight="ratio", regularizer="k2", coef=0.3), one_side_is_k2
    ),
    "rec_two_side": Law(rec(clip_mode="two_side", clip_low=0.1, clip_high=0.3), two_side),
    "rec_ring": Law(
        rec(
            clip_mode="ring",
            weight="advantage",
            regularizer="forward_kl",
            coef=0.2,
            ring=(0.4, 0.5),
            temperature=2.0,
        ),
        ring_weighted_forward_kl,
        at_one=lambda t: jnp.exp(t.advantage_BT / 2),
        bias_at_one=0.2,
    ),
    "rec_sequence": Law(
        rec(clip_mode="sequence_one_side", weight="sequence_ratio", clip_low=0.02, clip_high=0.02),
        sequence_one_side,
    ),
    "opmd": Law(opmd(), lambda logp, t: -t.advantage_BT * logp / 2, at_one=0.5),
    "kimi_opmd": Law(kimi_opmd(tau=0.25), squared_log_ratio),
    "asymre": Law(asymre(), lambda logp, t: -(t.advantage_BT + 0.1) * logp, bias_at_one=0.1),
}
