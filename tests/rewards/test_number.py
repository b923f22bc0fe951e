"""The grader ``number`` takes what is said, and evaluates nothing."""

import pytest

from aspo_jax.rewards.graders import GRADERS, find_problem
from aspo_jax.rewards.number import grade, last_number


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        ("84", 84, "match"),
        ("The answer is 84.", "84", "match"),
        ("58 + 26 = 84.", 84, "match"),
        ("To add 58 and 26, we get 84, of course.", 84, "match"),
        ("It is 1,250 in all.", "1250", "match"),
        ("92 - 93 = -1", -1, "match"),
        ("92 - 93 is −1.", -1, "match"),
        ("0.50", 0.5, "match"),
        (r"First 3, then \boxed{7}, not 8.", 7, "match"),
        ("<answer>7</answer> 8", 7, "match"),
        ("<think>84</think> 85", 84, "mismatch"),
        ("92 - 93.", -1, "mismatch"),
        ("92-93", -1, "mismatch"),
        ("7 - 5", 2, "mismatch"),
        ("(7) -5", -5, "mismatch"),
        ("84 or 85", 84, "mismatch"),
        ("x84 5th v1.2", 84, "no_answer"),
        ("I do not know.", 84, "no_answer"),
        ("", 84, "no_answer"),
    ],
)
def test_the_last_number_counts(text, gold, reason):
    verdict = grade(text, gold, True)
    assert (verdict.reason, verdict.reward) == (reason, float(reason == "match"))


def test_a_text_that_was_cut_off_is_judged_by_what_it_calls_its_answer():
    assert grade("58 + 26 = 84", 84, False).reason == "truncated"
    assert grade(r"\boxed{84} because 58", 84, False).reason == "match"


@pytest.mark.parametrize("gold", ["eight", "", "1/2", True, None, [7], float("nan"), "7 apples"])
def test_a_gold_that_is_no_number_is_named(gold):
    assert "expected a number in digits" in str(find_problem("number", gold))
    assert grade("7", gold, True).reason == "bad_gold"


def test_a_long_text_takes_no_time():
    assert last_number("1 - " * 200_000) == "1"
    assert last_number("1," * 200_000 + "x") is not None


def test_it_is_among_the_graders():
    assert "number" in GRADERS
