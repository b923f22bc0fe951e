"""Advantages from the rewards of a prompt's samples.

Each factory returns ``(reward_PG, is_valid_PG) -> advantage_PG``, float32. Samples whose grader
failed (not valid) get 0 and do not count in any statistic, whatever their reward holds. A group
of equal rewards gets exact zeros. A single valid sample has no baseline: mean 0 and std 1 are used
in its place, so its advantage is its reward.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from aspo_jax.losses.objective import require_non_negative

Advantage = Callable[[ArrayLike, ArrayLike], Array]


def _centre(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> tuple[Array, Array]:
    """Rewards about their group's mean over valid samples, 0 elsewhere; how many are valid."""
    is_valid_PG = jnp.asarray(is_valid_PG, bool)
    reward_PG = jnp.where(is_valid_PG, jnp.asarray(reward_PG, jnp.float32), 0)
    count_P1 = is_valid_PG.sum(axis=-1, keepdims=True).astype(jnp.float32)
    mean_P1 = reward_PG.sum(axis=-1, keepdims=True) / jnp.maximum(count_P1, 1)
    highest_P1 = jnp.where(is_valid_PG, reward_PG, -jnp.inf).max(axis=-1, keepdims=True)
    lowest_P1 = jnp.where(is_valid_PG, reward_PG, jnp.inf).min(axis=-1, keepdims=True)
    # The rounded mean of equal rewards need not equal them; a z-score would blow the rest up.
    mean_P1 = jnp.where(highest_P1 == lowest_P1, highest_P1, mean_P1)
    mean_P1 = jnp.where(count_P1 > 1, mean_P1, 0)
    return jnp.where(is_valid_PG, reward_PG - mean_P1, 0), count_P1


def group_zscore(ddof: int = 1, eps: float = 1e-6) -> Advantage:
    """``A = (R - mean) / (std + eps)`` over the group. GRPO, arXiv 2402.03300 §4.1.2.

    ddof: 1 divides the variance by n - 1, 0 by n.
    eps: added to the standard deviation, in reward, 0 or more.
    """
    if ddof not in (0, 1):
        raise ValueError(f"group_zscore.ddof = {ddof}; expected 0 or 1")
    require_non_negative("group_zscore", eps=eps)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        centred_PG, count_P1 = _centre(reward_PG, is_valid_PG)
        square_P1 = jnp.square(centred_PG).sum(axis=-1, keepdims=True)
        std_P1 = jnp.sqrt(square_P1 / jnp.maximum(count_P1 - ddof, 1))
        std_P1 = jnp.where(count_P1 > 1, std_P1, 1)
        divisor_P1 = std_P1 + eps
        return centred_PG / jnp.where(divisor_P1 > 0, divisor_P1, 1)

    return advantage


def group_mean() -> Advantage:
    """``A = R - mean`` over the group, no scale. Dr. GRPO, arXiv 2503.20783."""

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        return _centre(reward_PG, is_valid_PG)[0]

    return advantage


def leave_one_out() -> Advantage:
    """``A = R - mean of the others = n / (n - 1) (R - mean)``. RLOO, arXiv 2402.14740."""

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        centred_PG, count_P1 = _centre(reward_PG, is_valid_PG)
        scale_P1 = jnp.where(count_P1 > 1, count_P1 / jnp.maximum(count_P1 - 1, 1), 1)
        return centred_PG * scale_P1

    return advantage
