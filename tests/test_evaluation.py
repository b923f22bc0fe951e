"""Held-out scores by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aspo_jax.evaluation import scores

REWARD = np.array([[1, 1, 1, 0], [0.5, 0, 0, 0], [1, 0, 1, 0]], np.float32)
RIGHT = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]], bool)
DISTINCT = np.array([2, 0, 1])
FINISHED = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
LENGTH = np.array([[1, 2, 3, 4], [5, 5, 5, 5], [0, 0, 0, 6]], np.float32)


def test_by_hand():
    got = scores(REWARD, RIGHT, DISTINCT, FINISHED, LENGTH)
    assert got.avg == pytest.approx((0.75 + 0.0 + 0.5) / 3)
    # sample variance of (9, 0, 6)/12 about 5/12: (16 + 25 + 1)/144 / 2, over 3 prompts
    assert got.avg_stderr == pytest.approx(math.sqrt(42 / 144 / 2 / 3))
    assert got.reward_mean == pytest.approx(5.5 / 12) and got.samples == 4
    assert got.pass_any == pytest.approx(2 / 3)
    assert got.distinct_right == pytest.approx((2 + 0 + 1) / 3)
    assert got.truncated == pytest.approx(3 / 12)
    assert got.response_length == pytest.approx(36 / 12)


def test_one_prompt_has_no_error_estimate():
    got = scores(REWARD[:1], RIGHT[:1], DISTINCT[:1], FINISHED[:1], LENGTH[:1])
    assert got.avg == 0.75 and got.avg_stderr == 0.0


def test_figures_are_plain_numbers():
    assert all(type(x) is float for x in scores(REWARD, RIGHT, DISTINCT, FINISHED, LENGTH))
