"""The overlong ramp and the repetition metric, against the official code's numbers."""

import pytest

from aspo_jax.rewards import Submission, Verdict, overlong_ramp, repetition, unshaped


def shaped(shape, tokens, verdict):
    return shape(Submission("exact", "x", "x", True, tokens), verdict)


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
    timeout = Verdict(0.0, "timeout", is_valid=False)
    assert shaped(shape, 100, timeout) == timeout


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
