"""Scores of problems against counting everything that can be drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from aspo_jax.statistics import estimate, majority, pass_at, powers, standard_error

RIGHT_PG = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], bool)


@pytest.mark.parametrize("j", [1, 2, 3, 4, 5])
def test_pass_at_is_the_share_of_all_choices_of_j_samples(j):
    """Every subset of j of the G samples, counted."""
    expected = [
        np.mean([any(chosen) for chosen in itertools.combinations(row, j)]) for row in RIGHT_PG
    ]
    np.testing.assert_allclose(pass_at(RIGHT_PG, j), expected, rtol=1e-12)


def test_pass_at_is_unbiased():
    """The mean over all outcomes of 4 draws with p = 0.3 is 1 - 0.7^j."""
    outcomes = np.array(list(itertools.product([0, 1], repeat=4)))
    chance = np.prod(np.where(outcomes, 0.3, 0.7), axis=1)
    for j in (1, 2, 3, 4):
        assert chance @ pass_at(outcomes, j) == pytest.approx(1 - 0.7**j)


def test_pass_at_holds_for_many_samples_and_refuses_more_than_there_are():
    right = np.arange(1000)[None] < 3
    # 1 - C(997, 500) / C(1000, 500), whose binomials are beyond a float
    assert pass_at(right, 500)[0] == pytest.approx(1 - 500 * 499 * 498 / (1000 * 999 * 998))
    for j in (0, 6):
        with pytest.raises(ValueError, match=f"pass@{j} of 5 samples, expected 1 to 5"):
            pass_at(RIGHT_PG, j)


def test_powers_end_with_all_samples():
    assert [powers(k) for k in (1, 2, 4, 6, 64)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16, 32, 64],
    ]


def brute_majority(votes, right) -> float:
    """Ties broken by each of the tied answers in turn, one of its samples taken in turn."""
    cast = [v for v in votes if v is not None]
    if not cast:
        return 0.0
    most = max(cast.count(v) for v in cast)
    winners = [v for v in dict.fromkeys(cast) if cast.count(v) == most]
    shares = [
        np.mean([r for v, r in zip(votes, right, strict=True) if v == winner]) for winner in winners
    ]
    return float(np.mean(shares))


def test_majority_is_the_expectation_over_ties():
    votes = [
        ["a", "a", "b", "b"],
        ["a", "b", "c", None],
        [None, None, None, None],
        ["a", "a", "a", "b"],
    ]
    right = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(majority(votes, right), [1 / 2, 1 / 3, 0.0, 0.0])
    rng = np.random.RandomState(0)
    drawn = [[[None, "a", "b", "c"][i] for i in row] for row in rng.randint(4, size=(50, 6))]
    right = rng.randint(2, size=(50, 6))
    expected = [brute_majority(v, r) for v, r in zip(drawn, right, strict=True)]
    np.testing.assert_allclose(majority(drawn, right), expected)


def test_the_interval_resamples_problems():
    """The quantiles of the mean over every way to draw five of five problems, 3,125 in all."""
    score_P = np.array([0.0, 0.25, 0.5, 1.0, 1.0])
    means = [np.mean(drawn) for drawn in itertools.product(score_P, repeat=5)]
    found = estimate(score_P, resamples=200_000, seed=3)
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert (found.value, found.low, found.high) == pytest.approx((0.55, low, high), abs=1e-9)
    assert found.stderr == pytest.approx(np.std(score_P, ddof=1) / np.sqrt(5))


def test_an_interval_covers_as_often_as_it_says():
    """Of 400 draws of 60 problems from one population about 95 % hold its mean."""
    rng = np.random.RandomState(1)
    hits = 0
    for draw in range(400):
        e = estimate(rng.binomial(4, 0.3, size=60) / 4, resamples=400, seed=draw)
        hits += e.low <= 0.3 <= e.high
    assert 0.91 < hits / 400 < 0.98


def test_the_same_scores_have_the_same_interval():
    score_P = np.random.RandomState(0).rand(40)
    assert estimate(score_P) == estimate(score_P.copy())
    assert estimate(score_P) != estimate(score_P, seed=1)
    assert standard_error(np.array([0.3])) == 0.0
    assert estimate(np.array([0.5])) == (0.5, 0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="no problem"):
        estimate(np.array([]))
