"""A reward of one's own, and grading in the background."""

import os
import textwrap
import threading
import time

import pytest

from aspo_jax.rewards import (
    RewardError,
    Rules,
    Scorer,
    Submission,
    Verdict,
)
from aspo_jax.rewards.custom import load_function

MODULE = """
    import os, sys, time
    from aspo_jax.rewards import Verdict

    not_a_function = 3

    def length(prompt, completion, answer):
        return len(prompt) + 10 * len(completion) + 100 * answer

    def judge(prompt, completion, answer):
        if completion == "hang": time.sleep(1000)
        if completion == "die": os._exit(7)
        if completion == "raise": raise ValueError("no")
        if completion == "nan": return float("nan")
        if completion == "none": return None
        if completion == "bool": return True
        if completion == "odd verdict": return Verdict(1.0, "won")
        if completion == "environment": return float(len(os.environ))
        if completion == "flood": print("x" * 10**7)
        return Verdict(0.25, "mismatch") if completion == "verdict" else 0.5

    def two(prompt, completion): return 0.0

    def constant(prompt, completion, answer): return answer
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)


def test_numbers_from_one_on_are_right(module):
    with Scorer(1, Rules(function="my_rewards:constant"), ("custom",)) as scorer:
        answers = [-1.0, 0, 0.05, 0.999, 1, 1.5]
        verdicts = scorer.score([say("", answer=answer) for answer in answers])
    assert [v.reward for v in verdicts] == answers
    assert [v.reason for v in verdicts] == ["mismatch"] * 4 + ["match"] * 2


def say(text, kind="custom", answer: object = 2):
    return Submission(kind, text, answer, True, 1, prompt="ask")


def test_a_function_sees_prompt_completion_and_answer(module):
    with Scorer(1, Rules(function="my_rewards:length"), ("custom",)) as scorer:
        assert scorer.score([say("four")]) == [Verdict(243.0, "match")]


def test_whatever_it_does_is_a_verdict(module, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    texts = [
        "fine",
        "hang",
        "die",
        "raise",
        "nan",
        "none",
        "bool",
        "odd verdict",
        "verdict",
        "flood",
    ]
    with Scorer(2, Rules(timeout_s=1.0, function="my_rewards:judge"), ("custom",)) as scorer:
        verdicts = dict(zip(texts, scorer.score([say(t) for t in texts]), strict=True))
        (environment,) = scorer.score([say("environment")])
    fine, crash = Verdict(0.5, "mismatch"), Verdict(0.0, "crash", is_valid=False)
    assert verdicts["fine"] == verdicts["flood"] == fine
    assert verdicts["hang"] == Verdict(0.0, "timeout")
    assert verdicts["verdict"] == Verdict(0.25, "mismatch")
    for text in ("die", "raise", "nan", "none", "bool", "odd verdict"):
        assert verdicts[text] == crash
    assert environment.reward <= 3  # PATH, LD_LIBRARY_PATH and PYTHONPATH at most


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected 'package.module:function'"),
        ("my_rewards", "expected 'package.module:function'"),
        ("my_rewards:", "expected 'package.module:function'"),
        ("my_reward:length", "cannot import my_reward .*No module named.*PYTHONPATH"),
        ("my_rewards:lenght", "has no function 'lenght'; it has constant, judge, length, two"),
        ("my_rewards:not_a_function", "has no function 'not_a_function'"),
        ("my_rewards:two", r"cannot be called with \(prompt, completion, answer\)"),
    ],
)
def test_a_function_that_cannot_be_used_is_named_at_the_start(module, name, message):
    with (
        Scorer(1, Rules(function=name), ("custom",)) as scorer,
        pytest.raises(RewardError, match=message),
    ):
        scorer.wait_until_ready()


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="cannot import broken_rewards .ZeroDivisionError"):
        load_function("broken_rewards:f")


def test_a_kind_that_was_not_opened_is_refused_with_the_remedy():
    with (
        Scorer(1, Rules(30.0)) as scorer,
        pytest.raises(ValueError, match="without the grader 'math'"),
    ):
        scorer.score([say("1", "math")])


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RewardError, match="bwrap is not installed.*Reward.sandbox = 'rlimits'"):
        Scorer(1, Rules(sandbox="namespaces"), ("code",))


# --- in the background ---------------------------------------------------------------------------


def exact(text, answer="right"):
    return say(text, "exact", answer)


def test_results_come_by_number_whatever_the_order():
    with Scorer(2, Rules(30.0)) as scorer:
        for _ in range(2):
            with scorer.begin() as grading:
                for number in (3, 0, 2, 1):
                    grading.submit(number, exact(str(number), str(number % 2)))
                    time.sleep(0.01)
                results = grading.results()
            assert [s.text for s, _ in results] == ["0", "1", "2", "3"]
            assert [v.reward for _, v in results] == [1.0, 1.0, 0.0, 0.0]


def test_it_judges_while_nobody_waits(module):
    with Scorer(1, Rules(function="my_rewards:judge"), ("custom",)) as scorer:
        scorer.wait_until_ready()
        with scorer.begin() as grading:
            grading.submit(0, say("fine"))
            end = time.monotonic() + 20
            while not grading._round.verdicts and time.monotonic() < end:
                time.sleep(0.01)
            assert grading._round.verdicts == {0: Verdict(0.5, "mismatch")}
            assert len(grading.results()) == 1


def test_leaving_early_gives_up_and_the_next_round_is_clean(module):
    rules = Rules(timeout_s=60.0, function="my_rewards:judge")
    with Scorer(1, rules, ("custom",)) as scorer:
        scorer.wait_until_ready()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt), scorer.begin() as grading:
            grading.submit(0, say("hang"))
            raise KeyboardInterrupt
        assert time.monotonic() - start < 10
        assert not any(thread.name == "grading" for thread in threading.enumerate())
        assert scorer.score([say("fine")]) == [Verdict(0.5, "mismatch")]


def test_a_worker_that_cannot_start_is_told_to_who_waits():
    with Scorer(1, Rules(function="nowhere:f"), ("custom",)) as scorer, scorer.begin() as grading:
        grading.submit(0, say("x"))
        with pytest.raises(RewardError, match="nowhere"):
            grading.results()


def test_numbers_are_used_once_and_kinds_checked_at_once():
    with Scorer(1, Rules(30.0)) as scorer, scorer.begin() as grading:
        grading.submit(0, exact("a"))
        with pytest.raises(ValueError, match="submission 0 is there already"):
            grading.submit(0, exact("b"))
        with pytest.raises(ValueError, match="unknown kind"):
            grading.submit(1, say("b", "exakt"))
        assert len(grading.results()) == 1


def test_no_round_is_an_empty_round():
    with Scorer(1, Rules(30.0)) as scorer, scorer.begin() as grading:
        assert grading.results() == []


def test_descriptors_are_given_back():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Scorer(2, Rules(30.0)) as scorer:
            scorer.score([exact("right")] * 4)
    assert len(os.listdir("/proc/self/fd")) <= before
