r"""Whatever a degenerate policy repeats is read in time that grows with its length, not its square.

Processor time, with a budget far above what is needed: 100,000 repeats take well below a second
each, and minutes where every one of them is searched from again.
"""

import time

import pytest

from aspo_jax.rewards import Submission, Verdict, countdown, exact, format_reward, repetition
from aspo_jax.rewards.answers import find_answer
from aspo_jax.rewards.math import latex, mathematics

UNITS = [
    *(
        r"\boxed{",
        r"\boxed",
        r"\boxed ",
        r"\boxed{}",
        r"\boxed{1}, ",
        r"\boxed{1} \quad ",
        r"\fbox",
    ),
    *("<answer>", "</answer>", "<answer>1</answer>", "<think>", "</think>", "<think></think>"),
    *("$", "$$", "$ $", "$1$", "$1$, ", "$x", "$1 ", "$1 of ", r"\[", r"\(", r"\[\(", r"\)"),
    *("####", "#### ", "####\n", "#### 1\n", "answer is", "the answer is ", "the answer is 1. "),
    *("answer:", "Answer: **", "answer ", "is ", "is 1 ", "equal to ", "A: ", "= ", "x = "),
    *(r"\text{", r"\text", r"\text{a}", r"\frac{", r"\frac", r"\frac1", r"\sqrt[", r"\overline{"),
    *("{", "}", "{}", "(", ")", "[", "1", "12 ", "1,", "1, ", "1,000,", "1 000 ", "1.", "."),
    *("1/", "1 / ", "1+", "1 - ", "-", "^", "%", "1%", ",", " ", "\n", "\t", "\n\n", "*", "**"),
    *("\\", "\\\\", r"\,", r"\ ", r"\!", r"\\[2pt]", "and ", " or ", "e", "word ", "A. ", "! "),
    *("\0", "\u200b", "٣", "½", "²", "'", ":", "12:30 am ", "5 cm ", "<", "x<", "(a) ", "(A) "),
]
ENDS = ["", " x", "\n42", "}", r"\boxed{7}"]
BUDGET_S = 2.5


def scans(text):
    """Everything that sees a whole response."""
    yield "answer", lambda: find_answer(text)
    yield "exact", lambda: exact.grade(text, "7", True)
    gold = {"numbers": [1, 2], "target": 3, "operations": "+"}
    yield "countdown", lambda: countdown.grade(text, gold, True)
    group = [(Submission("math", text, "7", True, 1), Verdict(1.0, "match"))]
    yield "format", lambda: format_reward()([group])
    yield "repetition", lambda: repetition(text)


def scans_of_an_answer(text):
    """What sees an answer, which is never longer than a few times its gold."""
    yield "clean", lambda: latex.clean(text)
    yield "normalise", lambda: latex.normalise(text)
    yield "number", lambda: latex.number(text)
    yield "compare", lambda: mathematics.compare_cheaply("7", text)
    yield "split", lambda: mathematics.split(text)
    yield "prepare", lambda: mathematics.prepare(text)


def slow(scan, text):
    """The scans that take longer than the budget, with their seconds."""
    found = {}
    for name, function in scan(text):
        start = time.process_time()
        function()
        seconds = time.process_time() - start
        if seconds > BUDGET_S:
            found[name] = seconds
    return found


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_repeats_in_a_response(unit):
    assert slow(scans, unit * 100_000) == {}


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_repeats_before_an_end(end):
    slowest = {repr(unit): slow(scans, unit * 10_000 + end) for unit in UNITS}
    assert {unit: found for unit, found in slowest.items() if found} == {}


def test_openers_that_are_all_closed():
    for opener, closer in (
        (r"\boxed{", "}"),
        ("{", "}"),
        ("<answer>", "</answer>"),
        (r"\[", r"\]"),
    ):
        assert slow(scans, opener * 50_000 + closer * 50_000) == {}


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_repeats_in_an_answer(unit):
    assert slow(scans_of_an_answer, unit * 10_000 + "x") == {}
