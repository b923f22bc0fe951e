"""Laws of the advantages."""

import numpy as np
import pytest

from aspo_jax.losses import ADVANTAGES, group_mean, group_zscore, leave_one_out

FACTORIES = [*ADVANTAGES.values(), lambda: group_zscore(ddof=0, eps=0.0)]
every_advantage = pytest.mark.parametrize("factory", FACTORIES)
VALID = np.ones((1, 4), bool)


@every_advantage
def test_they_sum_to_zero_over_the_valid_samples(factory):
    rng = np.random.default_rng(0)
    reward, is_valid = rng.normal(size=(20, 8)), rng.random((20, 8)) < 0.8
    is_valid[:, :2] = True
    advantage = np.asarray(factory()(reward, is_valid))
    assert advantage.dtype == np.float32
    np.testing.assert_allclose(advantage.sum(-1), 0, atol=1e-5)
    assert (advantage[~is_valid] == 0).all()


@every_advantage
def test_equal_rewards_give_exact_zeros(factory):
    for reward in (0.1, 1 / 3, 0.0, -1e6):
        assert (np.asarray(factory()(np.full((2, 7), reward), np.ones((2, 7), bool))) == 0).all()


@every_advantage
def test_failed_graders_change_nothing(factory):
    reward = np.array([[1.0, np.nan, 0.0, np.inf, 0.5]])
    is_valid = np.isfinite(reward)
    found = np.asarray(factory()(reward, is_valid))
    expected = np.asarray(factory()(reward[is_valid][None], np.ones((1, 3), bool)))
    np.testing.assert_array_equal(found[is_valid], expected[0])
    assert (found[~is_valid] == 0).all()
    assert (np.asarray(factory()(reward, np.zeros((1, 5), bool))) == 0).all()


@every_advantage
def test_a_single_sample_keeps_its_reward(factory):
    found = factory()(np.array([[0.5, np.nan]]), np.array([[True, False]]))
    np.testing.assert_allclose(found, [[0.5, 0.0]], rtol=2e-6)


def test_values():
    reward = np.array([[1.0, 0.0, 0.0, 0.0]])
    std = np.std(reward, ddof=1)
    np.testing.assert_allclose(
        group_zscore()(reward, VALID), (reward - 0.25) / (std + 1e-6), rtol=1e-6
    )
    np.testing.assert_allclose(
        group_zscore(ddof=0, eps=0.1)(reward, VALID),
        (reward - 0.25) / (np.std(reward) + 0.1),
        rtol=1e-6,
    )
    np.testing.assert_allclose(group_mean()(reward, VALID), reward - 0.25)
    np.testing.assert_allclose(
        leave_one_out()(reward, VALID), [[1.0, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6
    )


def test_binary_groups_of_sixteen():
    """One right of sixteen: +3.75 and -0.25, as in the ASPO runs."""
    reward = np.eye(1, 16)
    found = np.asarray(group_zscore()(reward, np.ones((1, 16), bool)))
    np.testing.assert_allclose(found[0, :2], [3.75, -0.25], rtol=1e-4)
