"""The figures of a rollout, each said once: what is counted of its samples and what that means.

A new figure is a new line of `ROLLOUT` or `EVALUATE`: log, docs/metrics.md and the exchange between
processes follow from it. A sample is a `aspo_jax.rollout.Sample`, a group all samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.rewards import repetition

Group = Sequence[Any]
Count = Callable[[Group], Sequence[float]]  # a number for each sample; nan: it does not count


def _mean(x_PG: np.ndarray) -> float:
    counted = x_PG[~np.isnan(x_PG)]
    return counted.mean() if counted.size else math.nan


def _error_of_mean(x_PG: np.ndarray) -> float:
    """Standard error over prompts; 0 for a single one, which tells nothing about it."""
    mean_P = x_PG.mean(axis=1)
    return mean_P.std(ddof=1) / math.sqrt(len(mean_P)) if len(mean_P) > 1 else 0.0


class Figure(NamedTuple):
    """One number of a rollout.

    count: what is counted of each sample; None: it is made of something else, in `assemble`.
    reduce: the counts of P prompts x G samples -> the number; nan where there is none.
    """

    count: Count | None
    unit: str
    definition: str
    reduce: Callable[[np.ndarray], Any] = _mean


def _each(of: Callable[[Any], float]) -> Count:
    """Something of each sample."""
    return lambda group: [of(sample) for sample in group]


def _whole(of: Callable[[Group], float]) -> Count:
    """Something of the group, counted of each of its samples."""
    return lambda group: [of(group)] * len(group)


def _right(group: Group) -> list[Any]:
    return [sample for sample in group if sample.verdict.is_right]


def _texts(group: Group) -> int:
    return len({sample.text for sample in group})


reward = _each(lambda s: s.verdict.reward)
is_valid = _each(lambda s: s.is_valid)
_valid_reward = _each(lambda s: s.verdict.reward if s.is_valid else math.nan)
_is_right = _each(lambda s: s.verdict.is_right)
_any_right = _whole(lambda group: bool(_right(group)))
_none_right = _whole(lambda group: not _right(group))
_all_right = _whole(lambda group: len(_right(group)) == len(group))
_is_failed = _each(lambda s: s.verdict.is_failed)
_is_late = _each(lambda s: s.verdict.reason == "timeout")
_is_broken = _each(lambda s: s.is_broken)

_LENGTH = Figure(
    _each(lambda s: len(s.completion.tokens_T)),
    "tokens",
    "mean number of response tokens, the end token included",
)
_TRUNCATED = Figure(
    _each(lambda s: not s.completion.is_finished),
    "share of samples",
    "samples cut off before they ended themselves",
)
ROLLOUT: Mapping[str, Figure] = {
    "reward_mean": Figure(
        _valid_reward,
        "reward",
        "mean reward, as shaped, of the samples that are not masked: neither grader nor sampler"
        " failed, and no shape (mask_truncated) took them out",
    ),
    "solve_none": Figure(_none_right, "share of groups", "groups in which no sample is right"),
    "solve_all": Figure(_all_right, "share of groups", "groups in which every sample is right"),
    "valid_groups": Figure(
        None, "share of groups", "groups whose advantages are not all zero, so that they train"
    ),
    "response_length": _LENGTH,
    "truncated": _TRUNCATED,
    "repetition": Figure(
        _each(lambda s: repetition(s.text)),
        "share of 20-grams",
        "mean share of a response's 20-grams of words already seen in that response; 0 if shorter",
    ),
    "distinct_answers": Figure(
        _whole(_texts), "texts", "mean number of different response texts in a group"
    ),
    "grader_failures": Figure(
        _is_failed,
        "samples",
        "samples masked because their grader failed twice or the problem's own answer is unusable",
        np.sum,
    ),
    "grader_timeouts": Figure(
        _is_late, "samples", "samples whose grading took too long; their reward is 0", np.sum
    ),
    "sampler_failures": Figure(
        _is_broken,
        "samples",
        "samples masked because they ended in a distribution that is not finite",
        np.sum,
    ),
    "train_tokens": Figure(None, "tokens", "prompt and response tokens in one pass of the updates"),
    "packing_waste": Figure(
        None, "share of tokens", "slots of the training rows that hold no token"
    ),
}
EVALUATE: Mapping[str, Figure] = {
    "avg": Figure(
        _is_right,
        "share",
        "avg@k: held-out samples that are right, k = Evaluate.samples per prompt. Right is the"
        " verdict `match`; of numbers that a Reward.function returns, those from 1 on",
    ),
    "avg_stderr": Figure(
        _is_right, "share", "standard error of avg over the prompts", _error_of_mean
    ),
    "reward_mean": Figure(
        reward, "reward", "mean reward of the held-out samples, not shaped; 0 where a grader failed"
    ),
    "pass_any": Figure(
        _any_right, "share", "pass@k: held-out prompts with at least one right sample among k"
    ),
    "distinct_right": Figure(
        _whole(lambda group: _texts(_right(group))),
        "texts",
        "mean number of different right answers among k samples",
    ),
    "truncated": _TRUNCATED,
    "response_length": _LENGTH,
    "samples": Figure(_whole(len), "samples", "k, the samples per held-out prompt"),
}


def figures(table: Mapping[str, Figure], counted: Mapping[Count, np.ndarray]) -> dict[str, float]:
    """The figures of a table from what was counted; those that are nan are left out."""
    counts = {name: f.count for name, f in table.items() if f.count is not None}
    made = {name: float(table[name].reduce(counted[c])) for name, c in counts.items()}
    return {name: value for name, value in made.items() if not math.isnan(value)}
