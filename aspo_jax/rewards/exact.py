"""Grader ``exact``: the response is the answer, letter for letter, but for white space."""

from __future__ import annotations

from typing import Any

from aspo_jax.rewards.verdict import Verdict


def _normalise(text: str) -> str:
    """One space for every run of white space, none at the ends."""
    return " ".join(text.split())


def grade(text: str, answer: Any, is_finished: bool) -> Verdict:
    """1 where ``text`` equals ``answer`` (a string or a whole number) but for white space."""
    is_usable = isinstance(answer, str | int) and not isinstance(answer, bool)
    gold = _normalise(str(answer)) if is_usable else ""
    if not gold:
        return Verdict(0.0, "bad_gold", is_valid=False)
    if not is_finished:
        return Verdict(0.0, "truncated")
    given = _normalise(text)
    if not given:
        return Verdict(0.0, "no_answer")
    return Verdict(1.0, "match") if given == gold else Verdict(0.0, "mismatch")
