"""Which estimators have the gradient of the divergence, by every token of a small vocabulary."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import at_ratio, coefficient, random_tokens

from aspo_jax.losses import kl_penalty, policy_loss

SIZE = 7  # tokens of the vocabulary
INFINITY = float("inf")


def distributions(seed):
    """Log-probabilities of policy, old policy and reference; the policy's logits."""
    logits_3V = jnp.asarray(np.random.default_rng(seed).normal(0, 0.7, (3, SIZE)))
    return logits_3V[0], jax.nn.log_softmax(logits_3V)


def expected_gradient(estimator, policy_V, old_V, ref_V, logits_V):
    """E over pi_old of the loss's gradient with respect to the logits: one row per token."""
    blank = at_ratio(np.zeros(SIZE), 0.0, jnp.float64)
    tokens = dataclasses.replace(blank, old_logp_BT=old_V[:, None], ref_logp_BT=ref_V[:, None])

    def loss(logits_V):
        own = dataclasses.replace(tokens, logp_BT=jax.nn.log_softmax(logits_V)[:, None])
        rule = kl_penalty(1.0, estimator, clamp=INFINITY)
        return policy_loss(rule, own, aggregate=lambda *_: jnp.exp(old_V)[:, None])[0]

    return jax.grad(loss)(logits_V)


def true_gradient(logits_V, ref_V):
    def divergence(logits_V):
        logp_V = jax.nn.log_softmax(logits_V)
        return (jnp.exp(logp_V) * (logp_V - ref_V)).sum()

    return jax.grad(divergence)(logits_V)


@pytest.mark.parametrize("seed", range(3))
def test_k3_is_has_the_gradient_of_the_divergence_and_the_others_have_not(seed):
    with jax.enable_x64(True):
        logits_V, (policy_V, old_V, ref_V) = distributions(seed)
        expected = true_gradient(logits_V, ref_V)
        found = {
            name: expected_gradient(name, policy_V, old_V, ref_V, logits_V)
            for name in ("k3_is", "k3", "k2", "k1", "abs")
        }
        np.testing.assert_allclose(found.pop("k3_is"), expected, atol=1e-15)
        for other in found.values():
            assert np.abs(other - expected).max() > 0.03


def test_on_policy_k3_is_has_the_slope_of_k2():
    tokens = random_tokens(0)
    tokens = dataclasses.replace(tokens, old_logp_BT=tokens.logp_BT)
    slopes = [
        coefficient(kl_penalty(1.0, name, clamp=INFINITY), tokens).bias_BT
        for name in ("k3_is", "k2")
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-6)


def test_k3_is_pulls_nothing_beyond_a_clamp():
    """Of d, of r, and of their product; and on the near side of each it does."""
    ratio, gap = zip(*itertools.product([-19.0, 0.0, 1.0], [0.5, 3.0]), strict=True)
    tokens = at_ratio(np.array(ratio), 0.0, old_logp=-25.0)
    tokens = dataclasses.replace(tokens, ref_logp_BT=tokens.logp_BT + np.array([gap]).T)
    found = np.asarray(coefficient(kl_penalty(1.0, "k3_is"), tokens).bias_BT)[:, 0]
    expected = np.exp(ratio) * gap * ((np.exp(ratio) * (np.expm1(gap) - gap)) <= 10)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (expected == 0).sum() == 2
    for far_ratio, far_gap in ((20.5, 0.1), (0.0, 20.5)):
        tokens = at_ratio(np.array([far_ratio]), 0.0, old_logp=-45.0)
        tokens = dataclasses.replace(tokens, ref_logp_BT=tokens.logp_BT + far_gap)
        assert coefficient(kl_penalty(1.0, "k3_is", clamp=INFINITY), tokens).bias_BT == 0
