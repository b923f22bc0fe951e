"""What goes to a grader and what comes back."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from aspo_jax.errors import UserError


class RewardError(UserError):
    """Graders that cannot do their work at all: what was found, expected, and the remedy."""


Reason = Literal[
    "match",  # the answer is right
    "mismatch",  # a well-formed answer, but another value than the one asked for
    "invalid",  # not a well-formed answer: wrong form, false arithmetic, numbers not given
    "no_answer",  # nothing was written, or no answer is found in it
    "truncated",  # the text did not end itself within the token limit
    "error",  # a program ended with an error or without a result
    "exhausted",  # too much memory, disk or output was asked for
    "timeout",  # running or grading it took longer than an answer may take
    "crash",  # the grader failed twice
    "bad_gold",  # the problem's own answer cannot be used, so nothing can match it
]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclasses.dataclass(frozen=True)
class Submission:
    """One answer to be judged.

    kind: which grader judges it (a key of `aspo_jax.rewards.KINDS`).
    text: the response, special tokens removed.
    answer: what this grader needs to know; JSON values only, for it travels to another process.
    is_finished: True where the response ended itself (end-of-sequence within the limit).
    response_tokens: its length in tokens, for the shaping of rewards.
    prompt: what was asked, as the policy saw it.
    identity: names this sample in its run; whatever a grader draws by chance, it draws by this.
    iteration: how many iterations the run had done.
    """

    kind: str
    text: str
    answer: Any
    is_finished: bool
    response_tokens: int
    prompt: str = ""
    identity: str = ""
    iteration: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A reward and why.

    is_valid: False where the reward says nothing about the policy (crash, bad_gold): such a sample
        is counted and masked, it never enters an advantage. An answer that hangs its grader is
        wrong and stays: its reward is 0.
    """

    reward: float
    reason: Reason
    is_valid: bool = True
