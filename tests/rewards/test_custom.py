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

    def judge(completion):
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

    def ranks(completions, answer):
        if "hang" in completions: time.sleep(1000)
        if "die" in completions: os._exit(7)
        if "once" in completions and not os.path.exists(answer):
            open(answer, "w").close()
            os._exit(7)
        if "few" in completions: return [0.5]
        if "none" in completions: return None
        if "word" in completions: return ["a"] * len(completions)
        order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
        return [order.index(i) / 10 for i in range(len(order))]

    def sees(completion, row, kind, iteration, is_finished, response_tokens, extra=3, *a, **k):
        assert (kind, iteration, is_finished, response_tokens, extra) == ("custom", 4, True, 1, 3)
        return row["length"] - len(completion)

    def group_sees(completions, prompt, row, is_finished, response_tokens):
        assert (prompt, is_finished, response_tokens) == ("ask", [True] * 2, [1] * 2)
        return [row["weight"] * len(text) for text in completions]

    def patient(completions):
        time.sleep(1.5)
        return [0.0] * len(completions)

    def short(completion): return 1.0 if len(completion) < 3 else -1.0
    def style(completion): return completion.count("!") / 10
    def lame(completion): return style(completion) if completion != "raise" else 1 / 0
    def slow(completion): return time.sleep(1000 if completion == "hang" else 0) or 0.5
    def masks(completion): return Verdict(0.5, "mismatch", is_valid=completion != "mask")
    def math(completion): return 0.0

    def odd(prompt, completion, gold): return 0.0
    def near(prompt, completions, anwser): return 0.0
    def neither(prompt, answer): return 0.0
    def both(completion, completions): return 0.0
    def by_place(completion, /): return 0.0

    def constant(completion, answer): return answer
"""
CRASH = Verdict(0.0, "crash", is_valid=False)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)


def scorer_of(*names, kinds=("custom",), workers=1, weights=(), timeout_s=5.0):
    functions = tuple(f"my_rewards:{name}" for name in names)
    return Scorer(workers, Rules(timeout_s, functions=functions, weights=weights), kinds)


def say(text, kind="custom", answer: object = 2, **more):
    return Submission(kind, text, answer, True, 1, prompt="ask", **more)


def test_one_is_right_and_no_share_is_neither_right_nor_wrong(module):
    with scorer_of("constant") as scorer:
        answers = [-1.0, 0, 0.05, 0.999, 1, 10 * 0.1, 1.5, 3.7]
        verdicts = scorer.score([say("", answer=answer) for answer in answers])
    assert [v.reward for v in verdicts] == answers
    reasons = ["scored"] + ["mismatch"] * 3 + ["match"] * 2 + ["scored"] * 2
    assert [v.reason for v in verdicts] == reasons
    assert all(v.is_valid for v in verdicts)


def test_a_function_sees_prompt_completion_and_answer(module):
    with scorer_of("length") as scorer:
        assert scorer.score([say("four")]) == [Verdict(243.0, "scored")]


def test_a_function_gets_what_its_parameters_name(module):
    with scorer_of("sees") as scorer:
        assert scorer.score([say("four", row={"length": 5}, iteration=4)]) == [
            Verdict(1.0, "match")
        ]


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
    with scorer_of("judge", workers=2, timeout_s=1.0) as scorer:
        verdicts = dict(zip(texts, scorer.score([say(t) for t in texts]), strict=True))
        (environment,) = scorer.score([say("environment")])
    fine = Verdict(0.5, "mismatch")
    assert verdicts["fine"] == verdicts["flood"] == fine
    assert verdicts["hang"] == Verdict(0.0, "timeout")
    assert verdicts["verdict"] == Verdict(0.25, "mismatch")
    for text in ("die", "raise", "nan", "none", "bool", "odd verdict"):
        assert verdicts[text] == CRASH
    assert environment.reward <= 3  # PATH, LD_LIBRARY_PATH and PYTHONPATH at most


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected 'package.module:function'"),
        ("my_rewards", "expected 'package.module:function'"),
        ("my_rewards:", "expected 'package.module:function'"),
        ("my_reward:length", "cannot import my_reward .*No module named.*PYTHONPATH"),
        ("my_rewards:lenght", "has no function 'lenght'; it has .*judge, lame, length"),
        ("my_rewards:not_a_function", "has no function 'not_a_function'"),
        ("my_rewards:odd", "has a parameter 'gold', which nothing fills; it may have completion, "),
        ("my_rewards:near", r"has a parameter 'anwser', .* \(did you mean answer\?\)"),
        ("my_rewards:neither", "has neither completion nor completions; expected"),
        ("my_rewards:both", "has both completion and completions; expected"),
        ("my_rewards:by_place", "takes 'completion' by position only"),
    ],
)
def test_a_function_that_cannot_be_used_is_named_at_the_start(module, name, message):
    with (
        Scorer(1, Rules(functions=(name,)), ("custom",)) as scorer,
        pytest.raises(RewardError, match=message),
    ):
        scorer.wait_until_ready()


def test_rows_without_a_grader_need_a_function():
    with Scorer(1, Rules(), ("custom",)) as scorer, pytest.raises(RewardError, match="names none"):
        scorer.wait_until_ready()


# --- whole groups --------------------------------------------------------------------------------


def test_a_group_is_judged_at_once(module):
    groups = [["bb", "a", "ccc"], ["", "dddd", "e"]]
    with scorer_of("ranks", workers=2) as scorer:
        scored = scorer.score([say(text) for group in groups for text in group], group=3)
    assert [v.reward for v in scored] == [0.1, 0.0, 0.2, 0.0, 0.2, 0.1]
    assert {v.reason for v in scored} == {"mismatch"}


def test_a_group_function_gets_what_its_parameters_name(module):
    with scorer_of("group_sees") as scorer:
        row = {"weight": 0.25}
        verdicts = scorer.score([say("ab", row=row), say("c", row=row)], group=2)
    assert [v.reward for v in verdicts] == [0.5, 0.25]


def test_trouble_in_a_group_is_that_group_s_alone(module, tmp_path):
    texts = ["a", "hang", "die", "few", "none", "word", "once", "bb"]
    with scorer_of("ranks", workers=2, timeout_s=0.5) as scorer:
        flag = str(tmp_path / "tried")
        submissions = [say(t, answer=flag) for text in texts for t in (text, text + "longer")]
        verdicts = scorer.score(submissions, group=2)
    by_text = dict(zip(texts, zip(verdicts[::2], verdicts[1::2], strict=True), strict=True))
    fine = (Verdict(0.0, "mismatch"), Verdict(0.1, "mismatch"))
    assert by_text["a"] == by_text["bb"] == by_text["once"] == fine
    assert by_text["hang"] == (Verdict(0.0, "timeout"),) * 2
    for text in ("die", "few", "none", "word"):
        assert by_text[text] == (CRASH, CRASH)


def test_a_group_has_the_time_of_all_its_answers(module):
    with scorer_of("patient", timeout_s=1.0) as scorer:
        scorer.wait_until_ready()
        assert scorer.score([say("a")])[0].reason == "timeout"
        assert {v.reason for v in scorer.score([say("a")] * 4, group=4)} == {"mismatch"}


def test_a_group_is_judged_as_soon_as_it_is_whole(module):
    with scorer_of("ranks") as scorer, scorer.begin(group=2) as grading:
        for number in (3, 0, 2):  # the first prompt waits for its second answer
            grading.submit(number, say(str(number)))
        end = time.monotonic() + 20
        while len(grading._round.verdicts) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert grading._round.verdicts.keys() == {2, 3}
        grading.submit(1, say("1"))
        assert [s.text for s, _ in grading.results()] == ["0", "1", "2", "3"]


def test_a_group_that_is_not_whole_is_an_error(module):
    with (
        scorer_of("ranks") as scorer,
        pytest.raises(ValueError, match="found 1 submissions of a group, expected all 2: ranks"),
    ):
        scorer.score([say("a")] * 3, group=2)


# --- rewards of several parts --------------------------------------------------------------------


def test_a_kind_and_functions_add_up_by_weight(module):
    kinds = ("exact", "custom")
    with scorer_of("style", "ranks", kinds=kinds, weights=(0.5, -2.0)) as scorer:
        said = [("!!", "!!"), ("!", "no")]
        submissions = [say(text, "exact", answer) for text, answer in said]
        right, wrong = scorer.score(submissions, group=2)
        (own,) = scorer.score([say("!!!!")])
        assert list(scorer.parts) == ["exact", "style", "ranks"]
    assert right == Verdict(
        1 + 0.5 * 0.2 - 2 * 0.1,
        "match",
        parts={
            "exact": Verdict(1.0, "match"),
            "style": Verdict(0.2, "mismatch"),
            "ranks": Verdict(0.1, "mismatch"),
        },
    )
    assert (wrong.reward, wrong.reason) == (0.5 * 0.1, "mismatch")
    assert (own.reward, list(own.parts)) == (0.5 * 0.4, ["style", "ranks"])


def test_the_first_function_says_what_is_right(module):
    with scorer_of("short", "style") as scorer:
        verdicts = scorer.score([say("a!"), say("long!")])
    assert [(v.reward, v.reason) for v in verdicts] == [(1.1, "match"), (-0.9, "scored")]
    with scorer_of("style", "short") as scorer:
        assert [v.reason for v in scorer.score([say("a!")])] == ["mismatch"]


def test_a_single_function_needs_no_parts_but_with_a_weight(module):
    with scorer_of("style") as scorer:
        assert scorer.score([say("!")]) == [Verdict(0.1, "mismatch")] and scorer.parts == {}
    with scorer_of("style", weights=(3.0,)) as scorer:
        (verdict,) = scorer.score([say("!")])
    assert verdict.reward == pytest.approx(0.3) and verdict.parts["style"].reward == 0.1


def test_a_part_that_fails_masks_and_one_that_is_late_is_0(module):
    texts = ["a!", "raise", "hang", "mask"]
    with scorer_of("style", "lame", "slow", "masks", timeout_s=1.0) as scorer:
        fine, failed, late, masked = scorer.score([say(text) for text in texts])
    assert fine.reward == pytest.approx(0.1 + 0.1 + 0.5 + 0.5) and fine.is_valid
    assert (failed.reward, failed.reason, failed.is_valid) == (0.0, "crash", False)
    assert failed.parts["slow"] == Verdict(0.5, "mismatch") and failed.parts["lame"] == CRASH
    assert (late.reward, late.reason, late.is_valid) == (0.5, "mismatch", True)
    assert late.is_late and not fine.is_late
    assert (masked.reward, masked.reason, masked.is_valid) == (1.0, "mismatch", False)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (("style", "style"), (), "'style', as another function is named; rename"),
        (("math",), (), "'math', as a kind of answers is named; rename"),
        (("style",), (1.0, 2.0), "found 2 Reward.weights for 1 Reward.functions"),
    ],
)
def test_parts_that_cannot_be_told_apart(names, weights, message):
    with pytest.raises(RewardError, match=message):
        scorer_of(*names, weights=weights)


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
    with Scorer(1, Rules(functions=("my_rewards:judge",)), ("custom",)) as scorer:
        scorer.wait_until_ready()
        with scorer.begin() as grading:
            grading.submit(0, say("fine"))
            end = time.monotonic() + 20
            while not grading._round.verdicts and time.monotonic() < end:
                time.sleep(0.01)
            assert grading._round.verdicts == {0: Verdict(0.5, "mismatch")}
            assert len(grading.results()) == 1


def test_leaving_early_gives_up_and_the_next_round_is_clean(module):
    rules = Rules(timeout_s=60.0, functions=("my_rewards:judge",))
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
    with (
        Scorer(1, Rules(functions=("nowhere:f",)), ("custom",)) as scorer,
        scorer.begin() as grading,
    ):
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
