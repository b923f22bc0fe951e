"""The table of graders: kind -> ``grade(submission) -> Verdict``.

Graders run in worker processes (`aspo_jax.rewards.pool.worker`); `open_graders` pays there, before
the worker says that it is ready, for what they import.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection
from typing import Any, Literal

from aspo_jax.rewards import countdown, exact
from aspo_jax.rewards.verdict import Submission, Verdict

Grader = Callable[[Submission], Verdict]

KINDS = {
    "countdown": "reach a target from given numbers, every step written out",
    "exact": "the response is the answer, letter for letter but for white space",
    "math": "the final answer equals a gold answer as mathematics",
    "code": "the last program passes its tests, each in a sandbox",
    "custom": "a function of one's own, Reward.function",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How graders judge. Plain values: they travel to the workers.

    timeout_s: seconds for an answer of any kind but ``code``.
    grade_truncated: a ``math`` text that was cut off may be judged by the formula or number that
        stands last in it, and not only by what it calls its answer.
    function: ``package.module:function`` of the kind ``custom``.
    sandbox: tier that programs run in; ``auto`` is the safest that withstands the probe's attacks.
    test_timeout_s, test_memory_mib: limits of each test of a program.
    program_timeout_s: seconds for all tests of a program.
    max_tests: tests drawn per program, by the seed and the submission's identity; 0 = all.
    """

    timeout_s: float = 5.0
    grade_truncated: bool = False
    function: str | None = None
    sandbox: Literal["auto", "namespaces", "landlock", "rlimits"] = "auto"
    test_timeout_s: float = 6.0
    test_memory_mib: int = 1024
    program_timeout_s: float = 60.0
    max_tests: int = 0
    seed: int = 0

    def limit_s(self, kind: str) -> float:
        """Seconds after which a worker that judges an answer of this kind is killed.

        A grader with a limit of its own is given time to keep it.
        """
        own = {"math": self.timeout_s + 1.0, "code": self.program_timeout_s + 10.0}
        return own.get(kind, self.timeout_s)


def chunk(kind: str) -> int:
    """Most answers of a kind that are sent to a worker at once: few where one takes long."""
    return {"code": 1, "custom": 1, "math": 8}.get(kind, 64)


def open_graders(kinds: Collection[str], rules: Rules) -> dict[str, Grader]:
    """The graders of some kinds, ready to judge.

    Raises:
        RewardError: one of them cannot work here.
    """
    makers = {"math": _open_math, "code": _open_code, "custom": _open_custom}
    light = {"countdown": countdown.grade, "exact": exact.grade}
    graders: dict[str, Grader] = {
        kind: functools.partial(_on_text, grade) for kind, grade in light.items() if kind in kinds
    }
    return graders | {kind: make(rules) for kind, make in makers.items() if kind in kinds}


def _on_text(grade: Callable[..., Verdict], submission: Submission) -> Verdict:
    return grade(submission.text, submission.answer, submission.is_finished)


def _open_math(rules: Rules) -> Grader:
    from aspo_jax.rewards.math import mathematics

    mathematics.warm_up()
    grade = functools.partial(
        mathematics.grade, limit_s=rules.timeout_s, grade_truncated=rules.grade_truncated
    )
    return functools.partial(_on_text, grade)


def _open_code(rules: Rules) -> Grader:
    from aspo_jax.rewards.code import programs, sandbox

    if rules.sandbox == "auto":
        box, _ = sandbox.open_sandbox("auto")
    else:  # probed by whoever chose it
        box = sandbox.Sandbox(rules.sandbox)
    how = programs.ProgramRules(
        sandbox.Limits(seconds=rules.test_timeout_s, memory_mib=rules.test_memory_mib),
        rules.program_timeout_s,
        rules.max_tests,
        rules.seed,
    )
    return functools.partial(programs.grade, box=box, rules=how)


def _open_custom(rules: Rules) -> Grader:
    from aspo_jax.rewards import custom

    function = custom.load_function(rules.function or "")
    return functools.partial(custom.grade, function=function)


def find_problem(kind: str, answer: Any) -> str | None:
    """What is wrong with the answer of a data row for its grader; None if it can be used."""
    from aspo_jax.rewards.math import mathematics

    finders = {
        "math": mathematics.find_problem,
        "code": _find_problem_of_tests,
        "exact": exact.find_problem,
        "countdown": countdown.find_problem,
    }
    if kind not in finders:
        return None
    return finders[kind](answer) or _find_lone_surrogate(answer)


def _find_problem_of_tests(answer: Any) -> str | None:
    from aspo_jax.rewards.code import programs

    try:
        programs.read_tests(answer)
    except programs.BadTests as error:
        return (
            f"found tests that cannot be used ({error}), expected one of the forms that "
            "docs/rewards.md lists"
        )
    return None


def _find_lone_surrogate(answer: Any) -> str | None:
    try:
        json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return (
            f"found half a surrogate pair ({error.object[error.start]!a}) in the answer, which no "
            "response can contain; expected Unicode text: repair the file's encoding"
        )
    return None
