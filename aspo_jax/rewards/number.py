"""Grader ``number``: the last number that the response says is the gold one. Nothing is evaluated.

To `math` the text ``92 - 93`` is as good an answer as ``-1``, for it is a formula of that value. A
policy that is asked to calculate finds this out and repeats the question. Here it has said 93.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from typing import Any

from aspo_jax.rewards.answers import conclusion, last_box, last_tagged
from aspo_jax.rewards.verdict import BAD_GOLD, Verdict, compared

_TAIL = 20_000  # characters that are searched for a number without a box or a tag
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])([-−]?)({_DIGITS})(?!\w)")
_GOLD = re.compile(rf"[-−+]?(?:{_DIGITS})")


def find_problem(answer: Any) -> str | None:
    """What is wrong with the answer of a data row; None if it can be used."""
    is_given = isinstance(answer, int | float | str) and not isinstance(answer, bool)
    if is_given and _GOLD.fullmatch(str(answer).strip()):
        return None
    return (
        f"found the answer {answer!r:.60}, expected a number in digits, such as 7, '-1,250' or 0.5"
    )


def grade(text: str, answer: Any, is_finished: bool) -> Verdict:
    """1 where the last number is the gold one, as decimals.

    Of a text that was cut off only what stands in an ``<answer>`` or a box: else ``truncated``.
    """
    if find_problem(answer) is not None:
        return BAD_GOLD
    given = last_number(text, is_finished)
    if given is None:
        return Verdict(0.0, "no_answer" if is_finished else "truncated")
    return compared(Decimal(given) == Decimal(_plain(str(answer))))


def last_number(text: str, is_finished: bool = True) -> str | None:
    """The last number after the thoughts: of the last tag or box, else of the whole text.

    A minus sign behind another number is an operation and no part of the one that follows.
    """
    said = conclusion(text)
    marked = last_tagged(said)
    if marked is None:
        marked = last_box(said)
    if marked is None and not is_finished:
        return None
    searched = said[-_TAIL:] if marked is None else marked
    found = next(iter(deque(_NUMBER.finditer(searched), maxlen=1)), None)
    if found is None:
        return None
    is_behind_number = re.search(r"[\d)]\s*$", searched[: found.start()])
    return _plain(found[2] if is_behind_number else found[0])


def _plain(number: str) -> str:
    return number.strip().replace(",", "").replace("−", "-")
