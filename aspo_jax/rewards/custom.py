"""Rewards of one's own, each a ``package.module:function``.

    def reward(completion: str, answer, row) -> float | Verdict: ...
    def judge(prompt: str, completions: list[str], row) -> list[float | Verdict]: ...

What a function gets is decided by the names of its parameters (`FILLED`). One with ``completions``
judges all samples of a prompt at once. They run in the killable workers like every other grader
and may be as slow, or as wrong, as they like. An exception, or a value that is no reward, is a
``crash``: tried again once, then masked.

A number says right (1), wrong (0 up to 1) or, beyond that range, neither: ``scored``. Return a
`Verdict` to say more.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from aspo_jax.errors import nearest
from aspo_jax.imports import NotFound, load_callable
from aspo_jax.rewards.verdict import REASONS, RewardError, Submission, Verdict

_OF_PROMPT: Mapping[str, Callable[[Submission], Any]] = {
    "prompt": lambda s: s.prompt,
    "answer": lambda s: s.answer,
    "row": lambda s: s.row,
    "kind": lambda s: s.kind,
    "iteration": lambda s: s.iteration,
}
_OF_SAMPLE: Mapping[str, Callable[[Submission], Any]] = {  # lists, where a group is judged
    "is_finished": lambda s: s.is_finished,
    "response_tokens": lambda s: s.response_tokens,
}
FILLED = ("completion", "completions", *_OF_PROMPT, *_OF_SAMPLE)


class Function(NamedTuple):
    """A function of the user's and how it is called.

    text: what the setting says.
    takes: the parameters that are filled.
    """

    text: str
    call: Callable[..., Any]
    takes: tuple[str, ...]

    @property
    def is_of_group(self) -> bool:
        """It judges all samples of a prompt at once."""
        return "completions" in self.takes


def names(functions: Sequence[str], kinds: Iterable[str]) -> tuple[str, ...]:
    """What the parts of a reward are called: each function by its own name.

    Raises:
        RewardError: two have one name, or one has that of a kind.
    """
    found = tuple(text.rpartition(":")[2] for text in functions)
    for name in found:
        if found.count(name) > 1 or name in kinds:
            other = "another function" if found.count(name) > 1 else "a kind of answers"
            raise RewardError(
                f"Reward.functions = {tuple(functions)} names a function {name!r}, as {other} is "
                f"named; rename it: its rewards are recorded as reward/{name}"
            )
    return found


def load_function(text: str) -> Function:
    """The function behind ``package.module:function``.

    Raises:
        RewardError: there is none, or it asks for what nothing fills.
    """
    try:
        call = load_callable(text)
        parameters = inspect.signature(call).parameters.values()
    except (NotFound, TypeError, ValueError) as problem:
        raise RewardError(f"Reward.functions: {text!r}: {problem}") from problem
    function = Function(text, call, tuple(p.name for p in parameters if p.name in FILLED))
    if problem := _find_problem(function, parameters):
        raise RewardError(f"Reward.functions: {text!r} {problem}")
    return function


def _find_problem(function: Function, parameters: Iterable[inspect.Parameter]) -> str | None:
    for p in parameters:
        is_open = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name not in FILLED and is_open:
            return (
                f"has a parameter {p.name!r}, which nothing fills{nearest(p.name, FILLED)}; it may "
                f"have {', '.join(FILLED)} (other columns of a data row are in row), or give it a "
                "default"
            )
        if p.name in FILLED and p.kind is p.POSITIONAL_ONLY:
            return f"takes {p.name!r} by position only; parameters are filled by their names"
    if ("completion" in function.takes) == ("completions" in function.takes):
        has = "both completion and" if function.is_of_group else "neither completion nor"
        return (
            f"has {has} completions; expected completion to judge one answer, or completions to "
            "judge all answers to a prompt at once"
        )
    return None


def judge(function: Function, submissions: Sequence[Submission]) -> list[Verdict]:
    """What a function says of one submission, or of all of a prompt.

    Raises:
        TypeError, ValueError: it returned what is no reward, or another number of them.
    """
    if not function.is_of_group:
        return [_read(function.text, function.call(**_arguments(function, s))) for s in submissions]
    said = function.call(**_arguments_of_group(function, submissions))
    try:
        rewards = list(said)
    except TypeError:
        raise TypeError(_wrong(function.text, said, "a list, one reward per completion")) from None
    if len(rewards) != len(submissions):
        raise ValueError(
            f"{function.text} returned {len(rewards)} rewards for {len(submissions)} completions, "
            "expected one per completion"
        )
    return [_read(function.text, reward) for reward in rewards]


def _arguments(function: Function, s: Submission) -> dict[str, Any]:
    filled = {"completion": lambda s: s.text, **_OF_PROMPT, **_OF_SAMPLE}
    return {name: filled[name](s) for name in function.takes}


def _arguments_of_group(function: Function, group: Sequence[Submission]) -> dict[str, Any]:
    lists = {"completions": lambda s: s.text, **_OF_SAMPLE}
    return {
        name: [lists[name](s) for s in group] if name in lists else _OF_PROMPT[name](group[0])
        for name in function.takes
    }


def _read(text: str, said: Any) -> Verdict:
    """A verdict from what a function returned for a completion."""
    if isinstance(said, bool) or not (isinstance(said, Verdict) or hasattr(said, "__float__")):
        raise TypeError(_wrong(text, said, "a float or a Verdict"))
    verdict = said if isinstance(said, Verdict) else _of_number(float(said))
    if verdict.reason not in REASONS or not math.isfinite(verdict.reward):
        raise ValueError(
            f"{text} returned {verdict}, expected a finite reward and a reason of {REASONS}"
        )
    return verdict


def _of_number(reward: float) -> Verdict:
    if abs(reward - 1) < 1e-9:  # 10 x 0.1 too
        return Verdict(reward, "match")
    return Verdict(reward, "mismatch" if 0 <= reward < 1 else "scored")


def _wrong(text: str, said: Any, expected: str) -> str:
    return f"{text} returned {said!r:.80} of type {type(said).__name__}, expected {expected}"
