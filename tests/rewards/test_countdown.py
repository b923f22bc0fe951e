"""The countdown grader: it pays right answers, only those, and survives any text."""

import itertools
import json
import random
import time

import pytest

from aspo_jax.data import CountdownSpec, demonstration, problem
from aspo_jax.rewards import REASONS, countdown, exact, find_problem

GOLD = {"numbers": [3, 3, 6, 7], "target": 7, "operations": "+-"}
ANSWER = "7-3=4,6-3=3,4+3=7"


def reason(text, answer=GOLD, is_finished=True):
    verdict = countdown.grade(text, answer, is_finished)
    assert verdict.reason in REASONS
    assert verdict.reward == (1.0 if verdict.reason == "match" else 0.0)
    assert verdict.is_valid == (verdict.reason != "bad_gold")
    return verdict.reason


@pytest.mark.parametrize(
    "text",
    [ANSWER, "7-3=4,6-3=3,3+4=7", "6-3=3,7-3=4,3+4=7", "6+7=13,13-3=10,10-3=7"],
)
def test_right_answers_match(text):
    assert reason(text) == "match"


@pytest.mark.parametrize(
    "spec",
    [
        CountdownSpec(),
        CountdownSpec(numbers=3, operations="+-*"),
        CountdownSpec(numbers=6, low=0, high=25, operations="+-*", max_intermediate=999),
        CountdownSpec(numbers=2, low=1, high=3, operations="*"),
    ],
)
def test_every_demonstration_matches(spec):
    for i in range(300):
        drawn = problem(spec, 1, i, "train")
        gold = {
            "numbers": list(drawn.numbers),
            "target": drawn.target,
            "operations": spec.operations,
        }
        assert reason(demonstration(drawn, random.Random(i)), gold) == "match"


HOSTILE = {
    "a number twice": "7-3=4,7-3=4,4+4=8",
    "a number left out": "7-3=4,4+3=7",
    "a result used twice": "7-3=4,4-3=1,4+1=5",
    "a number not given": "7-3=4,6-2=4,4+4=8",
    "false arithmetic": "7-3=5,6-3=3,5+3=8",
    "false last step": "7-3=4,6-3=3,4+4=7",
    "below zero": "3-7=-4,6-3=3,-4+3=-1",
    "an operation not allowed": "3*3=9,9+6=15,15-7=8",
    "division": "6/3=2,7-3=4,4+2=6",
    "only the target": "7",
    "the target as a step": "7=7",
    "one expression": "7-3+6-3=7",
    "trailing comma": ANSWER + ",",
    "leading comma": "," + ANSWER,
    "doubled comma": ANSWER.replace(",", ",,"),
    "blanks": ANSWER.replace(",", ", "),
    "trailing blank": ANSWER + " ",
    "trailing newline": ANSWER + "\n",
    "leading newline": "\n" + ANSWER,
    "leading zeros": "07-3=4,6-3=3,4+3=7",
    "plus sign": "+7-3=4,6-3=3,4+3=7",
    "underscore": "7-3=4,6-3=3,4+3=0_7",
    "float": "7-3=4.0,6-3=3,4.0+3=7",
    "exponent": "7-3=4e0,6-3=3,4+3=7",
    "hexadecimal": "0x7-3=4,6-3=3,4+3=7",
    "more behind": ANSWER + ",7-0=7",
    "more before": "7-0=7," + ANSWER,
    "words": "the answer is " + ANSWER,
    "chat marker": ANSWER + "<eos>",
    "arabic digits": ANSWER.translate({ord("7"): "٧", ord("3"): "٣"}),
    "full-width digits": ANSWER.translate({c: c + 0xFEE0 for c in range(48, 58)}),
    "superscript": "7-3=4,6-3=3,4+3=⁷",
    "unicode minus": ANSWER.replace("-", "−"),
    "zero-width space": ANSWER.replace("=", "=\u200b"),
    "NUL": ANSWER + "\0",
    "lone surrogate": "\ud800" + ANSWER,
    "long digits": f"7-3={'4' * 19},6-3=3,4+3=7",
    "huge digits": "9" * 5000 + "-3=4,6-3=3,4+3=7",
    "a megabyte of digits": "7" * 2**20,
    "a megabyte of commas": "," * 2**20,
    "a megabyte of answers": (ANSWER + ",") * 60_000,
    "code": "__import__('os')._exit(0)",
    "format": "{0.__class__}%s%n",
    "json": json.dumps(GOLD),
    "regex bait": "(a+)+" * 10 + "=" * 90,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts_are_invalid(text):
    assert reason(text) == "invalid"


def test_reasons():
    assert reason("6+3=9,7-3=4,9-4=5") == "mismatch"  # right arithmetic, another value
    assert reason(ANSWER, is_finished=False) == "truncated"
    assert reason("", is_finished=False) == "truncated"
    assert reason("") == reason(" \n\t\u3000") == "no_answer"


def test_single_edits_never_match_unless_right():
    """Every deletion, insertion and replacement of one character, judged by plain evaluation."""
    alphabet = "0123456789+-*=, "
    edits = {ANSWER[:i] + ANSWER[i + 1 :] for i in range(len(ANSWER))}
    edits |= {ANSWER[:i] + c + ANSWER[i:] for i in range(len(ANSWER) + 1) for c in alphabet}
    edits |= {ANSWER[:i] + c + ANSWER[i + 1 :] for i in range(len(ANSWER)) for c in alphabet}
    edits.discard(ANSWER)
    assert len(edits) > 500
    assert {reason(text) for text in edits} == {"invalid"}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "7",
        [],
        {},
        {"numbers": [3, 4], "target": 7},
        GOLD | {"numbers": None},
        GOLD | {"numbers": []},
        GOLD | {"numbers": [7]},
        GOLD | {"numbers": "3367"},
        GOLD | {"numbers": [3, 3, 6, "7"]},
        GOLD | {"numbers": [3, 3, 6, True]},
        GOLD | {"numbers": [3, 3, 6, 7.0]},
        GOLD | {"numbers": [3, 3, 6, -7]},
        GOLD | {"target": None},
        GOLD | {"target": "7"},
        GOLD | {"target": float("nan")},
        GOLD | {"target": -1},
        GOLD | {"operations": ""},
        GOLD | {"operations": None},
        GOLD | {"operations": "+/"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("text", [ANSWER, "", "None"])
def test_bad_gold_never_pays(text, answer):
    assert reason(text, answer) == "bad_gold"


def test_a_refused_text_costs_little():
    text = "1+" * 2**19
    start = time.perf_counter()
    for _ in range(100):
        reason(text)
    assert time.perf_counter() - start < 0.2


def reachable_by_trying(numbers, operations):
    """All values that steps on all numbers can leave."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for sign in operations:
            value = countdown.OPERATIONS[sign](numbers[i], numbers[j])
            if value >= 0:
                found |= reachable_by_trying((*rest, value), operations)
    return found


@pytest.mark.parametrize(
    ("numbers", "operations"),
    [
        ((3, 3, 6, 7), "+-"),
        ((2, 5, 9), "+-*"),
        ((0, 1, 4, 4), "-*"),
        ((8, 8), "+"),
        ((1, 2, 3), "*"),
    ],
)
def test_a_target_is_a_problem_if_and_only_if_nothing_reaches_it(numbers, operations):
    reachable = reachable_by_trying(numbers, operations)
    for target in range(90):
        gold = {"numbers": list(numbers), "target": target, "operations": operations}
        assert (find_problem("countdown", gold) is None) == (target in reachable)


def test_the_problem_of_a_target_names_what_was_found():
    said = find_problem("countdown", GOLD | {"target": 1000})
    assert said is not None and "the target 1000" in said and "[3, 3, 6, 7]" in said
    seven = {"numbers": [1] * 7, "target": 10**6, "operations": "+"}
    assert find_problem("countdown", seven) is None  # more than six are not looked at


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"a": 1}, "of type dict"),
        (["x"], "of type list"),
        (True, "of type bool, expected a string or a whole number; put it in quotes"),
        (2.5, "of type float"),
        (float("inf"), "found the answer inf of type float"),
        (None, "of type NoneType"),
        (" \n", "empty"),
        ("a\udc00", "half a surrogate pair"),
    ],
    ids=repr,
)
def test_answers_that_exact_cannot_use(answer, found):
    assert found in (find_problem("exact", answer) or "")


def test_answers_that_exact_can_use():
    assert [find_problem("exact", answer) for answer in ("Paris", 42, "True", "é")] == [None] * 4


@pytest.mark.parametrize(
    ("text", "answer", "is_finished", "expected"),
    [
        ("Paris", "Paris", True, "match"),
        ("  New\n York ", "New York", True, "match"),
        ("42", 42, True, "match"),
        ("paris", "Paris", True, "mismatch"),
        ("Paris", "Paris", False, "truncated"),
        ("  ", "Paris", True, "no_answer"),
        ("", "", True, "bad_gold"),
        ("None", None, True, "bad_gold"),
        ("True", True, True, "bad_gold"),
        ("x", {"a": 1}, True, "bad_gold"),
    ],
)
def test_exact(text, answer, is_finished, expected):
    verdict = exact.grade(text, answer, is_finished)
    assert (verdict.reason, verdict.reward) == (expected, float(expected == "match"))
