"""The figures of a rollout, each said once: what is counted of its samples and what that means.

A new figure is a new line of `ROLLOUT` or `EVALUATE`: log, docs/metrics.md and the exchange between
processes follow from it. A sample is a `aspo_jax.rollout.Sample`, a group all samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.rewards import repetition
from aspo_jax.statistics import standard_error

Group = Sequence[Any]
Count = Callable[[Group], Sequence[float]]  # a number for each sample; nan: it does not count


def _mean(x_PG: np.ndarray) -> float:
    counted = x_PG[~np.isnan(x_PG)]
    return counted.mean() if counted.size else math.nan


def _share(x_PG: np.ndarray) -> float:
    """A mean; nan as soon as one sample does not count: it would be the share of a part."""
    return x_PG.mean()


def _error_of_mean(x_PG: np.ndarray) -> float:
    """Standard error over prompts; 0 for a single one, which tells nothing about it."""
    return standard_error(x_PG.mean(axis=1))


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


def _if_judged(of: Callable[[Group], float]) -> Count:
    """Something of a group's right answers; nan where a reward says neither right nor wrong."""

    def count(group: Group) -> list[float]:
        is_judged = not any(sample.verdict.is_score for sample in group)
        return [of(group) if is_judged else math.nan] * len(group)

    return count


reward = _each(lambda s: s.verdict.reward)
is_valid = _each(lambda s: s.is_valid)
_valid_reward = _each(lambda s: s.verdict.reward if s.is_valid else math.nan)
_is_right = _each(lambda s: math.nan if s.verdict.is_score else s.verdict.is_right)
_any_right = _if_judged(lambda group: bool(_right(group)))
_none_right = _if_judged(lambda group: not _right(group))
_all_right = _if_judged(lambda group: len(_right(group)) == len(group))
_distinct_right = _if_judged(lambda group: _texts(_right(group)))
_is_failed = _each(lambda s: s.verdict.is_failed)
_is_late = _each(lambda s: s.verdict.is_late)
_is_broken = _each(lambda s: s.is_broken)

response_length = _each(lambda s: len(s.completion.tokens_T))
_LENGTH = Figure(
    response_length,
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
    "solve_none": Figure(
        _none_right, "share of groups", "groups in which no sample is right", _share
    ),
    "solve_all": Figure(
        _all_right, "share of groups", "groups in which every sample is right", _share
    ),
    "valid_groups": Figure(
        None,
        "share of groups",
        "groups that train: their advantages are not all zero, or there is a teacher",
    ),
    "generation_multiplier": Figure(
        None,
        "",
        "groups drawn per Train.prompts_per_step: 1, or with Train.refill_rounds what it took to"
        " fill the step. All figures of a rollout are of these groups",
    ),
    "rounds": Figure(
        None, "rounds", "rounds of Train.prompts_per_step prompts that were asked for; 1: no refill"
    ),
    "surplus_groups": Figure(
        None,
        "groups",
        "prompts of the last round behind the one that filled the step, which are left out: not"
        " sampled, or dropped",
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
        _is_late,
        "samples",
        "samples whose grading, or that of a part of their reward, took too long; it counts as 0",
        np.sum,
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
        " verdict `match`. Absent, as all that counts right answers, where a verdict is `scored`:"
        " a reward that is no share",
        _share,
    ),
    "avg_stderr": Figure(
        _is_right, "share", "standard error of avg over the prompts", _error_of_mean
    ),
    "reward_mean": Figure(
        reward, "reward", "mean reward of the held-out samples, not shaped; 0 where a grader failed"
    ),
    "reward_stderr": Figure(
        reward, "reward", "standard error of reward_mean over the prompts", _error_of_mean
    ),
    "pass_any": Figure(
        _any_right,
        "share",
        "pass@k: held-out prompts with at least one right sample among k",
        _share,
    ),
    "distinct_right": Figure(
        _distinct_right,
        "texts",
        "mean number of different right answers among k samples",
        _share,
    ),
    "truncated": _TRUNCATED,
    "response_length": _LENGTH,
    "samples": Figure(_whole(len), "samples", "k, the samples per held-out prompt"),
}


def part_figures(names: Iterable[str]) -> dict[str, Figure]:
    """The mean of each part that rewards are made of, over the samples that have it."""
    definition = "mean of this part of the reward, not weighted, where its grader did not fail"
    return {name: Figure(_part(name), "reward", definition) for name in names}


def _part(name: str) -> Count:
    def rewarded(sample: Any) -> float:
        part = sample.verdict.parts.get(name)
        return math.nan if part is None or not part.is_valid else part.reward

    return _each(rewarded)


def figures(table: Mapping[str, Figure], counted: Mapping[Count, np.ndarray]) -> dict[str, float]:
    """The figures of a table from what was counted; those that are nan are left out."""
    counts = {name: f.count for name, f in table.items() if f.count is not None}
    made = {name: float(table[name].reduce(counted[c])) for name, c in counts.items()}
    return {name: value for name, value in made.items() if not math.isnan(value)}
