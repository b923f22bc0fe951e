"""Laws of the rules with smooth weights."""

import jax
import jax.numpy as jnp
import numpy as np
from law import Law, log_ratio_of, ratio_of, sg

from aspo_jax.losses import delightful, mhpo, r2vpo, sapo


def sapo_surrogate(logp, t):
    def f(tau):
        return 4 / tau / (1 + jnp.exp(-tau * (ratio_of(logp, t) - 1)))

    return -t.advantage_BT * jnp.where(t.advantage_BT > 0, f(1.0), f(1.05))


def mhpo_surrogate(scale=1.0):
    def surrogate(logp, t):
        psi = 1.5 * jnp.tanh(log_ratio_of(logp, t) / 1.5)
        zeta = jnp.log1p(jnp.exp(psi)) ** 1.5 + (jnp.log1p(jnp.exp(-psi)) / 0.8) ** 2
        return -t.advantage_BT * scale * jnp.exp(psi - sg(zeta))

    return surrogate


MHPO_AT_ONE = float(np.exp(-(np.log(2) ** 1.5) - (np.log(2) / 0.8) ** 2))


def r2vpo_surrogate(lam):
    def surrogate(logp, t):
        r = ratio_of(logp, t)
        return -(r * t.advantage_BT - lam * (r - 1) ** 2)

    return surrogate


def delight(logp, t):
    return jax.nn.sigmoid(t.advantage_BT * -logp / 0.7)


LAWS = {
    "sapo": Law(sapo(), sapo_surrogate),
    "mhpo": Law(mhpo(), mhpo_surrogate(), at_one=MHPO_AT_ONE),
    "mhpo_normalized": Law(mhpo(normalize_at_one=True), mhpo_surrogate(1 / MHPO_AT_ONE)),
    "r2vpo": Law(r2vpo(), r2vpo_surrogate(0.04)),
    "r2vpo_dual": Law(r2vpo(lam=0.25, delta=0.1, dual_lr=0.01), r2vpo_surrogate(0.25)),
    "delightful": Law(
        delightful(eta=0.7),
        lambda logp, t: -t.advantage_BT * sg(delight(logp, t)) * logp,
        at_one=lambda t: delight(t.logp_BT, t),
    ),
}
