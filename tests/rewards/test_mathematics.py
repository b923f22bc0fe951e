"""The math grader on answers of our own: what is equal, what only looks so, and what blows up."""

import time

import math_cases
import pytest

from aspo_jax.rewards import Scorer, Submission, Verdict
from aspo_jax.rewards.answers import SOURCES, Found, find_answer
from aspo_jax.rewards.latex import normalise, number
from aspo_jax.rewards.mathematics import compare_cheaply, read_golds

CORE = [(kind, *case) for kind, cases in math_cases.CORE.items() for case in cases]


def say(response, gold, is_finished=True):
    return Submission("math", response, gold, is_finished, 1)


@pytest.fixture(scope="module")
def scorer():
    with Scorer(1, 30.0, kinds=("math",)) as scorer:
        yield scorer


def test_there_are_two_hundred_cases_of_both_kinds():
    assert len(CORE) >= 200
    assert sum(not is_right for *_, is_right in CORE) >= 90


def test_core_cases(scorer):
    """A failure lists every case that is judged wrongly."""
    cases = [*CORE, *(("by convention", *case) for case in math_cases.BY_CONVENTION)]
    verdicts = scorer.score([say(response, gold) for _, gold, response, _ in cases])
    wrong = [
        (*case, verdict.reason)
        for case, verdict in zip(cases, verdicts, strict=True)
        if (verdict.reason == "match") != case[-1] or verdict.reward != float(case[-1])
    ]
    assert wrong == []


def test_blow_ups_end_in_time_and_harm_nobody():
    """Each within its limit, the neighbours' verdicts as ever, and no worker lost."""
    limit = 1.0
    hostile = list(math_cases.BLOW_UPS.values())
    texts = [text for h in hostile for text in (h, r"\boxed{2x+3}")]
    with Scorer(2, limit, kinds=("math",)) as scorer:
        scorer.wait_until_ready()
        before = [worker._process.pid for worker in scorer._workers]
        start = time.monotonic()
        verdicts = scorer.score([say(text, "3+2x") for text in texts])
        assert time.monotonic() - start < len(hostile) * (limit + 1)
        assert [worker._process.pid for worker in scorer._workers] == before
    assert verdicts[1::2] == [Verdict(1.0, "match")] * len(hostile)
    assert {v.reward for v in verdicts[::2]} == {0.0}
    assert {v.reason for v in verdicts[::2]} <= {"mismatch", "no_answer", "timeout", "exhausted"}
    assert {v.reason for v in verdicts[::2]} >= {"mismatch", "timeout"}


def test_a_rejected_giant_costs_little(scorer):
    giant = r"\boxed{" + "x+" * 50_000 + "x}"
    scorer.score([say(giant, "x")])
    start = time.monotonic()
    scorer.score([say(giant, "x")] * 20)
    assert time.monotonic() - start < 4.0  # about 0.3 on an idle machine


def test_text_is_never_evaluated_as_python(scorer, tmp_path):
    mark = tmp_path / "mark"
    texts = [
        f"__import__('pathlib').Path('{mark}').touch()",
        rf"\boxed{{__import__('pathlib').Path('{mark}').touch()}}",
        rf"The answer is 1+__import__('pathlib').Path('{mark}').touch()",
        rf"$(lambda: open('{mark}', 'w'))()$",
    ]
    assert {v.reward for v in scorer.score([say(text, "1") for text in texts])} == {0.0}
    assert not mark.exists()


@pytest.mark.parametrize("gold", [None, "", "  ", "$$", [], ["1", None], {"a": 1}, True])
def test_bad_golds_never_pay(scorer, gold):
    for text in ("1", r"\boxed{}", r"\boxed{1}", str(gold)):
        assert scorer.score([say(text, gold)]) == [Verdict(0.0, "bad_gold", is_valid=False)]


def test_truncated_texts_are_judged_as_they_are(scorer):
    texts = [r"\boxed{4} and", "so then we have to look at this again and", r"\boxed{5}"]
    verdicts = scorer.score([say(text, "4", is_finished=False) for text in texts])
    assert [v.reason for v in verdicts] == ["match", "truncated", "mismatch"]


# --- the parts, which know no sympy ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"a \boxed{1} b \boxed{2}", Found("2", "box")),
        (r"\boxed{\frac{1}{\{2\}}}", Found(r"\frac{1}{\{2\}}", "box")),
        (r"\boxed{1}, \boxed{2} and $\boxed{3}$.", Found("1, 2, 3", "box")),
        (r"\boxed{1} thus \boxed{2}", Found("2", "box")),
        (r"\boxed{1} <answer>2</answer>", Found("1", "box")),
        (r"so <answer> 2 </answer>", Found("2", "tag")),
        (r"The answer is $x = 2$.", Found("x = 2", "phrase")),
        ("The answers are $1$, $2$ and $3$.", Found("1, 2, 3", "phrase")),
        ("The final answer is 1,234.5 dollars.", Found("1,234.5", "phrase")),
        ("#### 18", Found("18", "hashes")),
        (r"we get $1$. It follows that $x+1$", Found("x+1", "math")),
        ("x + 1", Found("x + 1", "whole")),
        ("There are 12 cats and 13 dogs here.", Found("13", "number")),
        (r"\boxed{}", None),
        (r"\boxed{1} \boxed{2", None),
        ("I have no idea what it could be.", None),
        ("<think>\\boxed{1}", None),
        ("<think>1</think>\\boxed{2}</think>\\boxed{3}", Found("3", "box")),
        ("", None),
    ],
)
def test_where_the_answer_is_found(text, found):
    assert find_answer(text) == found
    assert found is None or found.source in SOURCES


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("-3.5", -3.5),
        (r"\frac{-1}{4}", -0.25),
        (r"2\frac{1}{4}", 2.25),
        ("2 1/4", 2.25),
        (r"0.1\overline{6}", 1 / 6),
        ("2^{-3}", 0.125),
        ("-2^2", -4),
        ("2^3^2", 512),
        (r"(1+2) \times 3", 9),
        ("4!", 24),
        (r"\$5.00", 5),
        ("6 km", 6),
        ("x = 5", 5),
    ],
)
def test_plain_numbers(text, value):
    read = number(text)
    assert read is not None and float(read.value) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "x", "1+", "1..2", "9^9^9", "10^{10000}", "101!", "(1", "1/0", "1 2", "9" * 999]
)
def test_no_plain_numbers(text):
    assert number(text) is None


def test_numbers_are_decided_without_sympy_either_way():
    assert compare_cheaply("12345678901234567891", "12345678901234567890") is False
    assert compare_cheaply(r"\frac{1}{2}", "0.5") is True
    assert compare_cheaply(r"\sqrt{2}", "x") is None


def test_normalise_removes_what_carries_no_value():
    same = [r"\left( 1,\ 2 \right)", "(1,2)", r"( 1 , 2 )", "$(1,2)$", r"\text{(1, 2)}."]
    assert {normalise(text) for text in same} == {"(1,2)"}


def test_golds_of_all_kinds():
    assert read_golds(27.0) == ["27.0"]
    assert read_golds(["$1$", r"\boxed{2}"]) == ["$1$", "2"]
    assert read_golds("so 6 * 3 = 18\n#### 18") == ["18"]
