"""What is added to a verdict's reward, and what is measured on a text besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from aspo_jax.rewards.verdict import Submission, Verdict

Shape = Callable[[Submission, Verdict], Verdict]


def unshaped(submission: Submission, verdict: Verdict) -> Verdict:
    """The verdict itself."""
    return verdict


def overlong_ramp(max_tokens: int, buffer: int, factor: float) -> Shape:
    """A linear fine on the last ``buffer`` tokens before the limit (DAPO, 2503.14476, eq. 13).

        reward + factor * min(0, -(length - (max_tokens - buffer)) / buffer)

    Nothing up to ``max_tokens - buffer`` tokens, then down to ``-factor`` at the limit. The
    official ASPO code runs it with buffer 16 and factor 1, so that a truncated wrong answer earns
    -1 and a truncated right one 0. ``buffer=0`` turns it off. Invalid verdicts are left alone.

    Raises:
        ValueError: a buffer outside 0..max_tokens, or a negative factor.
    """
    if not 0 <= buffer <= max_tokens:
        raise ValueError(
            f"overlong_ramp: buffer is {buffer}, expected 0 (off) to max_tokens = {max_tokens}"
        )
    if not factor >= 0:
        raise ValueError(f"overlong_ramp: factor is {factor}, expected a number >= 0")
    if buffer == 0:
        return unshaped

    def shape(submission: Submission, verdict: Verdict) -> Verdict:
        excess = submission.response_tokens - (max_tokens - buffer)
        if excess <= 0 or not verdict.is_valid:
            return verdict
        return dataclasses.replace(verdict, reward=verdict.reward - factor * excess / buffer)

    return shape


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
