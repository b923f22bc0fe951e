"""Grader ``code``: a program is right if it passes every test, each run in a sandbox of its own.

The program is the last fenced Python block of the conclusion. What a test expects stays outside of
the sandbox: a call is run there, and the plain value that comes back is compared here. Test code
that cannot be split into calls runs in a second sandbox and calls the program's functions from
there.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from aspo_jax.rewards.answers import conclusion
from aspo_jax.rewards.code.code_tests import (
    BadTests,
    CallTest,
    StdioTest,
    Test,
    read_prompt,
    read_tests,
    whole_prompt,
)
from aspo_jax.rewards.code.equality import read_value, same_output, same_value
from aspo_jax.rewards.code.sandbox import Limits, Sandbox
from aspo_jax.rewards.verdict import BAD_GOLD, Reason, Rules, Submission, Verdict

_OPENING = re.compile(r"([ \t]*)```[ \t]*([\w+#-]*)[^`]*")
_PYTHON = frozenset({"", "python", "python3", "py", "py3"})


def last_program(text: str) -> str | None:
    """The last closed block of the conclusion fenced as Python, or fenced without a language.

    Its lines lose the fence's own indentation, as in a list. One pass, whatever is not closed.
    """
    last, language, margin = None, None, ""
    block: list[str] = []
    for line in conclusion(text).split("\n"):
        if language is None:
            if opening := _OPENING.fullmatch(line):
                (margin, language), block = opening.groups(), []
        elif line.strip() != "```":
            block.append(f"{line.removeprefix(margin)}\n")
        else:
            last = "".join(block) if language.lower() in _PYTHON else last
            language = None
    return last


# --- programs and their surroundings --------------------------------------------------------------

# What a solution on a puzzle site may take for granted.
_PUZZLE_HEAD = """
from typing import *
import bisect, collections, copy, functools, heapq, itertools, math, random, re, string, sys
from bisect import bisect, bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, permutations, product
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, sqrt
"""


class Program(NamedTuple):
    """What is run: ``source`` in a module in which ``head`` has run."""

    head: str
    source: str


def assemble(answer: Any, program: str) -> Program:
    """A program with HumanEval's prompt, whose helpers it may use or whose body it may be."""
    prompt = read_prompt(answer)
    if not prompt:
        return Program("", program)
    if _is_body(program):
        return Program("", f"{prompt}\n{program}")
    return Program(whole_prompt(prompt), program)


def _is_body(program: str) -> bool:
    """Whether it begins within a function, to which the prompt has the head."""
    lines = (line for line in program.splitlines() if line.partition("#")[0].strip())
    return next(lines, "").startswith((" ", "\t"))


# --- grading --------------------------------------------------------------------------------------


def draw_tests(tests: Sequence[Test], count: int, identity: str) -> list[Test]:
    """``count`` tests in their order, the same for the same identity; all if ``count`` is 0."""
    if not 0 < count < len(tests):
        return list(tests)
    drawn = random.Random(identity).sample(range(len(tests)), count)
    return [tests[i] for i in sorted(drawn)]


def grade(submission: Submission, box: Sandbox, rules: Rules) -> Verdict:
    """1 if the program passes its tests, else 0 with the reason of the first that it fails.

    Raises:
        SandboxError: the sandbox failed, not the program.
    """
    try:
        tests = read_tests(submission.answer)
    except BadTests:
        return BAD_GOLD
    program = last_program(submission.text)
    if program is None:
        return Verdict(0.0, "no_answer" if submission.is_finished else "truncated")
    assembled = assemble(submission.answer, program)
    deadline = time.monotonic() + rules.program_timeout_s
    for test in draw_tests(tests, rules.max_tests, f"{rules.seed} {submission.identity}"):
        left = min(rules.test_timeout_s, deadline - time.monotonic())
        if left <= 0:
            return Verdict(0.0, "timeout")
        reason = _run(test, assembled, box, Limits(left, rules.test_memory_mib))
        if reason != "match":
            return Verdict(0.0, reason)
    return Verdict(1.0, "match")


def _run(test: Test, program: Program, box: Sandbox, limits: Limits) -> Reason:
    if isinstance(test, StdioTest):
        return _run_stdio(test, program, box, limits)
    if isinstance(test, CallTest):
        return _run_call(test, program, box, limits)
    check = {"mode": "check", "source": test.source, "names": test.names}
    ending = box.check({"mode": "calls"} | program._asdict(), check, limits)
    if ending == "passed":
        return "match"
    return "mismatch" if ending == "failed" else ending


def _run_stdio(test: StdioTest, program: Program, box: Sandbox, limits: Limits) -> Reason:
    room = limits.output_kib + 2 * len(test.output) // 1024
    orders = {"mode": "script", "source": program.source}
    outcome = box.run(orders, test.input.encode(), limits._replace(output_kib=room))
    if outcome.ending != "exit":
        return outcome.ending
    if outcome.status != 0:
        return "error"
    printed = outcome.output.decode("utf-8", "replace")
    return "match" if same_output(test.output, printed) else "mismatch"


def _run_call(test: CallTest, program: Program, box: Sandbox, limits: Limits) -> Reason:
    head = _PUZZLE_HEAD if test.is_json else program.head
    orders = {"mode": "calls", "head": head, "source": program.source}
    outcome = box.run(orders, json.dumps(test.order).encode() + b"\n", limits)
    if outcome.ending != "exit":
        return outcome.ending
    try:  # the status says nothing: only a value counts
        value = read_value(outcome.output)
    except ValueError:
        return "error"
    return "match" if same_value(test.expected, value, test.is_json) else "mismatch"
