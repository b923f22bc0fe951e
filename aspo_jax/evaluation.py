"""Held-out scores: avg@k, pass@k and the number of distinct right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """Held-out figures of one policy, k samples per prompt.

    avg: mean over prompts of the share of right samples (avg@k).
    avg_stderr: its standard error over prompts.
    pass_any: share of prompts with at least one right sample (pass@k with n = k).
    distinct_right: mean over prompts of the number of different right texts.
    truncated: share of samples cut at the length limit.
    response_length: mean length.
    """

    avg: float
    avg_stderr: float
    pass_any: float
    distinct_right: float
    truncated: float
    response_length: float


def scores(
    is_right_PG: np.ndarray,
    texts_PG: Sequence[Sequence[str]],
    is_finished_PG: np.ndarray,
    tokens_PG: np.ndarray,
) -> Scores:
    """Score P prompts with G = k samples each."""
    share_P = is_right_PG.mean(axis=1)
    right_texts = [
        {text for text, is_right in zip(texts, row, strict=True) if is_right}
        for texts, row in zip(texts_PG, is_right_PG, strict=True)
    ]
    prompts = len(share_P)
    return Scores(
        avg=float(share_P.mean()),
        avg_stderr=float(share_P.std(ddof=1) / np.sqrt(prompts)) if prompts > 1 else 0.0,
        pass_any=float(is_right_PG.any(axis=1).mean()),
        distinct_right=float(np.mean([len(texts) for texts in right_texts])),
        truncated=float(1.0 - is_finished_PG.mean()),
        response_length=float(tokens_PG.mean()),
    )
