"""What goes to a grader and what comes back; light, for both sides of the pool import it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from aspo_jax.errors import UserError


class RewardError(UserError):
    """Graders that cannot do their work at all: what was found, expected, and the remedy."""


Tier = Literal["namespaces", "landlock", "rlimits"]
Reason = Literal[
    "match",  # the answer is right
    "mismatch",  # a well-formed answer, but another value than the one asked for
    "scored",  # a reward that is no share, as 3.7 or -1: it says neither right nor wrong
    "invalid",  # not a well-formed answer: wrong form, false arithmetic, numbers not given
    "no_answer",  # nothing was written, or no answer is found in it
    "truncated",  # the text did not end itself within the token limit
    "error",  # a program ended with an error or without a result
    "exhausted",  # too much memory, disk or output was asked for
    "timeout",  # running or grading it took longer than an answer may take
    "crash",  # the grader failed twice: by an error of its own, or it ended
    "bad_gold",  # the problem's own answer cannot be used, so nothing can match it
]
REASONS: tuple[Reason, ...] = get_args(Reason)
FAILED: tuple[Reason, ...] = ("crash", "bad_gold")  # they say nothing about the answer


@dataclasses.dataclass(frozen=True)
class Rules:
    """How graders judge. Plain values: they travel to the workers.

    timeout_s: seconds for an answer of any kind but ``code``.
    grade_truncated: a ``math`` text that was cut off may be judged by the formula or number that
        stands last in it, and not only by what it calls its answer.
    functions: those of one's own, each ``package.module:function``.
    weights: what the reward of each is multiplied with; none: 1.
    sandbox: tier that programs run in; ``auto`` is the safest that withstands the probe's attacks.
    test_timeout_s, test_memory_mib: limits of each test of a program.
    program_timeout_s: seconds for all tests of a program.
    max_tests: tests drawn per program, by the seed and the submission's identity; 0 = all.
    """

    timeout_s: float = 5.0
    grade_truncated: bool = False
    functions: Sequence[str] = ()
    weights: Sequence[float] = ()
    sandbox: Literal["auto"] | Tier = "auto"
    test_timeout_s: float = 6.0
    test_memory_mib: int = 1024
    program_timeout_s: float = 60.0
    max_tests: int = 0
    seed: int = 0


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
    row: the other columns of its data row; JSON values only.
    """

    kind: str
    text: str
    answer: Any
    is_finished: bool
    response_tokens: int
    prompt: str = ""
    identity: str = ""
    iteration: int = 0
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A reward and why.

    is_valid: False where the sample may not be learned from: its grader failed, or a shape took it
        out (`mask_truncated`). It is counted and masked, it never enters an advantage. An answer
        that hangs its grader is wrong and stays: its reward is 0.
    parts: of a reward that is made of several, what each says, by its name and not weighted.
    """

    reward: float
    reason: Reason
    is_valid: bool = True
    parts: Mapping[str, Verdict] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def is_right(self) -> bool:
        return self.reason == "match"

    @property
    def is_score(self) -> bool:
        """Neither right nor wrong."""
        return self.reason == "scored"

    @property
    def is_late(self) -> bool:
        """The grading, or that of a part, took too long."""
        return self.reason == "timeout" or any(part.is_late for part in self.parts.values())

    @property
    def is_failed(self) -> bool:
        """The grader could not do its work, which says nothing about the answer."""
        return self.reason in FAILED


CRASH = Verdict(0.0, "crash", is_valid=False)
BAD_GOLD = Verdict(0.0, "bad_gold", is_valid=False)


def compared(is_right: bool) -> Verdict:
    """The verdict on a well-formed answer that is the one asked for, or is not."""
    return Verdict(1.0, "match") if is_right else Verdict(0.0, "mismatch")


def weighted(parts: Mapping[str, Verdict], weights: Sequence[float]) -> Verdict:
    """The verdict of several: the weighted sum, right or wrong as the first says.

    A part that failed fails the whole, and one that is masked masks it.
    """
    failed = next((part for part in parts.values() if part.is_failed), None)
    if failed is not None:
        return dataclasses.replace(failed, parts=parts)
    return Verdict(
        reward=sum(w * part.reward for w, part in zip(weights, parts.values(), strict=True)),
        reason=next(iter(parts.values())).reason,
        is_valid=all(part.is_valid for part in parts.values()),
        parts=parts,
    )
