"""grad L = - sum a c grad log pi equals autodiff of the published surrogate, for every rule.

The surrogates below are written as their papers write them, with min, max, clip and
stop_gradient, and share no line with the library.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law import ratio_of, row_mean
from laws import LAWS
from loss_cases import at_ratio, coefficient, loss_and_grad, random_tokens, token_sum, weight

from aspo_jax.losses import (
    OBJECTIVES,
    archer2,
    aspo,
    cispo,
    dapo,
    entropy_bonus,
    grpo,
    grpo_without_is,
    gspo,
    is_low_entropy,
    kl_penalty,
    low_entropy_kl,
    policy_loss,
    positive_response_mean,
    ppo_clip,
    reinforce,
    select,
    sequence_mean,
    token_mean,
)


def test_every_objective_has_a_law():
    assert not set(OBJECTIVES) - set(LAWS)


@pytest.mark.parametrize("name", LAWS)
def test_gradient_law(name):
    law = LAWS[name]
    with jax.enable_x64(True):
        for seed, spread in enumerate([0.05, 0.5, 3.0, 15.0]):  # up to beyond the clamp
            tokens = random_tokens(seed, spread=spread, per_token=law.per_token, dtype=np.float64)

            def published(logp, tokens=tokens):
                values = law.surrogate(logp, tokens)
                return jnp.where(tokens.is_response_BT, values, 0).sum()

            value, expected = jax.value_and_grad(published)(tokens.logp_BT)
            (_, aux), grad = loss_and_grad(law.rule, tokens, token_sum)
            np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(aux["surrogate"].total, value, rtol=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_weight_and_bias_at_ratio_one(name):
    law, tokens = LAWS[name], random_tokens(5)
    same = ("old_logp_BT", "sampler_logp_BT")
    tokens = dataclasses.replace(tokens, **dict.fromkeys(same, tokens.logp_BT))
    found = coefficient(law.rule, tokens)
    for value_BT, documented in [(found.weight_BT, law.at_one), (found.bias_BT, law.bias_at_one)]:
        if documented is not None:
            expected: Any = documented(tokens) if callable(documented) else documented
            shown = [jnp.where(tokens.is_response_BT, x, 0) for x in (value_BT, expected)]
            np.testing.assert_allclose(shown[0], shown[1], rtol=1e-6, atol=1e-7)


def test_a_positive_token_below_ratio_one_is_pushed_up():
    tokens = at_ratio(np.log([0.5, 0.9, 0.1]), 1.0)
    _, grad = loss_and_grad(aspo(), tokens, token_mean)
    assert (np.asarray(grad) < 0).all()
    plain = jax.grad(lambda logp: (-1 / ratio_of(logp, tokens)).sum())(tokens.logp_BT)
    assert (np.asarray(plain) > 0).all()  # without the stop-gradient the update changes its sign


def test_the_weight_of_aspo_falls_with_r_for_right_tokens_and_rises_for_wrong_ones():
    log_ratio = np.linspace(np.log(0.81), np.log(1.19), 50)
    assert (np.diff(weight(aspo(), at_ratio(log_ratio, 1.0))[:, 0]) < 0).all()
    assert (np.diff(weight(aspo(), at_ratio(log_ratio, -1.0))[:, 0]) > 0).all()


@pytest.mark.parametrize(
    ("rule", "ratio", "advantage", "expected"),
    [
        (aspo(), 1 / 9, 1, 3.0),  # the paper's example: pi_old 0.9 -> pi 0.1
        (grpo(), 1 / 9, 1, 1 / 9),
        (aspo(), 1.1, 1, 1 / 1.1),
        (aspo(), 1.19, 1, 1 / 1.19),
        (aspo(), 1.21, 1, 0.0),
        (aspo(), 0.34, 1, 1 / 0.34),
        (aspo(), 0.33, 1, 3.0),
        (aspo(), 0.79, -1, 0.0),
        (aspo(), 0.81, -1, 0.81),
        (aspo(), 1.3, -1, 1.3),
        (aspo(), 2.9, -1, 2.9),
        (aspo(), 3.1, -1, 3.0),
        (aspo(negative_cap="hard"), 3.1, -1, 0.0),
        (aspo(positive_cap="hard"), 0.33, 1, 0.0),
        (aspo(positive_cap="none"), 0.01, 1, 100.0),
        (ppo_clip(), 1.21, 1, 0.0),
        (ppo_clip(), 1.19, 1, 1.19),
        (ppo_clip(), 0.5, 1, 0.5),
        (ppo_clip(), 5.0, -1, 5.0),
        (ppo_clip(dual_clip="hard"), 2.9, -1, 2.9),
        (ppo_clip(dual_clip="hard"), 3.1, -1, 0.0),
        (ppo_clip(dual_clip="soft"), 3.1, -1, 3.0),
        (dapo(), 1.27, 1, 1.27),
        (dapo(), 1.29, 1, 0.0),
        (dapo(), 9.9, -1, 9.9),
        (dapo(), 10.1, -1, 0.0),
        (cispo(0.5, 2.0), 0.4, 1, 0.5),
        (cispo(0.5, 2.0), 2.1, -1, 2.0),
        (cispo(0.5, 2.0), 1.9, 1, 1.9),
        (gspo(), np.exp(3e-4), 1, np.exp(3e-4)),
        (gspo(), np.exp(5e-4), 1, 0.0),
        (gspo(), np.exp(-2e-4), -1, np.exp(-2e-4)),
        (gspo(), np.exp(-4e-4), -1, 0.0),
        (grpo_without_is(), 1.19, 1, 1.0),
        (grpo_without_is(), 1.21, 1, 0.0),
        (reinforce(), 50.0, 1, 1.0),
    ],
)
def test_weight_on_both_sides_of_every_bound(rule, ratio, advantage, expected):
    found = weight(rule, at_ratio(np.log([ratio]), float(advantage)))
    np.testing.assert_allclose(found, [[expected]], rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("factory", [aspo, ppo_clip, grpo_without_is])
def test_a_token_on_the_bound_keeps_its_gradient(factory, advantage):
    tokens = at_ratio(np.array([0.25 if advantage > 0 else -0.25]), advantage)
    ratio = float(jnp.exp(tokens.logp_BT)[0, 0])
    bound = {"clip_high" if advantage > 0 else "clip_low": abs(ratio - 1)}
    assert weight(factory(**bound), tokens)[0, 0] > 0


def test_a_ratio_equal_to_the_dual_cap_keeps_its_gradient():
    tokens = at_ratio(np.array([1.0]), -1.0)
    cap = float(jnp.exp(tokens.logp_BT)[0, 0])
    assert weight(ppo_clip(dual_cap=cap, dual_clip="hard"), tokens)[0, 0] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAWS)
def test_extreme_log_ratios_are_finite(name, dtype):
    log_ratio = np.repeat([25.0, -25.0, 1e3, -1e3], 2)
    sign, old_logp = np.tile([1.0, -1.0], 4), np.minimum(-log_ratio, 0) - 1
    tokens = at_ratio(log_ratio, sign, getattr(jnp, dtype), old_logp)
    result = loss_and_grad(LAWS[name].rule, tokens, token_mean)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(result))
    assert result[0][0].dtype == jnp.float32


@pytest.mark.parametrize(
    "rule", [ppo_clip(), aspo(negative_cap="none"), gspo(), positive_response_mean()]
)
@pytest.mark.parametrize("log_ratio", [[25.0], [25.0, 25.0, 25.0], [0.0, 25.0], [25.0, 19.0, 0.0]])
def test_a_clamped_ratio_is_no_weight(rule, log_ratio):
    """It is a constant, and e^20 as a weight would be all that its mini-batch learns from."""
    for advantage in (1.0, -1.0):
        tokens = jax.tree.map(lambda x: x.T, at_ratio(np.array(log_ratio), advantage))
        found, is_clamped = weight(rule, tokens)[0], np.array(log_ratio) > 20
        assert (found[is_clamped] == 0).all()
        assert (found < np.exp(19.5)).all()


@pytest.mark.parametrize("gate", ["token", "response"])
def test_one_clamped_token_does_not_speak_for_its_response(gate):
    tokens = jax.tree.map(lambda x: x.T, at_ratio(np.array([0.0, 25.0]), 1.0))
    expected = [[0.5, 0.0]] if gate == "token" else [[0.0, 0.0]]
    np.testing.assert_allclose(weight(positive_response_mean(gate=gate), tokens), expected)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_soft_caps_keep_their_gradient_beyond_the_clamp(advantage):
    tokens = at_ratio(np.array([-1e3 * advantage]), advantage)
    _, grad = loss_and_grad(aspo(), tokens, token_mean)
    np.testing.assert_allclose(grad, [[-3.0 * advantage]])


def test_at_ratio_one_all_rules_have_one_gradient():
    tokens = random_tokens(5)
    tokens = dataclasses.replace(tokens, old_logp_BT=tokens.logp_BT)
    _, expected = loss_and_grad(reinforce(), tokens, sequence_mean)
    rules = [aspo(), archer2(), grpo(), dapo(), cispo(), gspo(), positive_response_mean()]
    for rule in rules:
        np.testing.assert_array_equal(loss_and_grad(rule, tokens, sequence_mean)[1], expected)


def test_tokens_without_a_signal_have_no_gradient_and_no_share_in_clipping():
    tokens = at_ratio(np.array([5.0, -5.0, 0.0]), 0.0)
    (loss, aux), grad = loss_and_grad(aspo(), tokens, token_mean)
    assert loss == 0 and not np.any(grad)
    assert aux["clip_share"].count == 0


def test_a_differentiated_response_mean_would_change_nothing():
    """The trap that positive_response_mean documents: r itself comes back."""
    tokens = random_tokens(3)

    def sum_of_means(logp):
        r = ratio_of(logp, tokens)
        return jnp.where(tokens.is_response_BT, row_mean(r, tokens), 0).sum()

    grad = jax.grad(sum_of_means)(tokens.logp_BT)
    r = jnp.where(tokens.is_response_BT, ratio_of(tokens.logp_BT, tokens), 0)
    np.testing.assert_allclose(grad, r, rtol=1e-5)


def test_clamped_kl_pulls_nothing_back():
    tokens = at_ratio(np.array([-2.6, -2.62, 10.9, 11.1]), 0.0)
    bias = np.asarray(kl_penalty(1.0).coefficient(tokens, (), None).bias_BT)[:, 0]
    assert bias[0] > 0 and bias[2] < 0  # towards the reference, from both sides
    assert bias[1] == 0 and bias[3] == 0
    unclamped = kl_penalty(1.0, clamp=float("inf")).coefficient(tokens, (), None).bias_BT
    assert (np.asarray(unclamped) != 0).all()


def test_entropy_bonus_is_the_aggregate_of_the_entropy():
    tokens = random_tokens(1)
    spoilt_BT = jnp.where(tokens.is_response_BT, 1.0, jnp.nan)

    def loss(entropy_BT):
        own = dataclasses.replace(tokens, entropy_BT=entropy_BT)
        return entropy_bonus(own, scale=0.5, aggregate=token_mean)[0]

    grad = jax.grad(loss)(spoilt_BT)
    np.testing.assert_allclose(
        grad, np.where(tokens.is_response_BT, -0.5 / tokens.is_response_BT.sum(), 0), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("objective", "field", "rule"),
    [
        (kl_penalty(), "ref_logp_BT", "kl_penalty"),
        (low_entropy_kl(), "entropy_BT", "is_low_entropy"),
        (archer2(), "entropy_BT", "is_low_entropy"),
        (select(is_low_entropy(), aspo(), grpo()), "entropy_BT", "is_low_entropy"),
    ],
)
def test_a_missing_field_is_named(objective, field, rule):
    tokens = dataclasses.replace(random_tokens(0), **{field: None})
    with pytest.raises(ValueError, match=rf"{rule} needs Tokens\.{field}"):
        policy_loss(objective, tokens, aggregate=token_mean)


def test_a_missing_entropy_is_named_by_the_bonus():
    tokens = dataclasses.replace(random_tokens(0), entropy_BT=None)
    with pytest.raises(ValueError, match="entropy_bonus needs Tokens.entropy_BT"):
        entropy_bonus(tokens, scale=1.0, aggregate=token_mean)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: OBJECTIVES["aspo"](positive_cap="stiff"),
            r"aspo.positive_cap = 'stiff'",
        ),
        (lambda: aspo(clip_low=-0.1), r"aspo.clip_low = -0.1; expected a number from 0 to 1"),
        (lambda: OBJECTIVES["kl_penalty"](estimator="k4"), r"kl_penalty.estimator = 'k4'"),
        (lambda: cispo(2.0, 1.0), r"cispo.ratio_min = 2.0, cispo.ratio_max = 1.0"),
        (lambda: is_low_entropy(80), r"is_low_entropy.quantile = 80"),
        (
            lambda: OBJECTIVES["positive_response_mean"](gate="row"),
            "gate = 'row'; expected one of",
        ),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
