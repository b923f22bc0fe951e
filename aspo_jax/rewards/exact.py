"""Grader ``exact``: the response is the answer, letter for letter, but for white space."""

from __future__ import annotations

from typing import Any

from aspo_jax.rewards.verdict import BAD_GOLD, Verdict, compared


def _normalise(text: str) -> str:
    """One space for every run of white space, none at the ends."""
    return " ".join(text.split())


def find_problem(answer: Any) -> str | None:
    """What is wrong with an answer; None if it can be used."""
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        return None if _normalise(str(answer)) else "found an empty answer, expected some text"
    remedy = "; put it in quotes" if isinstance(answer, bool | float) else ""
    return (
        f"found the answer {answer!r:.60} of type {type(answer).__name__}, expected a string or a "
        f"whole number{remedy}"
    )


def grade(text: str, answer: Any, is_finished: bool) -> Verdict:
    """1 where ``text`` equals ``answer`` (a string or a whole number) but for white space.

    A text that was cut off is not the whole response: ``truncated``, whatever it says.
    """
    if find_problem(answer) is not None:
        return BAD_GOLD
    if not is_finished:
        return Verdict(0.0, "truncated")
    given = _normalise(text)
    if not given:
        return Verdict(0.0, "no_answer")
    return compared(given == _normalise(str(answer)))
