"""The two devices that ratio-control rules are built from: a gate, and a cap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.objective import LOG_RATIO_LIMIT

# A hair inside the clamp: exp is not the same to the last bit on every backend.
_CLAMPED_RATIO = math.exp(LOG_RATIO_LIMIT - 1e-3)

CapName = Literal["soft", "hard", "none"]


def is_kept(ratio_BT: Array, advantage_BT: Array, low: float | Array, high: float | Array) -> Array:
    """The PPO gate, ``[B, T]``: True where a token keeps its gradient.

        A > 0:  r <= high          A < 0:  r >= low

    It loses it where the ratio has already left the clip range in the direction in which the
    advantage pushes it, not on the other side, and not on a bound. PPO, arXiv 1707.06347 Eq. 7;
    ASPO, arXiv 2510.06062 Prop. 4.1.
    """
    return jnp.where(advantage_BT > 0, ratio_BT <= high, ratio_BT >= low)


class Gated(NamedTuple):
    """Where x keeps its gradient, and x held at the bound at which it loses it; ``[B, T]``."""

    is_kept_BT: Array
    value_BT: Array


def gate(
    x_BT: Array,
    advantage_BT: Array,
    low: float | Array,
    high: float | Array,
    cap: float | Array = math.inf,
) -> Gated:
    """The PPO gate of a ratio or, with bounds in nats, of a log-ratio.

    cap: a token with A < 0 beyond it loses its gradient too: a hard dual clip.
    """
    is_below_cap_BT = (advantage_BT > 0) | (x_BT <= cap)
    floored_BT = jnp.minimum(jnp.maximum(x_BT, low), cap)
    return Gated(
        is_kept(x_BT, advantage_BT, low, high) & is_below_cap_BT,
        jnp.where(advantage_BT > 0, jnp.minimum(x_BT, high), floored_BT),
    )


def is_free(ratio_BT: Array) -> Array:
    """True where the +-20 nats clamp has not made the ratio a constant, ``[B, T]``."""
    return (ratio_BT > 1 / _CLAMPED_RATIO) & (ratio_BT < _CLAMPED_RATIO)


def ratio_weight(ratio_BT: Array) -> Array:
    """The ratio as a weight, ``[B, T]``: 0 where the +-20 nats clamp has made it a constant.

    A clamped ratio has no gradient; its value as a weight would be 5e8 on a negative token.
    """
    return jnp.where(is_free(ratio_BT), ratio_BT, 0)


class Capped(NamedTuple):
    """A capped ratio-like factor x: the weight it gives, and its value in the published loss."""

    weight_BT: Array
    value_BT: Array


def soft_cap(x_BT: Array, logp_BT: Array, cap: float) -> Capped:
    """Beyond the cap the gradient stays, with the cap as its weight (value: ``cap log pi``)."""
    return Capped(jnp.minimum(x_BT, cap), jnp.where(x_BT > cap, cap * logp_BT, x_BT))


def hard_cap(x_BT: Array, logp_BT: Array, cap: float) -> Capped:
    """Beyond the cap the gradient is zero. Dual-clip PPO, arXiv 1912.09729."""
    return Capped(jnp.where(x_BT > cap, 0, x_BT), jnp.minimum(x_BT, cap))


def no_cap(x_BT: Array, logp_BT: Array, cap: float) -> Capped:
    """x as it is."""
    return Capped(ratio_weight(x_BT), x_BT)


CAPS: Mapping[str, Callable[[Array, Array, float], Capped]] = {
    "soft": soft_cap,
    "hard": hard_cap,
    "none": no_cap,
}


def pick_by_sign(advantage_BT: Array, positive: Capped, negative: Capped) -> Capped:
    """``positive`` where A > 0, ``negative`` elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(advantage_BT > 0, x, y), positive, negative)


def clipped(
    ratio_BT: Array,
    advantage_BT: Array,
    low: float | Array,
    high: float | Array,
    cap: float = math.inf,
) -> tuple[Array, Array]:
    """PPO's clip with a hard dual clip at the cap: the weight, and the clipped ratio ``[B, T]``."""
    gated = gate(ratio_BT, advantage_BT, low, high, cap)
    return jnp.where(gated.is_kept_BT, ratio_weight(ratio_BT), 0), gated.value_BT
