"""Grader ``countdown``: reach the target from the given numbers, every step written out.

    numbers 3 3 6 7, target 7:    7-3=4,6-3=3,4+3=7

Rules. A step ``a-b=c`` takes two of the values at hand, away from them, and adds its result; the
steps use up all given numbers, so that one value is left: it must be the target. Numbers are
written without sign, blanks or leading zeros, so no step may fall below 0 and a right answer has
exactly one spelling: two right answers are the same answer if and only if their texts are equal.
(TinyZero's rule, every number used exactly once, with written steps in place of one expression.)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from aspo_jax.rewards.verdict import BAD_GOLD, Verdict, compared

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

_DIGITS = 18  # longer numbers are refused unread
_NUMBER = rf"(0|[1-9][0-9]{{0,{_DIGITS - 1}}})"
_STEP = re.compile(rf"{_NUMBER}([+*-]){_NUMBER}={_NUMBER}")
_STEP_CHARACTERS = 3 * _DIGITS + 3  # three numbers, an operation, '=' and ','


class _Gold(NamedTuple):
    numbers: list[int]
    target: int
    operations: str


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_gold(answer: Any) -> _Gold | None:
    """``{"numbers": [3, 3, 6, 7], "target": 7, "operations": "+-"}``; None for anything else."""
    if not isinstance(answer, dict) or not answer.keys() >= set(_Gold._fields):
        return None
    gold = _Gold(**{name: answer[name] for name in _Gold._fields})
    is_usable = (
        isinstance(gold.numbers, list)
        and len(gold.numbers) >= 2
        and all(map(_is_natural, gold.numbers))
        and _is_natural(gold.target)
        and isinstance(gold.operations, str)
        and len(gold.operations) > 0
        and set(gold.operations) <= OPERATIONS.keys()
    )
    return gold if is_usable else None


_MOST_CHECKED = 6  # numbers: all results of six take about 0.1 s, of seven some seconds


def find_problem(answer: Any) -> str | None:
    """What is wrong with an answer; None if it can be used.

    Whether the target can be reached is looked at for up to six numbers.
    """
    gold = read_gold(answer)
    if gold is None:
        return (
            f"found the answer {answer!r:.60}, expected such as "
            '{"numbers": [3, 3, 6, 7], "target": 7, "operations": "+-"}'
        )
    if len(gold.numbers) <= _MOST_CHECKED and not is_reachable(gold):
        return (
            f"found the target {gold.target}, which no steps with {gold.operations!r} on all of "
            f"{gold.numbers} reach; correct the row or take it out"
        )
    return None


def is_reachable(gold: _Gold) -> bool:
    """Whether some steps lead to the target. Its time grows tenfold and more with each number."""
    everything = (1 << len(gold.numbers)) - 1
    known: dict[int, set[int]] = {1 << i: {n} for i, n in enumerate(gold.numbers)}
    halves = sorted(_splits(everything), key=lambda pair: -min(map(int.bit_count, pair)))
    return any(
        gold.target in _combine(a, b, gold.operations)
        for left, right in halves
        for a in _values(left, known, gold.operations)
        for b in _values(right, known, gold.operations)
    )


def _splits(chosen: int) -> Iterator[tuple[int, int]]:
    """Every way to part a set of numbers (bits) in two; each once."""
    part = (chosen - 1) & chosen
    while part > chosen ^ part:
        yield part, chosen ^ part
        part = (part - 1) & chosen


def _values(chosen: int, known: dict[int, set[int]], operations: str) -> set[int]:
    """Whatever steps on all of some numbers (bits) can leave."""
    if chosen not in known:
        known[chosen] = {
            value
            for left, right in _splits(chosen)
            for a in _values(left, known, operations)
            for b in _values(right, known, operations)
            for value in _combine(a, b, operations)
        }
    return known[chosen]


def _combine(a: int, b: int, operations: str) -> list[int]:
    """The results of one step with two values, in either order, that can be written."""
    results = (OPERATIONS[sign](max(a, b), min(a, b)) for sign in operations)
    return [result for result in results if result < 10**_DIGITS]


def _last_value(text: str, gold: _Gold) -> int | None:
    """The one value left after all steps; None if the text breaks a rule."""
    count = len(gold.numbers) - 1
    if len(text) > count * _STEP_CHARACTERS:  # before anything is done whose cost grows with it
        return None
    steps = text.split(",")
    if len(steps) != count:
        return None
    values = list(gold.numbers)
    for step in steps:
        found = _STEP.fullmatch(step)
        if found is None or found[2] not in gold.operations:
            return None
        a, b, result = int(found[1]), int(found[3]), int(found[4])
        for used in (a, b):
            if used not in values:
                return None
            values.remove(used)
        if OPERATIONS[found[2]](a, b) != result:
            return None
        values.append(result)
    return values[0]


def grade(text: str, answer: Any, is_finished: bool) -> Verdict:
    """1 for a right answer, 0 for any other; see the module's rules and `verdict.Reason`.

    A text that was cut off is not the whole response: ``truncated``, whatever it says.
    """
    gold = read_gold(answer)
    if gold is None:
        return BAD_GOLD
    if not is_finished:
        return Verdict(0.0, "truncated")
    if not text.strip():
        return Verdict(0.0, "no_answer")
    value = _last_value(text, gold)
    if value is None:
        return Verdict(0.0, "invalid")
    return compared(value == gold.target)
