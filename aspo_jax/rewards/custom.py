"""Grader ``custom``: a reward of one's own, ``package.module:function``.

    def reward(prompt: str, completion: str, answer) -> float | Verdict: ...

It runs in the killable workers like every other grader and may be as slow, or as wrong, as it
likes. An exception, or a value that is no reward, is a ``crash``: tried again once, then masked. A
number from 1 on counts as a right answer in the metrics; return a `Verdict` to say more.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from aspo_jax.imports import NotFound, load_callable
from aspo_jax.rewards.verdict import REASONS, RewardError, Submission, Verdict

Function = Callable[[str, str, Any], "float | Verdict"]


def load_function(name: str) -> Function:
    """The function behind ``package.module:function``.

    Raises:
        RewardError: there is none, or it does not take (prompt, completion, answer).
    """
    try:
        function = load_callable(name)
        inspect.signature(function).bind("prompt", "completion", "answer")
    except NotFound as problem:
        raise RewardError(f"Reward.function = {name!r}: {problem}") from problem
    except TypeError as error:
        raise RewardError(
            f"Reward.function = {name!r} cannot be called with (prompt, completion, answer): "
            f"{error}"
        ) from error
    return function


def grade(submission: Submission, function: Function) -> Verdict:
    """What the function says of a completion.

    Raises:
        TypeError, ValueError: it returned neither a finite number nor a sound `Verdict`.
    """
    said = function(submission.prompt, submission.text, submission.answer)
    if isinstance(said, bool) or not (isinstance(said, Verdict) or hasattr(said, "__float__")):
        raise TypeError(
            f"Reward.function returned {said!r:.80} of type {type(said).__name__}, expected a "
            "float or a Verdict"
        )
    if not isinstance(said, Verdict):
        reward = float(said)
        said = Verdict(reward, "match" if reward >= 1 else "mismatch")
    if said.reason not in REASONS or not math.isfinite(said.reward):
        raise ValueError(
            f"Reward.function returned {said}, expected a finite reward and a reason of {REASONS}"
        )
    return said
