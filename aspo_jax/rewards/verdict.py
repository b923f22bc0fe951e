"""What goes to a grader and what comes back."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

Reason = Literal[
    "match",  # the answer is right
    "mismatch",  # a well-formed answer, but another value than the one asked for
    "invalid",  # not a well-formed answer: wrong form, false arithmetic, numbers not given
    "no_answer",  # nothing was written
    "truncated",  # the text did not end itself within the token limit
    "timeout",  # grading took too long and was killed
    "crash",  # the grader failed twice
    "bad_gold",  # the problem's own answer cannot be used, so nothing can match it
]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclasses.dataclass(frozen=True)
class Submission:
    """One answer to be judged.

    kind: which grader judges it (a key of `aspo_jax.rewards.GRADERS`).
    text: the response, special tokens removed.
    answer: what this grader needs to know; JSON values only, for it travels to another process.
    is_finished: True where the response ended itself (end-of-sequence within the limit).
    response_tokens: its length in tokens, for the shaping of rewards.
    """

    kind: str
    text: str
    answer: Any
    is_finished: bool
    response_tokens: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A reward and why.

    is_valid: False where the reward says nothing about the policy (timeout, crash, bad_gold);
        such a sample is counted and masked, it never enters an advantage.
    """

    reward: float
    reason: Reason
    is_valid: bool = True
