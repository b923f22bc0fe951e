"""The overlong ramp and the repetition metric, against the official code's numbers."""

import pytest

from aspo_jax.rewards import (
    SHAPES,
    Submission,
    Verdict,
    chain,
    curriculum_budget,
    format_reward,
    grpo_lambda,
    mask_truncated,
    overlong_ramp,
    repetition,
    unshaped,
)

RIGHT, WRONG = Verdict(1.0, "match"), Verdict(0.0, "mismatch")
FAILED = Verdict(0.0, "crash", is_valid=False)


def say(tokens=1, text="x", is_finished=True, iteration=0):
    return Submission("exact", text, "x", is_finished, tokens, iteration=iteration)


def shaped(shape, tokens, verdict):
    return shape([[(say(tokens), verdict)]])[0][0]


@pytest.mark.parametrize(
    ("tokens", "fine"),
    [
        (0, 0.0),
        (32_752, 0.0),
        (32_753, -1 / 16),
        (32_760, -0.5),
        (32_767, -15 / 16),
        (32_768, -1.0),
    ],
)
def test_official_overlong_ramp(tokens, fine):
    shape = overlong_ramp(32_768, 16, 1.0)
    for reward in (0.0, 1.0):
        verdict = shaped(shape, tokens, Verdict(reward, "match"))
        assert verdict == Verdict(reward + fine, "match")


def test_factor_scales_the_fine_and_invalid_verdicts_stay():
    shape = overlong_ramp(100, 50, 0.5)
    assert shaped(shape, 75, Verdict(1.0, "match")).reward == 0.75
    assert shaped(shape, 100, FAILED) == FAILED


def test_no_buffer_is_no_ramp():
    assert overlong_ramp(100, 0, 1.0) is unshaped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 1.0), "buffer is 11, expected 0 .off. to max_tokens = 10"),
        ((10, -1, 1.0), "buffer is -1"),
        ((10, 4, -1.0), "factor is -1.0"),
        ((10, 4, float("nan")), "factor is nan"),
    ],
)
def test_impossible_ramps(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlong_ramp(*arguments)


def test_repetition():
    assert repetition("a b " * 30) == pytest.approx(39 / 41)
    assert round(repetition("A b a B " * 15), 3) == 0.951  # case does not count
    assert repetition("a " * 19) == 0.0
    assert repetition("a " * 20) == 0.0
    assert repetition("a\n" * 21) == 0.5
    assert repetition("") == 0.0
    assert repetition(" ".join(map(str, range(1000)))) == 0.0
    assert repetition("a b c a b c", n=3) == pytest.approx(1 / 4)


def test_masking_leaves_the_reward_and_takes_the_sample_out():
    verdicts = mask_truncated()([[(say(), RIGHT), (say(is_finished=False), RIGHT)]])
    assert verdicts == [[RIGHT, Verdict(1.0, "match", is_valid=False)]]


def test_grpo_lambda_by_hand():
    """Of five groups the one with most right answers is fined, its right answers only."""
    most = [(say(100), RIGHT), (say(200), RIGHT), (say(300), WRONG), (say(9), FAILED)]
    less = [(say(100), RIGHT), (say(200), WRONG), (say(300), WRONG), (say(9), WRONG)]
    plain = [verdict for _, verdict in less]
    got = grpo_lambda(top=0.2, alpha=0.6)([less, most, less, less, less])
    assert got[0] == got[2] == got[3] == got[4] == plain
    # lengths 100 and 200: mean 150, standard deviation 50, sigmoid(-1) and sigmoid(1)
    assert [v.reward for v in got[1]] == pytest.approx(
        [1 - 0.6 * 0.268941, 1 - 0.6 * 0.731059, 0, 0]
    )
    assert got[1][2:] == [WRONG, FAILED]


def test_grpo_lambda_without_a_right_answer_or_a_spread():
    assert grpo_lambda(top=1.0)([[(say(5), WRONG)]]) == [[WRONG]]
    (group,) = grpo_lambda(top=1.0, alpha=0.6)([[(say(5), RIGHT), (say(5), RIGHT)]])
    assert [v.reward for v in group] == pytest.approx([0.7, 0.7])
    assert grpo_lambda(top=0.0)([[(say(5), RIGHT)]]) == [[RIGHT]]


@pytest.mark.parametrize(
    ("tokens", "iteration", "paid"),
    [(256, 0, 0.1), (128, 0, 0.05), (0, 0, 0.0), (512, 0, 0.0), (600, 9, 0.0), (128, 10, 0.1)],
)
def test_curriculum_budget_shrinks(tokens, iteration, paid):
    shape = curriculum_budget(start=256, decay=0.5, every=10, weight=0.1)
    ((got,),) = shape([[(say(tokens, iteration=iteration), WRONG)]])
    assert got.reward == pytest.approx(paid)


@pytest.mark.parametrize(
    ("text", "is_paid"),
    [
        ("<think>so</think>4", True),
        ("so</think>\n4", True),
        ("4", False),
        ("<think>so</think>", False),
        ("<think> </think>4", False),
        ("<think>so</think>4</think>5", False),
        ("<think>so<think>more</think>4", False),
        ("<think>so", False),
    ],
)
def test_format_reward(text, is_paid):
    ((got,),) = format_reward(0.1)([[(say(text=text), RIGHT)]])
    assert got.reward == pytest.approx(1.1 if is_paid else 1.0)


def test_shapes_chain_in_order_and_never_touch_a_failed_grader():
    shape = chain(overlong_ramp(100, 50, 1.0), format_reward(0.1), mask_truncated())
    text = "so</think>4"
    group = [(say(75, text), RIGHT), (say(100, text, is_finished=False), RIGHT), (say(99), FAILED)]
    (got,) = shape([group])
    assert [v.reward for v in got] == pytest.approx([0.6, 0.1, 0.0])
    assert [v.is_valid for v in got] == [True, False, False]
    assert chain()([group]) == unshaped([group])
    for make in SHAPES.values():
        assert make()([[(say(99), FAILED)]]) == [[FAILED]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grpo_lambda(top=1.5), "grpo_lambda: top is 1.5, expected a share"),
        (lambda: grpo_lambda(alpha=-1.0), "alpha is -1.0"),
        (lambda: curriculum_budget(start=0), "start is 0, expected at least 1 token"),
        (lambda: curriculum_budget(decay=0.0), "decay is 0.0"),
        (lambda: curriculum_budget(every=0), "every is 0"),
    ],
)
def test_impossible_shapes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
