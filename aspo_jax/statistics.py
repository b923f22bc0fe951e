"""Scores of P problems with G samples each, and how sure they are. NumPy alone.

Figures are means over problems; their uncertainty is that of having drawn these problems: intervals
resample problems (with all their samples), never samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95


class Estimate(NamedTuple):
    """A mean over problems.

    stderr: its standard error; 0 of a single problem, which tells nothing about it.
    low, high: the bootstrap interval of `LEVEL`.
    """

    value: float
    stderr: float
    low: float
    high: float


def estimate(score_P: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """The mean of one score per problem; the percentile bootstrap draws problems anew.

    Raises:
        ValueError: no problem.
    """
    score_P = np.asarray(score_P, float)
    if not score_P.size:
        raise ValueError("found no problem, expected at least one")
    drawn = np.random.default_rng(seed).integers(len(score_P), size=(resamples, len(score_P)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(score_P[drawn].mean(axis=1), (tail, 1 - tail))
    return Estimate(float(score_P.mean()), standard_error(score_P), float(low), float(high))


def standard_error(score_P: np.ndarray) -> float:
    """Of the mean over problems; 0 for a single one."""
    count = len(score_P)
    return float(np.std(score_P, ddof=1) / math.sqrt(count)) if count > 1 else 0.0


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... below the number of samples, and that number."""
    return [2**i for i in range((samples - 1).bit_length())] + [samples]


def pass_at(right_PG: np.ndarray, j: int) -> np.ndarray:
    """Of each problem the chance that one of j samples, drawn from its G, is right.

    The unbiased estimator of arXiv 2107.03374: 1 - C(G - c, j) / C(G, j) with c right of G.

    Raises:
        ValueError: j is not among 1 to G.
    """
    right_PG = np.asarray(right_PG, bool)
    G = right_PG.shape[1]
    if not 1 <= j <= G:
        raise ValueError(f"found pass@{j} of {G} samples, expected 1 to {G}")
    wrong_P = G - right_PG.sum(axis=1)
    # prod over i < j of (wrong - i) / (G - i), each factor at most 1 and never below 0
    i = np.arange(j)
    return 1.0 - np.prod(np.clip(wrong_P[:, None] - i, 0, None) / (G - i), axis=1)


def majority(votes_PG: Sequence[Sequence[Hashable | None]], right_PG: np.ndarray) -> np.ndarray:
    """Of each problem the chance that its most frequent answer is right.

    votes_PG: the answer of each sample, equal ones being one answer; None: it has none, and does
        not vote. Among equally frequent answers one is drawn, of which this is the expected value.
        An answer whose samples were judged both right and wrong is right by their share.
    """
    right_PG = np.asarray(right_PG, float)
    return np.array([_majority(v, r) for v, r in zip(votes_PG, right_PG, strict=True)])


def _majority(votes_G: Sequence[Hashable | None], right_G: np.ndarray) -> float:
    judged: dict[Hashable, list[float]] = {}
    for vote, right in zip(votes_G, right_G, strict=True):
        if vote is not None:
            judged.setdefault(vote, []).append(right)
    most = max(map(len, judged.values()), default=0)
    shares = [sum(each) / most for each in judged.values() if len(each) == most]
    return sum(shares) / len(shares) if shares else 0.0
