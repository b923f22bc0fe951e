"""Advantages from several rewards, each by itself."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from aspo_jax.losses.advantages import Advantage, UnfitReward, centred, over
from aspo_jax.losses.objective import require_non_negative


def gdpo(*, eps: float = 1e-4) -> Advantage:
    """GDPO: a z-score of each reward in its group, their weighted sum scaled over the batch.

        S = sum_k w_k (R_k - mean_k) / (std_k + eps)        mean_k, std_k: of the group, ddof 1
        A = S / (std + eps)                                 std: of S over all samples, ddof 1

    eps: added to each standard deviation, in reward, 0 or more.

    Asks for ``parts`` and their ``weights`` (in a run `Reward.functions` and `Reward.weights`; the
    grader's own has weight 1). What shapes add to the reward is in no part, so it is refused; write
    it as a function. The mean of S over the samples is 0 already.
    The sources differ: the authors' TRL whitens over samples with eps 1e-4, which is this, as is
    "normalize_then_sum" of TRL; the authors' verl and verl 0.9.1 whiten over tokens, so that longer
    answers weigh more; NeMo-RL has no eps in the last standard deviation.
    Source: arXiv 2601.05242; the authors' code (NVlabs GDPO).
    Confidence: high: the authors' code.
    """
    require_non_negative("gdpo", eps=eps)

    def advantage(
        reward_PG: ArrayLike,
        is_valid_PG: ArrayLike,
        parts: Mapping[str, ArrayLike],
        weights: Mapping[str, float] | None = None,
    ) -> Array:
        weight_of = dict.fromkeys(parts, 1.0) if weights is None else weights
        _check_sum(reward_PG, is_valid_PG, parts, weight_of)
        is_valid_PG = jnp.asarray(is_valid_PG, bool)
        sum_PG = jnp.zeros(is_valid_PG.shape)
        for name, part_PG in parts.items():
            c = centred(part_PG, is_valid_PG & ~jnp.isnan(jnp.asarray(part_PG)))
            sum_PG += weight_of[name] * jnp.where(c.count_P1 > 1, c.over_std(1, eps), 0)
        count = is_valid_PG.sum()
        std = jnp.sqrt(jnp.square(sum_PG).sum() / jnp.maximum(count - 1, 1))
        return over(sum_PG, std + eps)

    return advantage


def _check_sum(
    reward_PG: ArrayLike,
    is_valid_PG: ArrayLike,
    parts: Mapping[str, ArrayLike],
    weight_of: Mapping[str, float],
) -> None:
    """Raise an UnfitReward where the reward is not the weighted sum of its parts."""
    reward_PG = np.asarray(reward_PG, np.float32)
    sum_PG = sum(weight_of[name] * np.nan_to_num(np.asarray(x)) for name, x in parts.items())
    off_PG = np.asarray(is_valid_PG, bool) & ~np.isclose(reward_PG, sum_PG, atol=1e-4)
    if off_PG.any():
        p, g = np.argwhere(off_PG)[0]
        raise UnfitReward(
            f"gdpo needs rewards that are the weighted sum of {', '.join(parts)}; found "
            f"{reward_PG[p, g]:g} for {np.asarray(sum_PG)[p, g]:g}: a shape of the reward "
            "(Reward.shapes, Reward.overlong_buffer) is in none of them; make it one of "
            "Reward.functions"
        )
