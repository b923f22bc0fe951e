"""Rules that hold a response against its group: hand-made groups, medians, first mini-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law import row_sum
from loss_cases import (
    at_ratio,
    coefficient,
    lay_out,
    loss_and_grad,
    random_tokens,
    sequences,
    token_sum,
    weight,
)

from aspo_jax.losses import (
    copg,
    gbpo,
    group_zscore,
    leave_one_out,
    policy_loss,
    reads,
    reg_grpo,
    token_mean,
)
from aspo_jax.losses.segment import of_group, sums_per_group

RULES = {"copg": copg(beta=0.1), "reg_grpo": reg_grpo(sigma_floor=0.1), "gbpo": gbpo()}


def in_groups(log_ratio, advantage, groups):
    """One-token responses of several prompts."""
    tokens = at_ratio(np.asarray(log_ratio), np.asarray(advantage))
    return dataclasses.replace(tokens, group_id_BT=jnp.asarray(groups, jnp.int32)[:, None])


def test_sums_per_group_count_response_tokens_wherever_they_lie():
    seqs = sequences(0, count=7)
    expected = np.zeros(3)
    for s in seqs:
        expected[s["group_id_BT"][0]] += s["entropy_BT"][s["is_response_BT"]].sum()
    for bins in ([[i] for i in range(7)], [[6, 0, 3], [1, 4], [2, 5]]):
        tokens = lay_out(seqs, bins, 48, garbage=True)
        assert tokens.group_id_BT is not None and tokens.entropy_BT is not None
        sums_K = sums_per_group(tokens.entropy_BT, tokens.group_id_BT, tokens)
        np.testing.assert_allclose(sums_K[:3], expected, rtol=1e-5)
        assert not np.any(sums_K[3:])


def test_a_prompt_beyond_the_table_is_not_a_number():
    found = of_group(jnp.array([1.0, 2.0]), jnp.array([[0, 1, 2]]))
    np.testing.assert_array_equal(found, [[1.0, 2.0, np.nan]])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("field", ["group_id_BT", "position_BT"])
def test_missing_fields_are_named(rule, field):
    tokens = dataclasses.replace(random_tokens(0), **{field: None})
    with pytest.raises(ValueError, match=rf"{rule} needs Tokens\.{field}"):
        policy_loss(RULES[rule], tokens, aggregate=token_mean)
    assert reads(RULES[rule], field)


def test_copg_with_leave_one_out_is_the_contrast_of_all_pairs():
    """The published loss of pairs, R - beta/2 rho and rho both differentiated."""
    beta, reward_PG = 0.4, np.random.default_rng(0).normal(size=(2, 3))
    tokens = random_tokens(2)  # two groups of three responses
    advantage_PG = leave_one_out()(reward_PG, np.ones_like(reward_PG))
    tokens = dataclasses.replace(
        tokens,
        advantage_BT=jnp.broadcast_to(advantage_PG.reshape(6, 1), tokens.logp_BT.shape),
    )

    def pairs(logp):
        rho_PG = row_sum(logp - tokens.ref_logp_BT, tokens).reshape(2, 3)
        regularised_PG = jnp.asarray(reward_PG) - beta / 2 * rho_PG
        loss = 0.0
        for i in range(3):
            for j in range(i):
                contrast_P = regularised_PG[:, i] - regularised_PG[:, j]
                loss -= (contrast_P * (rho_PG[:, i] - rho_PG[:, j])).sum() / 2
        return loss

    _, found = loss_and_grad(copg(beta=beta), tokens, token_sum)
    np.testing.assert_allclose(found, jax.grad(pairs)(tokens.logp_BT), atol=1e-5)


def test_a_response_alone_in_its_group_has_no_contrast():
    tokens = in_groups([0.5, 0.7, -0.2], [1.0, 1.0, -1.0], [4, 1, 1])
    bias = np.asarray(coefficient(copg(beta=2.0), tokens).bias_BT)[:, 0]
    np.testing.assert_allclose(bias, [0.0, -1.8, 1.8], rtol=1e-5)


def test_reg_grpo_on_policy_stands_on_its_floor():
    tokens = in_groups([0.0, 0.0, 0.0], [1.0, -0.5, -0.5], [0, 0, 0])
    found = coefficient(reg_grpo(sigma_floor=0.5), tokens)
    np.testing.assert_array_equal(found.weight_BT, 4.0)
    np.testing.assert_allclose(found.bias_BT, 0, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_reg_grpo_says_nothing_to_a_group_of_two_above_the_floor(advantage):
    tokens = in_groups([0.3, -0.1, 0.0], [advantage, -advantage, 9.0], [0, 0, 1])
    found = coefficient(reg_grpo(sigma_floor=0.1), tokens)
    c_BT = found.weight_BT * tokens.advantage_BT + found.bias_BT
    np.testing.assert_allclose(c_BT, 0, atol=1e-5)
    found = coefficient(reg_grpo(sigma_floor=0.4), tokens)  # z = +-1/2
    c_BT = found.weight_BT * tokens.advantage_BT + found.bias_BT
    side = np.array([1.0, -1.0, 0.0])
    np.testing.assert_allclose(c_BT[:, 0], 5 * side * (advantage - 0.5), atol=1e-5)


@pytest.mark.parametrize(
    ("right", "towards"),  # of five or four answers: where each one's ratio is drawn to
    [
        ([1, 1, 1, 0, 0], [1.0, 1.0, 1.0, 0.8, 0.8]),
        ([1, 0, 0, 0, 0], [1.2, 1.0, 1.0, 1.0, 1.0]),
        ([1, 1, 0, 0], [1.2, 1.2, 0.8, 0.8]),
    ],
)
def test_a_cold_target_is_a_bound_for_the_minority_and_one_for_the_majority(right, towards):
    n = len(right)
    advantage = np.asarray(group_zscore()(np.array([right], float), np.ones((1, n))))[0]
    rule = gbpo(temperature=1e-4)
    for step, off in ((0.0, 0), (1e-3, 1), (-1e-3, -1)):
        tokens = in_groups(np.log(np.array(towards)) + step, advantage, [2] * n)
        pull = weight(rule, tokens)[:, 0] * np.sign(advantage)
        if off:
            np.testing.assert_array_equal(np.sign(pull), -off)
        else:  # on the target: exactly nothing where it is 1, a rounding error's sign elsewhere
            assert not np.any(pull[np.array(towards) == 1.0])


@pytest.mark.parametrize("width", [0.1, 0.2, 0.3, 1 / 3])
def test_on_the_first_mini_batch_the_majority_is_not_pushed(width):
    """sign(0) is 0: the derivative of |x| at 0 as autodiff takes it would push it down."""
    right = np.array([[1, 1, 1, 1, 0, 0, 1]], float)
    advantage = np.asarray(group_zscore()(right, np.ones_like(right)))[0]
    tokens = in_groups(np.zeros(7), advantage, [0] * 7)
    found = weight(gbpo(clip_low=width, clip_high=width, temperature=1e-4), tokens)[:, 0]
    np.testing.assert_array_equal(found, np.where(right[0], 0, 1))


def test_targets_are_of_their_own_group():
    tokens = in_groups(np.zeros(6), [1.0, 0.0, -1.0, 2.0, 1.0, -3.0], [3, 3, 3, 0, 0, 0])
    rule = gbpo()
    assert rule.prepare
    median_K = rule.prepare(tokens, ())
    np.testing.assert_array_equal(np.asarray(median_K)[[0, 3]], [1.0, 0.0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_median_is_numpys(size):
    seqs = sequences(5, count=3 * size)
    for i, s in enumerate(seqs):
        s["group_id_BT"][:] = i % 3
    tokens = lay_out(seqs, [[0, 2], *([i] for i in range(3, 3 * size)), [1]], 48)
    rule = gbpo()
    assert rule.prepare
    expected = [np.median([s["advantage_BT"][0] for s in seqs[g::3]]) for g in range(3)]
    found = rule.prepare(tokens, ())
    np.testing.assert_allclose(found[:3], expected, atol=2e-7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: copg(beta=-0.1), r"copg.beta = -0.1; expected a number >= 0"),
        (lambda: reg_grpo(sigma_floor=0.0), r"reg_grpo.sigma_floor = 0.0; expected a number > 0"),
        (lambda: gbpo(temperature=0.0), r"gbpo.temperature = 0.0"),
        (lambda: gbpo(clip_low=1.5), r"gbpo.clip_low = 1.5"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
