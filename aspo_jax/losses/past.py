"""Advantages that remember the earlier visits of a prompt."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from aspo_jax.losses.advantages import Advantage, Past, centred, over


def visited(past: Past, reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Past:
    """The past once these rewards have been added to it as the i-th visit.

        mean_i = ((i - 1) mean + new mean) / i
        var_i  = ((i - 1) var + new var + (i - 1) / i (new mean - mean)^2) / i

    with the variances of single visits by ddof 1. A group with fewer than two valid samples is no
    visit.
    """
    c, (visits_P, mean_P, std_P) = centred(reward_PG, is_valid_PG), map(jnp.asarray, past)
    count_P = visits_P + 1
    gap_P = c.mean_P1[:, 0] - mean_P
    variance_P = visits_P * jnp.square(std_P) + jnp.square(c.std_P1(ddof=1)[:, 0])
    variance_P = (variance_P + visits_P / count_P * jnp.square(gap_P)) / count_P
    # Not as it stands above: the mean of equal means must be that mean.
    new = Past(count_P, mean_P + gap_P / count_P, jnp.sqrt(variance_P))
    is_visit_P = c.count_P1[:, 0] > 1
    return Past(*(jnp.where(is_visit_P, x, y) for x, y in zip(new, past, strict=True)))


def prompt_smooth() -> Advantage:
    """DCPO's smooth advantage: z-scores by this visit of the prompt and by all visits, mixed.

        N = (R - mean) / std of this visit, T = the same of all visits, 0 where std = 0
        A = the smaller in size of  (i - 1) / i N + 1 / i T  and  1 / i N + (i - 1) / i T

    at the i-th visit of the prompt, counted from 1; see `visited`. At the first one it is
    `group_zscore` with eps 0.

    Asks for ``past``; a run keeps it by the ids of the prompts, in its checkpoints. Where prompts
    do not come again there is nothing to remember. A group of equal rewards has a signal where
    earlier visits differ. Fewer than two valid samples are no visit and get 0.
    Source: arXiv 2509.02333; the authors' `compute_dcpo_outcome_advantage`.
    Confidence: high: the authors' code.
    """

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike, past: Past) -> Array:
        c, total = centred(reward_PG, is_valid_PG), visited(past, reward_PG, is_valid_PG)
        share_P1 = 1 / jnp.maximum(total.visits_P, 1)[:, None]
        about_PG = c.mean_P1 - total.mean_P[:, None] + c.reward_PG
        new_PG = over(c.reward_PG, c.std_P1(ddof=1))
        all_PG = jnp.where(total.std_P[:, None] > 0, over(about_PG, total.std_P[:, None]), 0)
        of_new_PG = (1 - share_P1) * new_PG + share_P1 * all_PG
        of_all_PG = share_P1 * new_PG + (1 - share_P1) * all_PG
        smaller_PG = jnp.where(jnp.abs(of_new_PG) < jnp.abs(of_all_PG), of_new_PG, of_all_PG)
        return jnp.where(c.is_valid_PG & (c.count_P1 > 1), smaller_PG, 0)

    return advantage
