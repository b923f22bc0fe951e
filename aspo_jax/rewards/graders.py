"""The graders: one record per kind of answer.

They run in worker processes (`aspo_jax.rewards.pool.worker`), which open them before they say that
they are ready. What a grader needs that is slow to import is imported when it is opened. Functions
of the user's (`aspo_jax.rewards.custom`) are opened beside them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from aspo_jax.rewards import countdown, custom, exact, number, reasoning
from aspo_jax.rewards.code import code_tests
from aspo_jax.rewards.verdict import RewardError, Rules, Submission, Verdict

CUSTOM = "custom"  # rows without a grader of their own

Grade = Callable[[Submission], Verdict]
Judge = Callable[[Sequence[Submission]], list[Verdict]]  # of one submission, or of a whole group


class Grader(NamedTuple):
    """How answers of one kind are judged, and what data and pool have to know about it.

    description: one line.
    open: what judges a submission by some rules, ready to do so. Raises RewardError where it cannot
        work here.
    find_problem: what is wrong with the answer of a data row; None if it can be used.
    limit_s: seconds after which a worker that judges an answer is killed; a grader with a limit of
        its own is given time to keep it.
    chunk: most answers that are sent to a worker at once: few where one takes long.
    """

    description: str
    open: Callable[[Rules], Grade]
    find_problem: Callable[[Any], str | None]
    limit_s: Callable[[Rules], float] = lambda rules: rules.timeout_s
    chunk: int = 64


def _on_text(grade: Callable[[str, Any, bool], Verdict]) -> Callable[[Rules], Grade]:
    """`Grader.open` of a function of text, answer and whether the text is finished."""
    return lambda _: lambda s: grade(s.text, s.answer, s.is_finished)


def _open_math(rules: Rules) -> Grade:
    from aspo_jax.rewards.math import mathematics

    mathematics.warm_up()
    how = (rules.timeout_s, rules.grade_truncated)
    return lambda s: mathematics.grade(s.text, s.answer, s.is_finished, *how)


def _find_problem_of_golds(answer: Any) -> str | None:
    from aspo_jax.rewards.math import mathematics

    return mathematics.find_problem(answer)


def _open_code(rules: Rules) -> Grade:
    from aspo_jax.rewards.code import programs, sandbox

    tier = rules.sandbox  # one by name was attacked by `Scorer`, which chose it
    box = sandbox.open_sandbox(tier)[0] if tier == "auto" else sandbox.Sandbox(tier)
    return lambda s: programs.grade(s, box, rules)


def _open_reasoning(rules: Rules) -> Grade:
    reasoning.warm_up()
    return lambda s: reasoning.grade(s.text, s.answer, s.is_finished, rules.timeout_s)


def _open_custom(rules: Rules) -> Grade:
    raise RewardError(
        "answers of kind 'custom' are judged by Reward.functions, which names none; set "
        "Reward.functions = ('package.module:function',)"
    )


GRADERS = {
    "countdown": Grader(
        "reach a target from given numbers, every step written out",
        _on_text(countdown.grade),
        countdown.find_problem,
    ),
    "exact": Grader(
        "the response is the answer, letter for letter but for white space",
        _on_text(exact.grade),
        exact.find_problem,
    ),
    "math": Grader(
        "the final answer equals a gold answer as mathematics",
        _open_math,
        _find_problem_of_golds,
        limit_s=lambda rules: rules.timeout_s + 1.0,
        chunk=8,
    ),
    "number": Grader(
        "the last number is the gold one; nothing is evaluated",
        _on_text(number.grade),
        number.find_problem,
    ),
    "code": Grader(
        "the last program passes its tests, each in a sandbox",
        _open_code,
        code_tests.find_problem,
        limit_s=lambda rules: rules.program_timeout_s + 10.0,
        chunk=1,
    ),
    "reasoning_gym": Grader(
        "the final answer is right for the scorer of a reasoning-gym task",
        _open_reasoning,
        reasoning.find_problem,
        limit_s=lambda rules: rules.timeout_s + 1.0,
        chunk=8,
    ),
    CUSTOM: Grader(
        "functions of one's own and nothing else, Reward.functions",
        _open_custom,
        lambda answer: None,
    ),
}
KINDS = tuple(GRADERS)


def open_judges(kinds: Iterable[str], rules: Rules) -> tuple[dict[str, Judge], list[str]]:
    """What judges, by the names of kinds and functions, and which of them want whole groups.

    Raises:
        RewardError: one cannot work here.
    """
    of_kinds = {
        kind: each(GRADERS[kind].open(rules))
        for kind in kinds
        if kind != CUSTOM or not rules.functions
    }
    names = custom.names(rules.functions, KINDS)
    functions = dict(zip(names, map(custom.load_function, rules.functions), strict=True))
    of_functions = {
        name: functools.partial(custom.judge, function) for name, function in functions.items()
    }
    return of_kinds | of_functions, [n for n, f in functions.items() if f.is_of_group]


def each(grade: Grade) -> Judge:
    """A judge of one submission after the other."""
    return lambda submissions: [grade(s) for s in submissions]


def find_problem(kind: str, answer: Any) -> str | None:
    """What is wrong with the answer of a data row for its grader; None if it can be used."""
    return GRADERS[kind].find_problem(answer) or _find_lone_surrogate(answer)


def _find_lone_surrogate(answer: Any) -> str | None:
    try:
        json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return (
            f"found half a surrogate pair ({error.object[error.start]!a}) in the answer, which no "
            "response can contain; expected Unicode text: repair the file's encoding"
        )
    return None
