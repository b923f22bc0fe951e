"""What an answer says, for a vote among several: the final answer, in a form that can be compared.

Right answers equal the gold one and so each other, however they are written. Wrong ones are equal
where their normalised texts are: no algebra is done here, it would need the graders' processes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from decimal import Decimal
from typing import NamedTuple

from aspo_jax.rewards.answers import find_answer
from aspo_jax.rewards.math.latex import normalise
from aspo_jax.rewards.number import last_number

_LONGEST = 1500  # characters of an answer that is normalised


class Given(NamedTuple):
    """How the final answers of one kind are found and compared.

    find: (text, whether it is finished) -> the answer; None: it gives none.
    form: texts of one form are one answer.
    rule: the same in words.
    """

    find: Callable[[str, bool], str | None]
    form: Callable[[str], str]
    rule: str


def _words(text: str) -> str:
    return " ".join(text.split())


GIVEN = {
    "math": Given(
        lambda text, is_finished: find_answer(text, is_explicit=not is_finished),
        normalise,
        "final answers as the grader `math` finds them; all right ones are one answer, wrong ones "
        "where their normalised LaTeX is the same text",
    ),
    "number": Given(
        last_number,
        lambda number: str(Decimal(number).normalize()),
        "last numbers, as decimals",
    ),
    "exact": Given(
        lambda text, is_finished: _words(text) or None,
        _words,
        "whole responses, but for white space",
    ),
}


def vote(kind: str, text: str, is_finished: bool, is_right: bool) -> Hashable | None:
    """Equal for equal answers; None for a response that gives none."""
    given = given_answer(kind, text, is_finished)
    if given is None or is_right:
        return is_right or None
    return given if len(given) > _LONGEST else GIVEN[kind].form(given)


def given_answer(kind: str, text: str, is_finished: bool) -> str | None:
    """The final answer of a response; None for none, or where the kind has no such thing."""
    return GIVEN[kind].find(text, is_finished) if kind in GIVEN else None
