"""The grader of reasoning-gym tasks: which answer it reads, and what reaches a scorer."""

import pytest

from aspo_jax.rewards import RewardError, Rules, Scorer, Submission, Verdict, find_problem
from aspo_jax.rewards.reasoning import final_answer, grade, is_data

GRID = "1 0\n0 1"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer> 7 </answer>.", "7"),
        (r"<answer>7</answer> no, \boxed{8}", "7"),
        ("<answer>6</answer> <ANSWER>\n1 0\n0 1\n</ANSWER>", GRID),
        (r"it is \boxed{(1, 2)}", "(1, 2)"),
        ("<think><answer>9</answer></think>The answer is 7.", "7"),
        ("2 + 5.\n\n**Answer:** 7**", "7"),
        ("The final answer is: [1, 2]", "[1, 2]"),
        ("add\n#### 7", "7"),
        (
            "first\nZoey is a knight, and Riley is a knave.",
            "Zoey is a knight, and Riley is a knave.",
        ),
        ("```\n7\n```", "7"),
        ("<answer></answer>", ""),
        ("<think>hm 7", None),
        ("  \n", None),
    ],
)
def test_where_the_answer_is(text, answer):
    assert final_answer(text) == answer


def test_an_answer_of_several_lines_is_as_long_as_the_gold():
    assert final_answer(f"The grid:\n{GRID}\n", GRID) == GRID
    assert final_answer(f"The grid:\n{GRID}\n", "7") == "0 1"


def test_of_a_text_that_was_cut_off_only_what_is_marked_counts():
    assert final_answer("The answer is 7", is_finished=False) is None
    assert final_answer(r"\boxed{7} and", is_finished=False) == "7"
    assert final_answer("<answer>7</answer>, for", is_finished=False) == "7"


@pytest.mark.parametrize("text", ["answer ", "####", "answer is ", "*", ". ", "<answer>", "` "])
def test_a_line_is_read_in_linear_time(text):
    final_answer(text * 100_000)


ATTACKS = [
    "__import__('os').system('true')",
    "exit()",
    "open('x','w')",
    "[].append(1)",
    "(lambda: 0)()",
]


@pytest.mark.parametrize("given", ATTACKS)
@pytest.mark.parametrize("task", ["spiral_matrix", "n_queens", "countdown", "simple_integration"])
def test_an_answer_that_would_be_run_reaches_no_scorer(task, given):
    assert not is_data(task, given)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("spiral_matrix", "[1, 2]"),
        ("n_queens", "[['Q', '_'], ['_', 'Q']]"),
        ("countdown", "(25 + 3)*4 - 7/2"),
        ("simple_integration", "x**2*sin(2*x)/2 + C"),
        ("polynomial_multiplication", "-3*x**2 + 1.5*y"),
        ("chain_sum", "exit()"),  # is compared as text
    ],
)
def test_what_a_scorer_needs_reaches_it(task, given):
    assert is_data(task, given)


def test_answers_that_cannot_be_used_are_named():
    entry = {"question": "1+1", "answer": "2", "metadata": {}}
    assert find_problem("reasoning_gym", {"task": "chain_sum", "entry": entry}) is None
    for bad in ("2", {"task": "chain_sum"}, {"entry": entry}, {"task": 1, "entry": entry}):
        assert "expected such as" in (find_problem("reasoning_gym", bad) or "")
    assert grade("2", "2", True).reason == "bad_gold"


def test_without_the_package_the_remedy_is_said(tmp_path, monkeypatch):
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('none')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        Scorer(1, Rules(), ("reasoning_gym",)) as scorer,
        pytest.raises(RewardError, match=r"need a package: pip install 'aspo_jax.reasoning-gym.'"),
    ):
        scorer.wait_until_ready()


# --- with the package ----------------------------------------------------------------------------


def entry(gold, **metadata):
    return {"question": "?", "answer": gold, "metadata": metadata}


def judged(cases, timeout_s=5.0):
    """[(task, entry, text) or (task, entry, text, config)] -> their verdicts."""
    pytest.importorskip("reasoning_gym")
    submissions = [
        Submission(
            "reasoning_gym", text, {"task": task, "entry": own, "config": dict(*config)}, True, 1
        )
        for task, own, text, *config in cases
    ]
    with Scorer(1, Rules(timeout_s), ("reasoning_gym",)) as scorer:
        return scorer.score(submissions)


def test_the_task_s_scorer_says_what_an_answer_is_worth(tmp_path):
    flag = tmp_path / "run"
    sums = entry("7")
    queens = entry("Q _\n_ Q", valid_answers=["Q _\n_ Q"])
    numbers = entry("3+4", numbers=[3, 4], target=7)
    attack = f"__import__('pathlib').Path('{flag}').touch()"
    said = judged(
        [
            ("chain_sum", sums, "<answer>+7.0</answer>"),
            ("chain_sum", sums, "<answer>it is 7 I think</answer>"),
            ("chain_sum", sums, ""),
            ("countdown", numbers, "4 + 3"),
            ("countdown", numbers, "<answer>4 * 3</answer>"),
            ("n_queens", queens, "<answer>[['Q', '_'], ['_', 'Q']]</answer>"),
            ("n_queens", queens, f"<answer>{attack}</answer>"),
            ("countdown", numbers, f"<answer>{attack}</answer>"),
            ("countdown", numbers, "<answer>(3+4)**999999999</answer>"),
            ("prime_factorization", entry("2 × 3"), "<answer>two</answer>"),
            ("no_such_task", sums, "7"),
        ],
        timeout_s=1.0,
    )
    assert said == [
        Verdict(1.0, "match"),
        Verdict(1 / 15, "mismatch"),
        Verdict(0.0, "no_answer"),
        Verdict(1.0, "match"),
        Verdict(0.05, "mismatch"),
        Verdict(0.5, "mismatch"),
        Verdict(0.0, "invalid"),
        Verdict(0.0, "invalid"),
        Verdict(0.0, "timeout"),
        Verdict(0.0, "invalid"),
        Verdict(0.0, "bad_gold", is_valid=False),
    ]
    assert not flag.exists()


def test_a_scorer_knows_the_settings_of_its_rows():
    sound = ("puzzle24", entry("1", numbers=[6, 4, 1, 1]), "<answer>6 * 4 * 1 * 1</answer>")
    settings = [{}, {"max_value": 5}, {"max_value": 0}]  # 6 is above 5; 0 is refused
    said = judged([(*sound, config) for config in settings])
    assert [verdict.reason for verdict in said] == ["match", "mismatch", "bad_gold"]
