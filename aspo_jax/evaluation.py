"""Held-out scores: avg@k, pass@k, mean reward and the number of distinct right answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """Held-out figures of one policy, k samples per prompt.

    A sample is right if its verdict is `match`, whatever its reward.

    avg: mean over prompts of the share of right samples (avg@k).
    avg_stderr: its standard error over prompts.
    reward_mean: mean reward as graded; a failed grader counts 0, as it does in avg.
    pass_any: share of prompts with at least one right sample (pass@k with n = k).
    distinct_right: mean over prompts of the number of different right texts.
    truncated: share of samples cut at the length limit.
    response_length: mean length.
    samples: k.
    """

    avg: float
    avg_stderr: float
    reward_mean: float
    pass_any: float
    distinct_right: float
    truncated: float
    response_length: float
    samples: float


def scores(
    reward_PG: np.ndarray,
    is_right_PG: np.ndarray,
    distinct_right_P: np.ndarray,
    is_finished_PG: np.ndarray,
    tokens_PG: np.ndarray,
) -> Scores:
    """Score P prompts with G = k samples each.

    distinct_right_P: number of different right texts among each prompt's samples.
    """
    share_P = is_right_PG.mean(axis=1)
    prompts = len(share_P)
    return Scores(
        avg=float(share_P.mean()),
        avg_stderr=float(share_P.std(ddof=1) / np.sqrt(prompts)) if prompts > 1 else 0.0,
        reward_mean=float(reward_PG.mean(dtype=np.float64)),
        pass_any=float(is_right_PG.any(axis=1).mean()),
        distinct_right=float(distinct_right_P.mean()),
        truncated=float(1.0 - is_finished_PG.mean()),
        response_length=float(tokens_PG.mean()),
        samples=float(tokens_PG.shape[1]),
    )
