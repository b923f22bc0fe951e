"""The math grader on answers of our own: what is equal, what only looks so, and what blows up."""

import random
import time

import math_cases
import pytest

from aspo_jax.rewards import Rules, Scorer, Submission, Verdict, find_problem
from aspo_jax.rewards.answers import find_answer
from aspo_jax.rewards.math import mathematics
from aspo_jax.rewards.math.latex import normalise, number
from aspo_jax.rewards.math.mathematics import compare_cheaply, read_golds

CASES = [case for case in math_cases.listed() if case[0] != "missed by ours"]


def say(response, gold, is_finished=True):
    return Submission("math", response, gold, is_finished, 1)


@pytest.fixture(scope="module")
def scorer():
    with Scorer(1, Rules(30.0), kinds=("math",)) as scorer:
        yield scorer


def test_there_are_many_cases_of_both_kinds():
    assert len(CASES) >= 1500
    assert sum(not is_right for *_, is_right in CASES) >= 500


def wrong(cases, verdicts):
    return [
        (*case, verdict.reason)
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.is_right != case[-1] or verdict.reward != float(case[-1])
    ]


def test_cases(monkeypatch):
    """A failure lists every case that is judged wrongly."""
    monkeypatch.setattr(mathematics, "in_child", lambda function, limit_s: function())
    verdicts = [mathematics.grade(response, gold, True) for _, gold, response, _ in CASES]
    assert wrong(CASES, verdicts) == []


def test_cases_by_convention_in_a_worker(scorer):
    cases = [("by convention", *case) for case in math_cases.BY_CONVENTION]
    cases += [case for case in CASES if case[0] in ("algebra", "where the answer is")]
    verdicts = scorer.score([say(response, gold) for _, gold, response, _ in cases])
    assert wrong(cases, verdicts) == []


def test_blow_ups_end_in_time_and_harm_nobody():
    """Each within its limit, the neighbours' verdicts as ever, and no worker lost."""
    limit = 1.0
    hostile = list(math_cases.BLOW_UPS.values())
    texts = [text for h in hostile for text in (h, r"\boxed{2x+3}")]
    with Scorer(2, Rules(limit), kinds=("math",)) as scorer:
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


TRUNCATED = [
    (r"\boxed{4} and", "match", "match"),
    (r"\boxed{5} and", "mismatch", "mismatch"),
    ("<answer>4</answer> and", "match", "match"),
    ("The answer is 4. To check this", "match", "match"),
    ("#### 4\n\nQuestion:", "match", "match"),
    ("so we look at this again and", "truncated", "truncated"),
    (r"\boxed{4", "truncated", "truncated"),
    ("The first step gives 4", "truncated", "match"),
    ("The first step gives $x = 4$ and", "truncated", "match"),
    ("4", "truncated", "match"),
    ("so there are 5", "truncated", "mismatch"),
]


def test_a_text_that_was_cut_off_is_judged_by_what_it_calls_its_answer(scorer):
    submissions = [say(text, "4", is_finished=False) for text, *_ in TRUNCATED]
    assert [v.reason for v in scorer.score(submissions)] == [said for _, said, _ in TRUNCATED]
    with Scorer(1, Rules(grade_truncated=True), kinds=("math",)) as lenient:
        reasons = [v.reason for v in lenient.score(submissions)]
    assert reasons == [said for *_, said in TRUNCATED]


GARBAGE = [
    "9" * 100_000,
    "9" * 4301,
    "1." + "3" * 9000,
    r"0.\overline{" + "3" * 5000 + "}",
    "(" * 2000 + "1" + ")" * 2000,
    "{" * 3000 + "}" * 3000,
    r"\{" * 700 + "1" + r"\}" * 700,
    "2^" * 400 + "2",
    "10^{10^{10}}",
    "100000!",
    "0/0",
    r"\frac{1}{0}",
    "1e999999",
    r"\binom{10^9}{5\cdot10^8}",
    "\0" * 50,
    "\ud800",
    "nan",
    "zoo",
    "-",
    "=",
    "<",
    r"\{\}",
    ",",
    r"\frac" * 300,
    "(A) " * 340,
    r"\text{" * 200,
    "<think>",
]


def test_no_text_fails_its_grader():
    """Garbage against garbage: each pair a verdict, in its time, from the same worker."""
    rng = random.Random(0)
    pieces = [
        r"\frac",
        r"\sqrt",
        "{",
        "}",
        "^",
        "_{",
        "(",
        "]",
        r"\{",
        ",",
        "7",
        "0.5",
        "x",
        "!",
        "=",
        "<",
    ]
    pieces += [
        r"\pm",
        r"\cup",
        r"\text{and}",
        "\0",
        "\udfff",
        "\u0301",
        "½",
        "²",
        "٣",
        "%",
        ":",
        "\\",
        "I",
    ]
    mixed = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(60)]
    golds = ["5", r"\frac12", "x+1", "(1,2)", *GARBAGE]
    texts = [rng.choice([*GARBAGE, *mixed]) for _ in range(70)]
    with Scorer(1, Rules(timeout_s=0.3), kinds=("math",)) as scorer:
        verdicts = scorer.score([say(rf"\boxed{{{t}}}", rng.choice(golds)) for t in texts])
    assert "crash" not in {verdict.reason for verdict in verdicts}


@pytest.mark.parametrize(
    "gold", ["even", "Monday", 5, 2.5, "1,2", r"\{1\}", "$x$", ["1", "x"], "5 cm"]
)
def test_golds_that_can_be_matched(scorer, gold):
    assert find_problem("math", gold) is None
    text = gold[-1] if isinstance(gold, list) else gold
    assert scorer.score([say(rf"\boxed{{{text}}}", gold)]) == [Verdict(1.0, "match")]


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("", "found the answer ''"),
        ("$$", "no response can match"),
        (r"\frac{1}{", "balance its braces"),
        ("x}", "balance its braces"),
        ("1</think>2", "no response can match"),
        (["1", "{"], "found the answer '{'"),
        ([], "an empty list"),
        (float("nan"), "found the answer nan, expected a string, a number (finite)"),
        (True, "found the answer True"),
        ({"a": 1}, "expected a string, a number (finite), or a list of those"),
        pytest.param(10**5000, "a number of over 4000 digits", id="long"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_golds_that_nothing_can_match(gold, found):
    assert found in (find_problem("math", gold) or "")


# --- the parts, which know no sympy ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"a \boxed{1} b \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\{2\}}}", r"\frac{1}{\{2\}}"),
        (r"\boxed{1}, \boxed{2} and $\boxed{3}$.", "1, 2, 3"),
        (r"\boxed{1} thus \boxed{2}", "2"),
        (r"\boxed{1} <answer>2</answer>", "1"),
        (r"so <answer> 2 </answer>", "2"),
        (r"The answer is $x = 2$.", "x = 2"),
        ("The answers are $1$, $2$ and $3$.", "1, 2, 3"),
        ("The final answer is 1,234.5 dollars.", "1,234.5"),
        ("#### 18", "18"),
        (r"we get $1$. It follows that $x+1$", "x+1"),
        ("x + 1", "x + 1"),
        ("There are 12 cats and 13 dogs here.", "13"),
        ("Let $x$ be odd. There are 12 of them", "12"),
        ("The value is $y$", "y"),
        (r"\boxed{1}, \quad \boxed{2}", "1, 2"),
        (r"\boxed{1} \; \text{or} \; \boxed{2}", "1, 2"),
        (r"\boxed{1} \\ \boxed{2}", "1, 2"),
        (r"$x=\boxed{1}$, $y=\boxed{2}$", "1, 2"),
        ("(a) $\\boxed{1}$\n(b) $\\boxed{2}$", "1, 2"),
        ("\\boxed{1}\n\n\\boxed{2}", "2"),
        (r"$\boxed{1}$. $\boxed{2}$", "2"),
        (r"\boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1} " * 99, "1"),
        ("Answer: the largest $n$ is 34.", "34"),
        ("<answer>The answer is $5$.</answer>", "5"),
        ("I paid $3 of $5", "5"),
        (r"\boxed{}", None),
        (r"\boxed{1} \boxed{2", None),
        ("I have no idea what it could be.", None),
        ("<think>\\boxed{1}", None),
        ("<think>1</think>\\boxed{2}</think>\\boxed{3}", "3"),
        ("", None),
    ],
)
def test_where_the_answer_is_found(text, found):
    assert find_answer(text) == found


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
        ("2(3)^2!/(1+2)", 6),
        (r"2(1+\frac{1}{2})\div 4", 0.75),
        ("2^-(-3!+2)*--1", 16),
        ("007", 7),
    ],
)
def test_plain_numbers(text, value):
    read = number(text)
    assert read is not None and float(read.value) == pytest.approx(value, rel=1e-15)


NO_NUMBERS = ["", "x", "1+", "1..2", "9^9^9", "10^{10000}", "101!", "(1", "1/0", "1 2", "9" * 999]
NO_NUMBERS += [
    "(1}",
    "{2}{3}",
    "(2)3",
    "7//2",
    r"2*\times 3",
    r"\frac(1)(2)",
    "F",
    "'1'",
    "()",
    "5%%",
]


@pytest.mark.parametrize("text", NO_NUMBERS)
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
