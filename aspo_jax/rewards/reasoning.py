"""Grader ``reasoning_gym``: what the scorer of a reasoning-gym task says of the final answer.

    answer  {"task": "chain_sum", "entry": {"question": ..., "answer": "7", "metadata": {...}}}

``"config"`` holds the task's settings where they are not its own defaults. The reward is the
scorer's number from 0 to 1, its partial credit included; 1 is right.

The scorers are another package's code, and some hand the answer to Python's ``eval`` or to sympy's
``parse_expr``, which is ``eval`` too. To those an answer that could be more than data is not given:
it is ``invalid``. They run in a child with limits, which is killed at the time limit.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any, Literal

from aspo_jax.rewards.answers import conclusion, last_box, last_tagged
from aspo_jax.rewards.verdict import BAD_GOLD, CRASH, RewardError, Verdict

# The scorers that run an answer, as read in release 0.1.25.
_EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
_PARSED = (
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
)
_STUMBLED = -1.0  # the scorer raised an error, for it takes no answer of such a form
_LONGEST = 20_000  # characters of an answer
_NOT_A_FORMULA = re.compile(r"[^\w\s.+\-*/^(),]")  # no quotes, brackets, calls of attributes
_NAMES = re.compile(r"[^\W\d]\w*")
_FUNCTIONS = re.compile("a?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|pi|Abs")
_PHRASE = re.compile(r"\banswer\b[^:=]{0,30}?(?:\bis\b:?|[:=])|^####", re.IGNORECASE)

Score = Callable[[str, Any], float]


def find_problem(answer: Any) -> str | None:
    """What is wrong with the answer of a data row; None if it can be used."""
    entry = answer.get("entry") if isinstance(answer, dict) else None
    if isinstance(entry, dict) and isinstance(answer.get("task"), str) and "metadata" in entry:
        return None
    return (
        f"found the answer {answer!r:.60}, expected such as "
        '{"task": "chain_sum", "entry": {"question": ..., "answer": ..., "metadata": {...}}}'
    )


def warm_up() -> None:
    """Import the package. Raises RewardError if it is not there."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process with threads must not fork
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise RewardError(
            "answers of kind 'reasoning_gym' need a package: pip install 'aspo_jax[reasoning-gym]'"
        ) from error


@functools.lru_cache(256)
def _scorer(task: str, config: str) -> Score | None:
    """The scorer of a task under settings (JSON); None if there is none."""
    from reasoning_gym.factory import create_dataset

    try:
        score = create_dataset(task, **json.loads(config) | {"size": 1, "seed": 0}).score_answer
    except Exception:
        return None

    def scored(answer: str, entry: Any) -> float:
        try:
            return float(score(answer=answer, entry=entry))
        except Exception:
            return _STUMBLED

    return scored


def grade(text: str, answer: Any, is_finished: bool, limit_s: float = 5.0) -> Verdict:
    """The task's score of the final answer (`final_answer`).

    A text that was cut off is judged by what stands in a tag or a box: else it is ``truncated``.
    """
    if find_problem(answer) is not None:
        return BAD_GOLD
    task, entry = answer["task"], answer["entry"]
    score = _scorer(task, json.dumps(answer.get("config", {}), sort_keys=True))
    if score is None:
        return BAD_GOLD
    given = final_answer(text, entry.get("answer"), is_finished)
    if not given:
        return Verdict(0.0, "no_answer" if is_finished else "truncated")
    if len(given) > _LONGEST or not is_data(task, given):
        return Verdict(0.0, "invalid")
    if task not in (*_EVALUATED, *_PARSED):
        return _verdict(score(given, entry))
    from aspo_jax.rewards.math.fork import in_child

    return _verdict(in_child(lambda: score(given, entry), limit_s))


def _verdict(said: float | Literal["timeout", "exhausted", "crash"]) -> Verdict:
    if isinstance(said, str):
        return CRASH if said == "crash" else Verdict(0.0, said)
    if said == _STUMBLED:
        return Verdict(0.0, "invalid")
    if not 0 <= said <= 1:
        raise ValueError(f"the scorer returned {said}, expected a number from 0 to 1")
    return Verdict(said, "match" if said >= 1 - 1e-9 else "mismatch")


def is_data(task: str, given: str) -> bool:
    """Whether an answer is no more than data to the scorer of a task."""
    if task in _EVALUATED:  # letters, digits, a list of them: nothing is called
        return "(" not in given
    if task in _PARSED:
        names = _NAMES.findall(given)
        is_known = all(len(name) == 1 or _FUNCTIONS.fullmatch(name) for name in names)
        return is_known and not _NOT_A_FORMULA.search(given)
    return True


def final_answer(text: str, gold: Any = None, is_finished: bool = True) -> str | None:
    """What a response gives as its answer, after its thoughts: the first of these that is there.

    The last ``<answer>...</answer>``, the last ``\\boxed{}``; of a text that was not cut off also
    the end of it: as many lines as the gold answer has, without 'the answer is' or ``####``.
    """
    said = conclusion(text)
    marked = last_tagged(said)
    if marked is None:
        marked = last_box(said)
    if marked is not None or not is_finished:
        return marked
    lines = [line.strip() for line in said.splitlines() if line.strip(" \t`")]
    if isinstance(gold, str) and (count := len(gold.strip("\n").splitlines())) > 1:
        return "\n".join(lines[-count:])
    return _without_phrase(lines[-1]) if lines else None


def _without_phrase(line: str) -> str:
    line = line[-_LONGEST:]
    phrases = list(_PHRASE.finditer(line))
    return line[phrases[-1].end() :].strip(" \t*").rstrip(".* ") if phrases else line
