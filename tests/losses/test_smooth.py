"""Rules with smooth weights: their published figures, edges, and R2VPO's dual variable."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import at_ratio, coefficient, one_per_row, random_tokens, sequences, weight

from aspo_jax.losses import delightful, mhpo, policy_loss, r2vpo, response_only, sapo, token_mean


@pytest.mark.parametrize(
    ("rule", "ratio", "advantage", "expected"),
    [
        (sapo(), 2.06, 1.0, 1.575),
        (sapo(), 1.99, -1.0, 1.536),
        (sapo(), 5.0, 1.0, 0.353),
        (sapo(), 5.0, -1.0, 0.291),
        (sapo(), 0.5, 1.0, 0.470),
        (mhpo(), 1.0, 1.0, 0.2651),
        (mhpo(), 1.0, -1.0, 0.2651),
        (mhpo(), 0.5, 1.0, 0.054),
        (mhpo(), 1.78, 1.0, 0.396),
        (mhpo(), 2.0, -1.0, 0.391),
        (mhpo(), 10.0, 1.0, 0.082),
        (mhpo(normalize_at_one=True), 2.0, -1.0, 1.474),
    ],
)
def test_published_weights(rule, ratio, advantage, expected):
    found = weight(rule, at_ratio(np.log([ratio]), advantage))
    np.testing.assert_allclose(found, [[expected]], atol=6e-4)


@pytest.mark.parametrize("rule", [sapo(), mhpo(), r2vpo()])
def test_a_clamped_ratio_has_no_weight_and_no_pull(rule):
    tokens = at_ratio(np.array([25.0, -25.0]), 1.0, old_logp=-30.0)
    found = coefficient(rule, tokens)
    assert not np.any(found.weight_BT) and not np.any(found.bias_BT)


def test_r2vpo_turns_a_right_token_back_where_its_docstring_says():
    found = coefficient(r2vpo(), at_ratio(np.log([13.4, 13.6]), 1.0))
    below, beyond = np.asarray(found.weight_BT * 1.0 + found.bias_BT)[:, 0]
    assert below > 0 > beyond


def test_a_fixed_lam_asks_for_no_pass_over_the_data():
    rule = r2vpo(lam=0.3)
    assert rule.prepare is None and rule.init() == ()
    assert "dual_lam" not in policy_loss(rule, random_tokens(0), aggregate=token_mean)[1]


def test_lam_follows_the_variance_of_the_whole_mini_batch():
    rule = r2vpo(lam=0.5, delta=0.25, dual_lr=0.1)
    assert rule.prepare
    tokens = at_ratio(np.log([1.0, 2.0, 3.0, 1.0]), 1.0)
    tokens = dataclasses.replace(
        tokens, is_response_BT=jnp.array([[True], [True], [True], [False]])
    )
    state = rule.init()
    variance = rule.prepare(tokens, state)
    np.testing.assert_allclose(variance, (0 + 1 + 4) / 3, rtol=1e-6)
    state = rule.update(state, variance)
    np.testing.assert_allclose(state, 0.5 + 0.1 * (5 / 3 - 0.25), rtol=1e-6)
    _, aux = policy_loss(rule, tokens, aggregate=token_mean, state=state)
    for name, expected in [("dual_lam", state), ("ratio_variance", 5 / 3)]:
        metric: Any = aux[name]
        np.testing.assert_allclose(metric.total / metric.count, expected, rtol=1e-6)
    bias = rule.coefficient(response_only(tokens), state, variance).bias_BT
    np.testing.assert_allclose(bias[:3, 0], -2 * state * np.array([0, 2, 6]), rtol=1e-5)


def test_lam_falls_on_policy_and_stops_at_zero():
    rule = r2vpo(lam=0.02, delta=0.5, dual_lr=0.03)
    assert rule.prepare
    tokens = one_per_row(sequences(0))
    tokens = dataclasses.replace(tokens, old_logp_BT=tokens.logp_BT)
    state = rule.init()
    for expected in (0.005, 0.0, 0.0):
        state = jax.jit(rule.update)(state, rule.prepare(response_only(tokens), state))
        np.testing.assert_allclose(state, expected, atol=1e-8)
    assert state.dtype == rule.init().dtype and state.shape == ()


def test_a_mini_batch_without_tokens_has_no_variance():
    rule = r2vpo(delta=0.5, dual_lr=0.1)
    assert rule.prepare
    tokens = one_per_row(sequences(0))
    tokens = dataclasses.replace(tokens, is_response_BT=jnp.zeros_like(tokens.is_response_BT))
    assert rule.prepare(response_only(tokens), rule.init()) == 0


def test_delight_is_advantage_times_surprise():
    tokens = at_ratio(np.zeros(5), [0.0, 1.0, 2.0, -2.0, 1.0], old_logp=[-3.0, 0.0, -3.0, -3.0, -1])
    sigmoid = 1 / (1 + np.exp(-np.array([0.0, 0.0, 6.0, -6.0, 1.0])))
    np.testing.assert_allclose(weight(delightful(), tokens)[:, 0], sigmoid, rtol=1e-6)
    np.testing.assert_allclose(sigmoid[4], 0.73, atol=2e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sapo(tau_negative=0.0), r"sapo.tau_negative = 0.0; expected a number > 0"),
        (lambda: mhpo(lam_down=-1.0), r"mhpo.lam_down = -1.0; expected a number > 0"),
        (lambda: r2vpo(lam=-0.1), r"r2vpo.lam = -0.1; expected a number >= 0"),
        (lambda: r2vpo(delta=-0.1), r"r2vpo.delta = -0.1"),
        (lambda: r2vpo(dual_lr=0.1), r"r2vpo.delta = None; expected a number >= 0, for dual_lr"),
        (lambda: delightful(eta=0.0), r"delightful.eta = 0.0"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
