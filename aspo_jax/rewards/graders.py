"""The graders: one record per kind of answer.

They run in worker processes (`aspo_jax.rewards.pool.worker`), which open them before they say that
they are ready. What a grader needs that is slow to import is imported when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from aspo_jax.rewards import countdown, exact
from aspo_jax.rewards.code import code_tests
from aspo_jax.rewards.verdict import Rules, Submission, Verdict

Grade = Callable[[Submission], Verdict]


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


def _open_custom(rules: Rules) -> Grade:
    from aspo_jax.rewards import custom

    function = custom.load_function(rules.function or "")
    return lambda s: custom.grade(s, function)


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
    "code": Grader(
        "the last program passes its tests, each in a sandbox",
        _open_code,
        code_tests.find_problem,
        limit_s=lambda rules: rules.program_timeout_s + 10.0,
        chunk=1,
    ),
    "custom": Grader(
        "a function of one's own, Reward.function", _open_custom, lambda answer: None, chunk=1
    ),
}
KINDS = tuple(GRADERS)


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
