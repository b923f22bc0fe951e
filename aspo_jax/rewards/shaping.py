"""What is done to verdicts before advantages see them, and what is measured on a text besides.

A `Shape` is a pure function from the judged groups of a step, one group of samples per prompt, to
their verdicts. `chain` composes; lengths are in tokens; a verdict that is not valid is left alone.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from aspo_jax.rewards.verdict import Submission, Verdict

Judged = tuple[Submission, Verdict]
Groups = Sequence[Sequence[Judged]]
Shape = Callable[[Groups], list[list[Verdict]]]


def unshaped(groups: Groups) -> list[list[Verdict]]:
    """The verdicts themselves."""
    return [[verdict for _, verdict in group] for group in groups]


def chain(*shapes: Shape) -> Shape:
    """One shape after the other."""

    def shape(groups: Groups) -> list[list[Verdict]]:
        verdicts = unshaped(groups)
        for apply in shapes:
            verdicts = apply(
                [
                    [(submission, v) for (submission, _), v in zip(group, shaped, strict=True)]
                    for group, shaped in zip(groups, verdicts, strict=True)
                ]
            )
        return verdicts

    return shape


def _each(change: Callable[[Submission, Verdict], Verdict]) -> Shape:
    """A shape that looks at one valid sample at a time."""

    def shape(groups: Groups) -> list[list[Verdict]]:
        return [[change(s, v) if v.is_valid else v for s, v in group] for group in groups]

    return shape


def _plus(verdict: Verdict, amount: float) -> Verdict:
    return dataclasses.replace(verdict, reward=verdict.reward + amount)


def _check(name: str, **conditions: tuple[float, bool, str]) -> None:
    for argument, (value, is_fine, expected) in conditions.items():
        if not is_fine:
            raise ValueError(f"{name}: {argument} is {value}, expected {expected}")


def overlong_ramp(max_tokens: int, buffer: int, factor: float) -> Shape:
    """A linear fine on the last ``buffer`` tokens before the limit (DAPO, 2503.14476, eq. 13).

        reward + factor * min(0, -(length - (max_tokens - buffer)) / buffer)

    Nothing up to ``max_tokens - buffer`` tokens, then down to ``-factor`` at the limit. The
    official ASPO code runs it with buffer 16 and factor 1, so that a truncated wrong answer earns
    -1 and a truncated right one 0. ``buffer=0`` turns it off.

    Raises:
        ValueError: a buffer outside 0..max_tokens, or a negative factor.
    """
    _check(
        "overlong_ramp",
        buffer=(buffer, 0 <= buffer <= max_tokens, f"0 (off) to max_tokens = {max_tokens}"),
        factor=(factor, factor >= 0, "a number >= 0"),
    )
    if buffer == 0:
        return unshaped

    def fine(submission: Submission, verdict: Verdict) -> Verdict:
        excess = submission.response_tokens - (max_tokens - buffer)
        return _plus(verdict, -factor * max(0, excess) / buffer)

    return _each(fine)


def mask_truncated() -> Shape:
    """Leave cut-off answers out of the update (overlong filtering, 2503.14476, section 3.4)."""

    def mask(submission: Submission, verdict: Verdict) -> Verdict:
        return verdict if submission.is_finished else dataclasses.replace(verdict, is_valid=False)

    return _each(mask)


def grpo_lambda(top: float = 0.2, alpha: float = 0.6) -> Shape:
    """GRPO-lambda: fine the length of right answers where most answers are right.

        reward - alpha * sigmoid((length - mean) / std)

    with the mean and standard deviation of the lengths of the group's right answers, in the
    ``top`` share of groups, ranked by their share of right answers; ties go by the order of
    the prompts. Wrong answers are left alone, as are all answers of the other groups. A ``std`` of
    0 counts as 1.

    top: share of the groups that are fined, those with most right answers; 0 to 1.
    alpha: the fine's largest size, as reward; 0 to 1.

    Other papers are called so too: 2510.00194 (lambda-returns), lambda-GRPO 2510.06870.

    Raises:
        ValueError: top or alpha outside 0..1.

    Source: arXiv 2505.18086; the formula. Sample code for it pays wrong answers by length as well.
    Confidence: medium: a third party's description.
    """
    _check(
        "grpo_lambda",
        top=(top, 0 <= top <= 1, "a share from 0 to 1"),
        alpha=(alpha, 0 <= alpha <= 1, "a number from 0 to 1"),
    )

    def shape(groups: Groups) -> list[list[Verdict]]:
        ranked = sorted(range(len(groups)), key=lambda p: -_share_right(groups[p]))
        chosen = set(ranked[: int(top * len(groups))])
        plain = unshaped(groups)
        return [
            _fine_length(group, alpha) if p in chosen else plain[p]
            for p, group in enumerate(groups)
        ]

    return shape


def _is_right(verdict: Verdict) -> bool:
    return verdict.is_valid and verdict.is_right


def _share_right(group: Sequence[Judged]) -> float:
    return sum(_is_right(verdict) for _, verdict in group) / max(1, len(group))


def _fine_length(group: Sequence[Judged], alpha: float) -> list[Verdict]:
    lengths = [s.response_tokens for s, verdict in group if _is_right(verdict)]
    if not lengths:
        return [verdict for _, verdict in group]
    mean, std = statistics.fmean(lengths), statistics.pstdev(lengths) or 1.0
    return [
        _plus(verdict, -alpha / (1 + math.exp((mean - s.response_tokens) / std)))
        if _is_right(verdict)
        else verdict
        for s, verdict in group
    ]


def curriculum_budget(
    start: int = 256, decay: float = 0.9, every: int = 10, weight: float = 0.1
) -> Shape:
    """Train Long, Think Short: pay for lengths near a budget that shrinks in training.

        reward + weight * max(0, 1 - |length - B| / B)      B = max(1, start * decay^(i // every))

    at iteration i. The paper puts the budget into the prompt too, which a shape cannot do.

    start: the first budget in tokens, at least 1.
    decay: what the budget is multiplied with, above 0 and at most 1.
    every: iterations between two decays, at least 1.
    weight: reward for a length of exactly the budget, 0 or more.

    Right answers and form are paid apart, by the grader and `format_reward`.

    Raises:
        ValueError: a budget or period below 1, a decay outside (0, 1], a negative weight.

    Unverified: the triangle, and the defaults of decay, every and weight, which are ours; the
    schedule and its start are the paper's.
    Source: arXiv 2508.08940.
    Confidence: low: secondary text only.
    """
    _check(
        "curriculum_budget",
        start=(start, start >= 1, "at least 1 token"),
        decay=(decay, 0 < decay <= 1, "a number above 0 and at most 1"),
        every=(every, every >= 1, "at least 1 iteration"),
        weight=(weight, weight >= 0, "a reward >= 0"),
    )

    def pay(submission: Submission, verdict: Verdict) -> Verdict:
        budget = max(1.0, start * decay ** (submission.iteration // every))
        gap = abs(submission.response_tokens - budget) / budget
        return _plus(verdict, weight * max(0.0, 1.0 - gap))

    return _each(pay)


def format_reward(weight: float = 0.1) -> Shape:
    """Pay for one thinking block with an answer after it (the format reward of 2501.12948).

    The opening tag may be missing, for many chat templates end the prompt with it.

    weight: reward for the form, 0 or more.

    Raises:
        ValueError: a negative weight.
    """
    _check("format_reward", weight=(weight, weight >= 0, "a reward >= 0"))

    def pay(submission: Submission, verdict: Verdict) -> Verdict:
        thought, _, said = submission.text.partition("</think>")
        thought = thought.strip().removeprefix("<think>")
        has_more = any("think>" in part for part in (thought, said))
        is_formed = bool(thought.strip() and said.strip()) and not has_more
        return _plus(verdict, weight) if is_formed else verdict

    return _each(pay)


SHAPES = {
    "curriculum_budget": curriculum_budget,
    "format_reward": format_reward,
    "grpo_lambda": grpo_lambda,
    "mask_truncated": mask_truncated,
}


def repetition(text: str, n: int = 20) -> float:
    """Share of word n-grams that occurred before in the same text, in [0, 1].

    Lower-cased, split on white space; 0 for fewer than ``n`` words. The official ASPO code logs
    it with n = 20 (verl/workers/reward_manager/wizard.py).
    """
    words = text.lower().split()
    total = len(words) - n + 1
    if total <= 0:
        return 0.0
    distinct = len({tuple(words[i : i + n]) for i in range(total)})
    return (total - distinct) / total
