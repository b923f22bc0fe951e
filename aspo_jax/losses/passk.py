"""Advantages for pass@k: that one of k samples is right is what is rewarded."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from aspo_jax.losses.advantages import Advantage, centred, over, require_rewards
from aspo_jax.losses.objective import require_non_negative


def grpo_passk(*, is_scaled: bool = True, eps: float = 1e-6) -> Advantage:
    """GRPO-passk: the best sample of a group gets its lead, the others nothing.

        A = R_max - R_second for the best, 0 for the others; over (std + eps) if scaled

    is_scaled: divide by the standard deviation (ddof 1) of the group's rewards.
    eps: added to it, in reward, 0 or more.

    With rewards of 0 and 1 a group has a signal only where exactly one sample is right: a tie gives
    0 to all. Where fewer than two samples are valid there is none either; verl ends with an error.
    Source: arXiv 2503.19595; verl `compute_grpo_passk_outcome_advantage`.
    Confidence: medium: one port.
    """
    require_non_negative("grpo_passk", eps=eps)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        if jnp.shape(reward_PG)[-1] < 2:
            raise ValueError("grpo_passk needs two samples of a prompt or more; found 1")
        c = centred(reward_PG, is_valid_PG)
        ranked_PG = jnp.sort(jnp.where(c.is_valid_PG, c.reward_PG, -jnp.inf), axis=-1)
        best_P1, second_P1 = ranked_PG[:, -1:], ranked_PG[:, -2:-1]
        lead_P1 = jnp.where(c.count_P1 > 1, best_P1 - second_P1, 0)
        if is_scaled:
            lead_P1 = over(lead_P1, c.std_P1(ddof=1) + eps)
        return jnp.where(c.is_valid_PG & (c.reward_PG == best_P1), lead_P1, 0)

    return advantage


def passk(*, k: int = 4, eps: float = 1e-6) -> Advantage:
    """Analytic pass@k: the mean z-score of the k-subsets that a sample is in.

        rho = 1 - C(n - c, k) / C(n, k)        share of k-subsets with a right one, c right of n
        s = sqrt(rho (1 - rho))
        right:  A = (1 - rho) / (s + eps)
        wrong:  A = (1 - rho - C(n - c - 1, k - 1) / C(n - 1, k - 1)) / (s + eps)

    k: samples of which one is to be right, at least 1; 4 is ours, the authors' scripts differ.
    eps: added to the standard deviation, 0 or more.

    Rewards must be exactly 0 or 1. A sums to 0 over the group; it is 0 for all where none is right,
    where more than n - k are, and where fewer than k samples are valid.
    Source: the authors' code, RUCAIBox Passk_Training `passk_adv.py` (arXiv 2508.10751).
    Confidence: high: the authors' code.
    """
    if k < 1:
        raise ValueError(f"passk.k = {k}; expected at least 1")
    require_non_negative("passk", eps=eps)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        if k > (G := jnp.shape(reward_PG)[-1]):
            raise ValueError(f"passk.k = {k}; expected at most the {G} samples of a prompt")
        require_rewards("passk", _is_binary, "rewards of 0 and 1", (reward_PG, is_valid_PG))
        is_valid_PG = jnp.asarray(is_valid_PG, bool)
        is_right_PG = is_valid_PG & (jnp.asarray(reward_PG) == 1)
        n_P1, c_P1 = (x.sum(axis=-1, keepdims=True) for x in (is_valid_PG, is_right_PG))
        none_P1 = _drawn_wrong(n_P1 - c_P1, n_P1, k)  # 1 - rho
        others_P1 = _drawn_wrong(n_P1 - c_P1 - 1, n_P1 - 1, k - 1)
        gain_PG = jnp.where(is_right_PG, none_P1, none_P1 - others_P1)
        std_P1 = jnp.sqrt(none_P1 * (1 - none_P1))
        has_signal_P1 = (n_P1 >= k) & (std_P1 > 0)
        return jnp.where(is_valid_PG & has_signal_P1, over(gain_PG, std_P1 + eps), 0)

    return advantage


def _is_binary(x: np.ndarray) -> np.ndarray:
    return (x == 0) | (x == 1)


def _drawn_wrong(wrong_P1: Array, n_P1: Array, k: int) -> Array:
    """C(wrong, k) / C(n, k): the chance that k of n drawn without replacement are all wrong."""
    drawn_1K = jnp.arange(k)[None]
    left_PK = jnp.maximum(wrong_P1 - drawn_1K, 0) / jnp.maximum(n_P1 - drawn_1K, 1)
    return left_PK.prod(axis=-1, keepdims=True)
