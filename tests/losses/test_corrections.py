"""Corrections between sampler and old policy: both sides of every bound, extremes, NaN."""

import dataclasses
from math import exp

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import at_ratio, lay_out, loss_and_grad, one_per_row, sequences, token_sum, weight

from aspo_jax.losses import (
    OBJECTIVES,
    chain,
    geometric_rejection,
    icepop,
    k3_rejection,
    kl_penalty,
    mis,
    outlier_veto,
    ppo_clip,
    reads,
    reinforce,
    seq_mask_tis,
    sequence_mask,
    tis,
)

ALL = [
    *(tis(), tis(level="sequence"), tis(level="mean"), tis(normalize=True)),
    *(mis(), mis(level="every", kind="k3"), mis(level="sequence", kind="k2", weight="none")),
    *(icepop(), sequence_mask(), seq_mask_tis(), geometric_rejection(), k3_rejection()),
    outlier_veto(),
]


def response(*log_rho, dtype=jnp.float32):
    """One response whose tokens have these log-ratios of old policy to sampler."""
    one = jax.tree.map(lambda x: x.T, at_ratio(np.zeros(len(log_rho)), 1.0, dtype))
    return dataclasses.replace(one, sampler_logp_BT=-jnp.asarray([log_rho], dtype))


@pytest.mark.parametrize(
    ("rule", "log_rho", "expected"),
    [
        (tis(), [np.log(1.9), np.log(2.1), -9.0], [1.9, 2.0, exp(-9)]),
        (tis(ratio_min=0.5), [np.log(0.4), np.log(0.6)], [0.5, 0.6]),
        (tis(level="sequence"), [0.5, 0.1], [exp(0.6)] * 2),
        (tis(level="sequence"), [0.5, 0.3], [2.0, 2.0]),
        (tis(level="mean"), [0.5, 0.3], [exp(0.4)] * 2),
        (tis(level="mean"), [2.5, -0.9], [2.0, 2.0]),
        (tis(normalize=True), [0.0, np.log(3.0)], [1 / 1.5, 2 / 1.5]),
        (mis(), [np.log(1.99), np.log(2.01)], [1.99, 0.0]),
        (mis(level="sequence"), [0.4, 0.2], [exp(0.4), exp(0.2)]),
        (mis(level="sequence"), [0.4, 0.4], [0.0, 0.0]),
        (mis(kind="k2", high=0.02, weight="none"), [0.19, -0.19, 0.21, -0.21], [1, 1, 0, 0]),
        (icepop(), np.log([0.49, 0.51, 4.9, 5.1]), [0.0, 0.51, 4.9, 0.0]),
        (sequence_mask(), [0.5, 0.5], [exp(1.0)] * 2),
        (sequence_mask(), [0.5, 0.7], [0.0, 0.0]),
        (seq_mask_tis(), [1.0, -0.998], [exp(1.0), exp(-0.998)]),
        (seq_mask_tis(), [1.0, -0.994], [0.0, 0.0]),
        (seq_mask_tis(), [1.0, -1.004], [0.0, 0.0]),
        (geometric_rejection(), [1.0, -0.9985], [1.0, 1.0]),
        (geometric_rejection(), [1.0, -0.9975], [0.0, 0.0]),
        (k3_rejection(), [0.19, 0.0], [1.0, 1.0]),
        (k3_rejection(), [0.21, 0.0], [0.0, 0.0]),
        (outlier_veto(), [4.6, -9.2, 0.0], [1.0, 1.0, 1.0]),
        (outlier_veto(), [4.7, 0.0, 0.0], [0.0, 0.0, 0.0]),
        (outlier_veto(), [0.0, -9.3, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_factor_on_both_sides_of_every_bound(rule, log_rho, expected):
    np.testing.assert_allclose(weight(rule, response(*log_rho)), [expected], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ALL)
def test_a_sampler_far_from_the_old_policy_is_finite(rule, dtype):
    tokens = response(25.0, -25.0, 1e3, -1e3, dtype=getattr(jnp, dtype))
    result = loss_and_grad(chain(ppo_clip(), rule), tokens, token_sum)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(result))


@pytest.mark.parametrize("rule", ALL)
def test_a_sampler_that_reports_nan_is_never_trained_on_as_if_it_had_not(rule):
    """The weight is 0, or NaN, which makes the update one that is not applied."""
    found = weight(rule, response(0.0, float("nan"), 0.0))[0]
    assert np.isnan(found[1]) or found[1] == 0


def test_a_correction_needs_the_samplers_log_probabilities():
    assert all(reads(rule, "sampler_logp_BT") for rule in ALL)
    assert not reads(ppo_clip(), "sampler_logp_BT")


def test_the_share_is_of_response_tokens_on_which_the_bounds_acted():
    tokens = response(0.0, np.log(3.0), 0.0, 0.0)
    for rule, name, share in [
        (tis(), "tis_share", 0.25),
        (icepop(ratio_max=2.0), "icepop_share", 0.25),
        (outlier_veto(ratio_max=2.0), "outlier_veto_share", 1.0),
    ]:
        (_, aux), _ = loss_and_grad(chain(reinforce(), rule), tokens, token_sum)
        assert aux[name].total / aux[name].count == share


def test_decoupled_ppo_is_ppo_behind_a_mask_of_the_old_policys_ratio_to_the_sampler():
    """Clipped against the old policy, weighted by the current one's ratio to the sampler."""
    tokens = one_per_row(sequences(0, spread=0.4), garbage=False)
    found = weight(chain(ppo_clip(), mis(high=1.5)), tokens)
    logp, old, sampler = (
        np.asarray(getattr(tokens, name), np.float64)
        for name in ("logp_BT", "old_logp_BT", "sampler_logp_BT")
    )
    log_ratio, log_rho = logp - old, old - sampler
    is_positive = np.asarray(tokens.advantage_BT) > 0
    is_open = np.where(is_positive, log_ratio <= np.log(1.2), log_ratio >= np.log(0.8))
    expected = np.exp(logp - sampler) * is_open * (log_rho <= np.log(1.5))
    mask = np.asarray(tokens.is_response_BT)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-5)
    assert (log_rho[mask] > np.log(1.5)).sum() > 0


def test_a_correction_leaves_a_penalty_alone():
    tokens = response(3.0)
    tokens = dataclasses.replace(tokens, ref_logp_BT=tokens.logp_BT + 1)
    tokens = dataclasses.replace(tokens, advantage_BT=jnp.zeros((1, 1)))
    grads = [
        loss_and_grad(rule, tokens, token_sum)[1]
        for rule in (kl_penalty(0.1), chain(kl_penalty(0.1), icepop()))
    ]
    np.testing.assert_array_equal(*grads)
    assert grads[0] != 0


def test_a_sequences_statistic_ends_with_its_sequence():
    """Three sequences in one row: each has its own veto and product."""
    seqs = sequences(0, count=3)
    for k, seq in enumerate(seqs):
        seq["sampler_logp_BT"] = seq["old_logp_BT"] - (0.0, 0.2, -0.2)[k]
    tokens = lay_out(seqs, [[0, 1, 2]], 48)
    found = weight(outlier_veto(ratio_min=0.9, ratio_max=1.3), tokens)[0]
    number = np.asarray(tokens.sequence_id_BT)[0]
    assert [set(found[number == k]) for k in (1, 2, 3)] == [{1.0}, {1.0}, {0.0}]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: OBJECTIVES["tis"](level="turn"),
            r"tis.level = 'turn'; expected one of",
        ),
        (lambda: tis(ratio_min=3.0), r"tis.ratio_min = 3.0, tis.ratio_max = 2.0; expected 0 <= "),
        (lambda: OBJECTIVES["mis"](kind="k1"), r"mis.kind = 'k1'"),
        (lambda: OBJECTIVES["mis"](weight="rho"), r"mis.weight = 'rho'"),
        (lambda: OBJECTIVES["mis"](level="all"), r"mis.level = 'all'"),
        (lambda: mis(low=float("nan")), r"mis.low = nan"),
        (lambda: icepop(ratio_min=-1.0), r"icepop.ratio_min = -1.0"),
        (lambda: sequence_mask(ratio_max=0.0), r"sequence_mask.ratio_max = 0.0"),
        (lambda: k3_rejection(k3_max=-1.0), r"k3_rejection.k3_max = -1.0"),
        (lambda: geometric_rejection(ratio_min=2.0), r"geometric_rejection.ratio_min = 2.0"),
        (lambda: seq_mask_tis(ratio_max=0.5), r"seq_mask_tis.ratio_max = 0.5"),
        (lambda: outlier_veto(ratio_max=1e-5), r"outlier_veto.ratio_max = 1e-05"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
