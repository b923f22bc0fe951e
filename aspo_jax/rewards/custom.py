"""Grader ``custom``: a reward of one's own, ``package.module:function``.

    def reward(prompt: str, completion: str, answer) -> float | Verdict: ...

It runs in the killable workers like every other grader and may be as slow, or as wrong, as it
likes. An exception, or a value that is no reward, is a ``crash``: tried again once, then masked. A
number from 1 on counts as a right answer in the metrics; return a `Verdict` to say more.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

from aspo_jax.rewards.verdict import REASONS, RewardError, Submission, Verdict

Function = Callable[[str, str, Any], "float | Verdict"]


def load_function(name: str) -> Function:
    """The function behind ``package.module:function``.

    Raises:
        RewardError: there is none, or it does not take (prompt, completion, answer).
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise RewardError(
            f"Reward.function = {name!r}, expected 'package.module:function', for instance "
            "'my_rewards:length_penalty' for the function length_penalty in my_rewards.py"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"Reward.function = {name!r}: cannot import {module_name} ({type(error).__name__}: "
            f"{error}); run from the folder it lies in, install it, or put it on PYTHONPATH"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        names = sorted(n for n, f in vars(module).items() if inspect.isfunction(f))
        raise RewardError(
            f"Reward.function = {name!r}: {module_name} has no function {function_name!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
    try:
        inspect.signature(function).bind("prompt", "completion", "answer")
    except TypeError as error:
        raise RewardError(
            f"Reward.function = {name!r} cannot be called with (prompt, completion, answer): "
            f"{error}"
        ) from error
    return cast(Function, function)


def grade(submission: Submission, function: Function) -> Verdict:
    """What the function says of a completion.

    Raises:
        TypeError, ValueError: it returned neither a finite number nor a sound `Verdict`.
    """
    said = function(submission.prompt, submission.text, submission.answer)
    if isinstance(said, Verdict):
        if said.reason not in REASONS or not math.isfinite(said.reward):
            raise ValueError(
                f"{_name(function)} returned {said}, expected a finite reward and {REASONS}"
            )
        return said
    if isinstance(said, bool) or not hasattr(said, "__float__"):
        raise TypeError(
            f"{_name(function)} returned {said!r:.80} of type {type(said).__name__}, expected a "
            "float or a Verdict"
        )
    reward = float(said)
    if not math.isfinite(reward):
        raise ValueError(f"{_name(function)} returned {reward}, expected a finite number")
    return Verdict(reward, "match" if reward >= 1 else "mismatch")


def _name(function: Function) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', function)}"
