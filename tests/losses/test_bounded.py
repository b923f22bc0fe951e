"""Rules whose bounds depend on the token: both sides of every edge, and the published figures."""

import dataclasses

import numpy as np
import pytest
from loss_cases import at_ratio, coefficient, loss_and_grad, random_tokens, weight

from aspo_jax.losses import (
    ce_gppo,
    chain,
    cispo,
    dcpo,
    dispo,
    gppo,
    minirl,
    nll_bonus,
    policy_loss,
    reads,
    reinforce,
    response_only,
    token_mean,
)

DISPO = dispo(
    clip_low_positive=0.1, clip_high_positive=0.3, clip_low_negative=0.6, clip_high_negative=2.0
)


@pytest.mark.parametrize(
    ("rule", "ratio", "advantage", "expected"),
    [
        (gppo(), 1.27, 1, 1.27),
        (gppo(), 1.29, 1, 1.28),
        (gppo(), 1e6, 1, 1.28),
        (gppo(), 0.1, 1, 0.1),
        (gppo(), 0.81, -1, 0.81),
        (gppo(), 0.79, -1, 0.8),
        (gppo(), 1e-6, -1, 0.8),
        (gppo(), 9.9, -1, 9.9),
        (gppo(), 10.1, -1, 0.0),
        (ce_gppo(), 1.21, 1, 1.2),
        (ce_gppo(), 0.79, -1, 0.4),
        (ce_gppo(beta_low=0.75), 0.79, -1, 0.6),
        (ce_gppo(beta_high=0.0), 1.21, 1, 0.0),
        (DISPO, 0.5, 1, 0.9),
        (DISPO, 1.4, 1, 1.3),
        (DISPO, 0.5, -1, 0.5),
        (DISPO, 0.3, -1, 0.4),
        (DISPO, 5.0, -1, 3.0),
        (cispo(0.5, 2.0, unified_mask=True), 0.4, 1, 0.5),
        (cispo(0.5, 2.0, unified_mask=True), 0.4, -1, 0.0),
        (cispo(0.5, 2.0, unified_mask=True), 2.1, 1, 0.0),
        (cispo(0.5, 2.0, unified_mask=True), 2.1, -1, 2.0),
    ],
)
def test_weight_on_both_sides_of_every_bound(rule, ratio, advantage, expected):
    found = weight(rule, at_ratio(np.log([ratio]), float(advantage)))
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


@pytest.mark.parametrize(
    ("q", "low", "high"),
    [(0.9, 0.769, 1.187), (0.1, 0.5, 2.0), (0.01, 0.5, 5.0), (0.001, 0.5, 10.0), (1e-30, 0.5, 10)],
)
def test_dcpo_opens_as_the_old_probability_falls(q, low, high):
    for bound, advantage in ((low, -1.0), (high, 1.0)):
        around = bound * np.array([0.997, 1.003])
        found = weight(dcpo(), at_ratio(np.log(around), advantage, old_logp=np.log(q)))[:, 0]
        kept = around < bound if advantage > 0 else around > bound
        np.testing.assert_allclose(found, np.where(kept, around, 0), rtol=1e-5)


def test_dcpo_keeps_an_impossible_token_on_policy():
    tokens = at_ratio(np.zeros(2), [1.0, -1.0], old_logp=-1e3)
    np.testing.assert_array_equal(weight(dcpo(), tokens), 1)


@pytest.mark.parametrize(("advantage", "bound"), [(1.0, 1.28), (-1.0, 0.8)])
def test_gppo_keeps_its_gradient_beyond_the_clamp(advantage, bound):
    tokens = at_ratio(np.array([1e3 * advantage]), advantage)
    np.testing.assert_allclose(weight(gppo(), tokens), [[bound]], rtol=1e-6)


def test_dispo_with_equal_pairs_is_cispo():
    tokens = random_tokens(3, spread=1.0)
    same = dispo(
        clip_low_positive=0.4, clip_high_positive=1.0, clip_low_negative=0.4, clip_high_negative=1.0
    )
    np.testing.assert_array_equal(weight(same, tokens), weight(cispo(0.6, 2.0), tokens))


@pytest.mark.parametrize(
    ("cap_on", "log_ratio", "mismatch", "expected"),
    [
        ("ratio", 0.2, 0.1, np.exp(0.3)),
        ("ratio", 0.1, 2.0, 4.0),
        ("ratio", 0.25, 0.0, 0.0),
        ("mismatch", 0.1, 2.0, 4.0 * np.exp(0.1)),
        ("mismatch", 0.2, 0.1, np.exp(0.3)),
    ],
)
def test_minirl_gates_on_the_old_policy_and_weighs_by_the_sampler(
    cap_on, log_ratio, mismatch, expected
):
    tokens = at_ratio(np.array([log_ratio]), 1.0, old_logp=-3.0)
    tokens = dataclasses.replace(tokens, sampler_logp_BT=tokens.old_logp_BT - mismatch)
    found = weight(minirl(cap=4.0, cap_on=cap_on), tokens)
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


def test_minirl_says_that_it_needs_the_sampler():
    assert reads(minirl(), "sampler_logp_BT")
    tokens = dataclasses.replace(random_tokens(0), sampler_logp_BT=None)
    with pytest.raises(ValueError, match=r"minirl needs Tokens\.sampler_logp_BT"):
        policy_loss(minirl(), tokens, aggregate=token_mean)


def test_the_likelihood_of_right_answers_has_its_own_mean():
    tokens = at_ratio(np.zeros(4), [1.0, -1.0, 0.0, 1.0])
    bias = np.asarray(coefficient(nll_bonus(), tokens).bias_BT)[:, 0]
    np.testing.assert_allclose(bias, [0.2, 0, 0, 0.2], rtol=1e-6)
    _, with_bonus = loss_and_grad(chain(reinforce(), nll_bonus()), tokens, token_mean)
    _, alone = loss_and_grad(reinforce(), tokens, token_mean)
    np.testing.assert_allclose((with_bonus - alone)[:, 0], [-0.05, 0, 0, -0.05], atol=1e-7)


def test_no_right_answer_has_no_likelihood():
    tokens = dataclasses.replace(random_tokens(0), advantage_BT=-abs(random_tokens(0).advantage_BT))
    found = coefficient(nll_bonus(), response_only(tokens))
    assert not np.any(found.bias_BT) and np.isfinite(np.asarray(found.surrogate_BT)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gppo(clip_low=1.1), r"gppo.clip_low = 1.1; expected a number from 0 to 1"),
        (lambda: gppo(dual_cap=1.0), r"gppo.dual_cap = 1.0; expected a ratio above 1"),
        (lambda: ce_gppo(beta_low=-1.0), r"ce_gppo.beta_low = -1.0"),
        (lambda: nll_bonus(coef=-0.1), r"nll_bonus.coef = -0.1"),
        (
            lambda: dispo(
                clip_low_positive=0.2,
                clip_high_positive=0.2,
                clip_low_negative=1.2,
                clip_high_negative=0.2,
            ),
            r"dispo.clip_low_negative = 1.2",
        ),
        (lambda: dcpo(clip_high=0.0), r"dcpo.clip_high = 0.0; expected a number > 0"),
        (lambda: minirl(cap=0.0), r"minirl.cap = 0.0"),
        (lambda: minirl(cap_on="both"), r"minirl.cap_on = 'both'"),  # pyright: ignore
        (lambda: dcpo(ratio_max=0.5), r"dcpo.ratio_max = 0.5; expected a ratio above 1"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
