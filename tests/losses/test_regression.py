"""REC and the rules that are settings of it: every gate on both sides of its bounds."""

import dataclasses

import jax
import numpy as np
import pytest
from loss_cases import at_ratio, coefficient, loss_and_grad, random_tokens, weight

from aspo_jax.losses import (
    asymre,
    grpo_without_is,
    kimi_opmd,
    opmd,
    policy_loss,
    ppo_clip,
    rec,
    reinforce,
    token_mean,
)


@pytest.mark.parametrize(
    ("clip_mode", "advantage", "kept"),
    [  # of the ratios 0.3, 0.5, 0.79, 0.81, 1.19, 1.21, 2.9, 3.1
        ("none", 1, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("two_side", 1, [0, 0, 0, 1, 1, 0, 0, 0]),
        ("two_side", -1, [0, 0, 0, 1, 1, 0, 0, 0]),
        ("one_side", 1, [1, 1, 1, 1, 1, 0, 0, 0]),
        ("one_side", -1, [0, 0, 0, 1, 1, 1, 1, 1]),
        ("sequence_one_side", 1, [1, 1, 1, 1, 1, 0, 0, 0]),
        ("ring", 1, [1, 0, 0, 1, 1, 0, 0, 0]),
        ("ring", -1, [0, 0, 0, 1, 1, 0, 0, 1]),
    ],
)
def test_what_each_gate_keeps(clip_mode, advantage, kept):
    ratio = np.array([0.3, 0.5, 0.79, 0.81, 1.19, 1.21, 2.9, 3.1])
    found = weight(rec(clip_mode=clip_mode), at_ratio(np.log(ratio), float(advantage)))
    np.testing.assert_array_equal(found[:, 0], kept)


def test_the_gate_of_the_sequence_sees_its_geometric_mean():
    rule = rec(clip_mode="sequence_one_side", weight="sequence_ratio")
    for log_ratio, expected in [([0.5, -0.4], np.exp(0.05)), ([0.5, 0.1], 0.0)]:
        tokens = jax.tree.map(lambda x: x.T, at_ratio(np.array(log_ratio), 1.0))
        np.testing.assert_allclose(weight(rule, tokens), [[expected, expected]], rtol=1e-6)


def test_weights_by_name():
    tokens = at_ratio(np.log([0.5, 1.0, 4.0]), [1.0, -1.0, 2.0])
    for name, expected in [
        ("none", np.ones(3)),
        ("ratio", np.array([0.5, 1.0, 4.0])),
        ("sequence_ratio", np.array([0.5, 1.0, 4.0])),
        ("advantage", np.exp(np.array([1.0, -1.0, 2.0]) / 0.5)),
    ]:
        found = weight(rec(weight=name, temperature=0.5), tokens)[:, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_clamped_ratio_is_no_weight():
    tokens = at_ratio(np.array([25.0, -25.0]), -1.0)
    for name in ("ratio", "sequence_ratio"):
        assert not np.any(weight(rec(weight=name), tokens))


def test_published_names_are_settings():
    tokens = random_tokens(4, spread=0.6)
    for ours, theirs in [
        (rec(), reinforce()),
        (rec(clip_mode="one_side", weight="ratio"), ppo_clip()),
        (rec(clip_mode="one_side"), grpo_without_is()),
    ]:
        np.testing.assert_array_equal(
            loss_and_grad(ours, tokens, token_mean)[1], loss_and_grad(theirs, tokens, token_mean)[1]
        )


def test_the_regulariser_acts_on_dropped_tokens_too():
    tokens = at_ratio(np.log([3.0]), 1.0)
    found = coefficient(rec(clip_mode="two_side", regularizer="k2", coef=0.5), tokens)
    assert found.weight_BT == 0
    np.testing.assert_allclose(found.bias_BT, -np.log(3.0), rtol=1e-6)


def test_kimis_pull_has_no_end_and_none_on_policy():
    tokens = at_ratio(np.array([0.0, 2.0, -100.0]), 1.0)
    found = coefficient(kimi_opmd(), tokens)
    np.testing.assert_allclose(found.bias_BT[:, 0], [0.0, -0.2, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(found.weight_BT, 1)


def test_asymre_is_reinforce_with_a_lower_baseline():
    tokens = random_tokens(1)
    _, shifted = loss_and_grad(asymre(shift=-0.3), tokens, token_mean)
    raised = dataclasses.replace(tokens, advantage_BT=tokens.advantage_BT + 0.3)
    np.testing.assert_allclose(
        shifted, loss_and_grad(reinforce(), raised, token_mean)[1], atol=1e-7
    )


def test_opmd_does_not_look_at_the_old_policy():
    near, far = (at_ratio(np.array([x]), 1.0) for x in (0.0, 3.0))
    assert weight(opmd(tau=3.0), near) == weight(opmd(tau=3.0), far) == 0.25
    policy_loss(opmd(), near, aggregate=token_mean)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rec(clip_mode="both"), r"rec.clip_mode = 'both'; expected one of"),  # pyright: ignore
        (lambda: rec(weight="is"), r"rec.weight = 'is'"),  # pyright: ignore
        (lambda: rec(regularizer="kl"), r"rec.regularizer = 'kl'"),  # pyright: ignore
        (lambda: rec(coef=-1.0), r"rec.coef = -1.0"),
        (lambda: rec(ring=(1.5, 2.0)), r"rec.ring = \(1.5, 2.0\); expected two widths"),
        (lambda: rec(ring=(0.5,)), r"rec.ring = \(0.5,\)"),  # pyright: ignore
        (lambda: rec(temperature=0.0), r"rec.temperature = 0.0"),
        (lambda: rec(clip_low=2.0), r"rec.clip_low = 2.0"),
        (lambda: opmd(tau=-1.0), r"opmd.tau = -1.0"),
        (lambda: kimi_opmd(tau=-1.0), r"kimi_opmd.tau = -1.0"),
        (lambda: asymre(shift=0.1), r"asymre.shift = 0.1; expected a number <= 0"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
