"""Laws of the rules that hold a response against the others of its prompt.

The cases have one response a row, and its prompt's number on the row's first token.
"""

import jax.numpy as jnp
import numpy as np
from law import Law, ratio_of, row_mean, row_sum

from aspo_jax.losses import copg, gbpo, reg_grpo


def is_same_group(t):
    """[B, B]: whether two rows answer one prompt."""
    group = t.group_id_BT[:, 0]
    return group[:, None] == group[None, :]


def group_mean(x_B1, t):
    same = is_same_group(t)
    return (same @ x_B1) / same.sum(1, keepdims=True)


def pairs_of(logp, t):
    """Half the sum over the other responses of (beta / 2) (rho_i - rho_j)^2 / (size - 1)."""
    rho = row_sum(logp - t.ref_logp_BT, t)
    same = is_same_group(t)
    others = jnp.maximum(same.sum(1, keepdims=True) - 1, 1)
    return 0.3 / 4 * jnp.where(same, (rho - rho.T) ** 2, 0).sum(1, keepdims=True) / others


def contrast(logp, t):
    gap = logp - t.ref_logp_BT
    share = t.is_response_BT / t.is_response_BT.sum(1, keepdims=True)
    return -t.advantage_BT * gap + pairs_of(logp, t) * share


def regression(floor):
    def surrogate(logp, t):
        rho = row_sum(logp - t.old_logp_BT, t)
        gap = rho - group_mean(rho, t)
        sigma = jnp.maximum(jnp.sqrt(group_mean(gap**2, t)), floor)
        return (
            (row_mean(t.advantage_BT, t) - gap / sigma) ** 2
            / t.is_response_BT.sum(1, keepdims=True)
            * jnp.ones_like(logp)
        )

    return surrogate


def group_advantage(t):
    return group_mean(row_mean(t.advantage_BT, t), t) * jnp.ones_like(t.logp_BT)


def target_of(t):
    advantage = np.asarray(row_mean(t.advantage_BT, t))[:, 0]
    same = np.asarray(is_same_group(t))
    median = np.array([np.median(advantage[row]) for row in same])
    sigmoid = 1 / (1 + np.exp(-(advantage - median) / 0.5))
    return jnp.asarray((1 - 0.3 + (0.3 + 0.4) * sigmoid)[:, None], t.advantage_BT.dtype)


def drawn_to_a_target(logp, t):
    return jnp.abs(t.advantage_BT) * jnp.abs(ratio_of(logp, t) - target_of(t))


LAWS = {
    "copg": Law(copg(beta=0.3), contrast, bias_at_one=None),
    "reg_grpo": Law(
        reg_grpo(sigma_floor=0.3),
        regression(0.3),
        at_one=2 / 0.3,
        bias_at_one=lambda t: -2 / 0.3 * group_advantage(t),
        per_token=False,
    ),
    "gbpo": Law(
        gbpo(clip_low=0.3, clip_high=0.4, temperature=0.5),
        drawn_to_a_target,
        at_one=lambda t: jnp.sign(t.advantage_BT) * jnp.sign(target_of(t) - 1),
        per_token=False,
    ),
}
