"""Scans along responses, and the rules that read the whole response, the prefix or what follows."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law import log_ratio_of, row_mean
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
    OBJECTIVES,
    apc,
    ctpo,
    dhpo,
    fiberpo,
    fipo,
    gmpo,
    gspo,
    minpro,
    policy_loss,
    ppo_clip,
    sequence_sum,
    token_mean,
    vespo,
)
from aspo_jax.losses.segment import earlier_min, running_sum

PACKED = [[0, 1, 2], [3, 4], [5, 6]]
ALONE = [[i] for i in range(7)]


def row(ratios, advantage: Any = 1.0):
    """One response with these ratios."""
    tokens = jax.tree.map(lambda x: x.T, at_ratio(np.log(np.asarray(ratios, float)), advantage))
    return dataclasses.replace(tokens, position_BT=jnp.arange(len(ratios))[None])


def row_weight(rule, ratios, advantage: Any = 1.0):
    return weight(rule, row(ratios, advantage))[0]


# --- scans ------------------------------------------------------------------------------------


def numpy_running_sum(x, decay, reverse):
    x = x[::-1] if reverse else x
    out = [sum(x[k] * decay ** (t - k) for k in range(t + 1)) for t in range(len(x))]
    return np.array(out[::-1] if reverse else out)


def numpy_earlier_min(x):
    return np.array([min(x[:t], default=np.inf) for t in range(len(x))])


SCANS = {
    "sum": (lambda x, t: running_sum(x, t), lambda x: np.cumsum(x)),
    "reverse": (lambda x, t: running_sum(x, t, reverse=True), lambda x: np.cumsum(x[::-1])[::-1]),
    "decay": (
        lambda x, t: running_sum(x, t, decay=0.7),
        lambda x: numpy_running_sum(x, 0.7, reverse=False),
    ),
    "reverse_decay": (
        lambda x, t: running_sum(x, t, decay=0.7, reverse=True),
        lambda x: numpy_running_sum(x, 0.7, reverse=True),
    ),
    "earlier_min": (earlier_min, numpy_earlier_min),
}


@pytest.mark.parametrize(
    ("bins", "length", "with_ids", "stacked"),
    [
        (ALONE, 16, False, False),
        (ALONE, 16, True, False),
        (PACKED, 48, True, False),
        (PACKED, 48, True, True),
    ],
)
@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_is_numpys_over_the_response_tokens_of_each_sequence(
    scan, bins, length, with_ids, stacked
):
    seqs = sequences(8, count=7)
    found_by, expected_by = SCANS[scan]
    tokens = lay_out(seqs, bins, length, with_ids=with_ids)
    if stacked:  # [M, B, T]
        tokens = jax.tree.map(lambda x: jnp.stack([x, x]), tokens)
    found = np.asarray(found_by(tokens.logp_BT, tokens)).reshape(-1, len(bins), length)
    for layer in found:
        for b, members in enumerate(bins):
            at = 0
            for i in members:
                seq, n = seqs[i], len(seqs[i]["logp_BT"])
                mask = seq["is_response_BT"]
                expected = expected_by(seq["logp_BT"][mask])
                np.testing.assert_allclose(layer[b, at : at + n][mask], expected, rtol=1e-5)
                at += n


# --- GSPO, LUSPO, GMPO, DHPO ------------------------------------------------------------------


def test_coupled_gspo_gives_every_token_the_mean_of_the_gated_advantages():
    tokens = row([1.1, 1.0, 1.0], np.array([2.0, -1.0, 0.5]))
    s = 1.1 ** (1 / 3)
    for high, mean in [(0.5, 0.5), (0.01, -1 / 3)]:  # the positive tokens' gate open, then closed
        found = coefficient(gspo(0.5, high, coupled=True), tokens)
        c = found.weight_BT * tokens.advantage_BT + found.bias_BT
        np.testing.assert_allclose(c, [[s * mean] * 3], rtol=1e-5)


def test_coupled_gspo_with_one_advantage_per_sequence_is_gspo():
    tokens = random_tokens(0, spread=0.02)
    plain, coupled = (coefficient(gspo(3e-2, 4e-2, coupled=c), tokens) for c in (False, True))
    np.testing.assert_array_equal(plain.weight_BT, coupled.weight_BT)
    bias = jnp.where(tokens.is_response_BT, coupled.bias_BT, 0)
    np.testing.assert_allclose(bias, np.zeros(bias.shape), atol=1e-6)


@pytest.mark.parametrize("spread", [1e-3, 0.01, 0.5])
def test_gspo_summed_over_tokens_is_luspo(spread):
    """Its loss: each response's clipped sequence ratio, times its length, mean over responses."""
    with jax.enable_x64(True):
        tokens = random_tokens(4, spread=spread, dtype=np.float64)

        def luspo(logp):
            s = jnp.exp(row_mean(log_ratio_of(logp, tokens), tokens))[:, 0]
            adv, n = tokens.advantage_BT[:, 3], tokens.is_response_BT.sum(-1)
            return (n * jnp.maximum(-adv * s, -adv * jnp.clip(s, 1 - 2e-3, 1 + 2.5e-3))).mean()

        value, expected = jax.value_and_grad(luspo)(tokens.logp_BT)
        (_, aux), grad = loss_and_grad(gspo(2e-3, 2.5e-3), tokens, sequence_sum)
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(aux["surrogate"].total, value, rtol=1e-9)


def test_gmpo_clips_in_log_space_before_the_mean():
    high, low = np.exp(0.4), np.exp(-0.4)
    mean = np.exp((0.4 + np.log(0.5) + np.log(1.2)) / 3)
    np.testing.assert_allclose(row_weight(gmpo(), [2.0, 0.5, 1.2]), [0, mean, mean], rtol=1e-6)
    mean = np.exp((np.log(2) - 0.4 + np.log(1.2)) / 3)
    found = row_weight(gmpo(), [2.0, 0.5, 1.2], -1.0)
    np.testing.assert_allclose(found, [mean, 0, mean], rtol=1e-6)
    assert (row_weight(gmpo(), [high * 0.999, low * 0.999]) > 0).all()
    assert row_weight(gmpo(), [low * 0.999], -1.0) == 0


def test_dhpo_mixes_ppo_and_gspo():
    tokens = random_tokens(1, spread=0.1)
    bounds = dict(clip_low=0.05, clip_high=0.1, sequence_clip_low=0.02, sequence_clip_high=0.03)
    for mix, other in [(1.0, ppo_clip(0.05, 0.1)), (0.0, gspo(0.02, 0.03))]:
        np.testing.assert_array_equal(
            weight(dhpo(mix=mix, **bounds), tokens), weight(other, tokens)
        )
    # token 1 is beyond its own bound, the response is not; then the other way round
    found = row_weight(dhpo(mix=0.25, sequence_clip_high=0.5), [1.5, 0.9])
    s = np.sqrt(1.5 * 0.9)
    np.testing.assert_allclose(found, [0.75 * s, 0.25 * 0.9 + 0.75 * s], rtol=1e-6)
    np.testing.assert_allclose(row_weight(dhpo(mix=0.25), [1.1, 1.1]), [0.275, 0.275], rtol=1e-6)


# --- VESPO ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [(1, 1, 1), (1, 2 / 3, 1.208), (-1, 1, 1), (-1, 1.5, 1.242), (1, 4, 16 * np.exp(-9))],
)
def test_vespo_weighs_by_the_product_of_the_ratios(advantage, ratio, expected):
    found = row_weight(vespo(), [ratio / 0.5, 0.5], float(advantage))
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-3)


@pytest.mark.parametrize("drift", [1e-3, -1e-3])
def test_vespo_reports_that_a_long_response_has_vanished(drift):
    tokens = row(np.exp(np.full(8000, drift)))
    share: Any = coefficient(vespo(), tokens).metrics["vanished_share"]
    assert share.total == share.count == 8000
    share = coefficient(vespo(), row([1.0, 1.1])).metrics["vanished_share"]
    assert share.total == 0


def test_vespo_with_the_sampler_as_anchor_does_not_read_the_old_policy():
    tokens = dataclasses.replace(row([1.0, 1.0]), old_logp_BT=jnp.full((1, 2), -7.0))
    np.testing.assert_array_equal(weight(vespo(anchor="sampler"), tokens), [[1, 1]])
    assert (weight(vespo(), tokens) < 1e-3).all()


# --- FiberPO, APC -----------------------------------------------------------------------------


def test_a_token_outside_fiberpos_gate_moves_with_the_mean_unless_that_is_clipped():
    s = np.exp(np.array([0.1 + 0.2, 0.0, 0.0]))  # mean 0.1, the first token's rest is 0.2 or more
    found = row_weight(fiberpo(), np.exp([0.4, 0.0, -0.1]))
    np.testing.assert_allclose(found, [s[0] / 3, 1 + s[0] / 3, np.exp(-0.1) + s[0] / 3], rtol=1e-5)
    found = row_weight(fiberpo(), np.exp([1.0, 0.3, 0.3]))  # the mean is beyond 0.2
    np.testing.assert_allclose(found, [0, np.exp(0.3), np.exp(0.3)], rtol=1e-5)


def test_apc_takes_a_response_whole_or_not_at_all():
    ratios = np.array([1.3, 0.9, 1.0])  # mean |r - 1| is 0.1333
    for advantage in (1.0, -1.0):
        np.testing.assert_allclose(row_weight(apc(delta=0.134), ratios, advantage), ratios, 1e-6)
        assert (row_weight(apc(delta=0.133), ratios, advantage) == 0).all()


@pytest.mark.parametrize(
    "rule",
    [gmpo(), dhpo(), fiberpo(), apc(delta=1e9), gspo(coupled=True)],
    ids=["gmpo", "dhpo", "fiberpo", "apc", "gspo"],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_clamped_token_has_no_gradient_in_a_rule_that_differentiates_ratios(rule, advantage):
    tokens = row(np.exp([0.0, 25.0, 0.0]), np.array([1.0, advantage, -1.0]))
    _, grad = loss_and_grad(rule, tokens, token_sum)
    assert grad[0, 1] == 0


# --- CTPO, FIPO, MinPRO -----------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    ("t", "low", "high"), [(1, 0.975, 1.051), (100, 0.779, 1.649), (1000, 0.4536, 4.86)]
)
def test_the_window_of_ctpo_widens_with_the_position(t, low, high, advantage):
    def kept(prefix):
        ratios = np.ones(t)
        ratios[-1] = prefix  # the product up to t; the positions before are at 1
        return bool(row_weight(ctpo(), ratios, advantage)[-1] > 0)

    assert kept(high * 0.998) and not kept(high * 1.002)
    assert kept(low * 1.002) and kept(low * 0.998) == (advantage > 0)


def test_ctpo_weighs_by_the_product_of_the_prefix_or_its_mean():
    ratios, wide = [2.0, 0.5, 3.0], partial(ctpo, clip_low=9.0, clip_high=9.0)
    np.testing.assert_allclose(row_weight(wide(), ratios), [2, 1, 3], rtol=1e-6)
    found = row_weight(wide(prefix="mean"), ratios)
    np.testing.assert_allclose(found, [2, 1, 3 ** (1 / 3)], rtol=1e-6)


def test_ctpo_without_growth_has_a_fixed_window():
    rule = ctpo(power=0.0, clip_low=-np.log(0.8), clip_high=np.log(1.2), dual_cap=np.log(3))
    np.testing.assert_allclose(row_weight(rule, [1.19, 1.02]), [1.19, 0], rtol=1e-6)
    np.testing.assert_allclose(row_weight(rule, [1.21, 0.99]), [0, 1.21 * 0.99], rtol=1e-6)
    np.testing.assert_allclose(row_weight(rule, [0.9, 0.9, 3.8], -1.0), [0.9, 0.81, 0], 1e-6)
    np.testing.assert_allclose(row_weight(rule, [0.9, 0.8, 1.2], -1.0), [0.9, 0, 0.864], 1e-6)


def test_a_prefix_beyond_ten_nats_has_no_weight_though_its_window_is_wider():
    rule = ctpo(clip_high=11.0, dual_cap=11.0)
    for advantage in (1.0, -1.0):
        found = row_weight(rule, np.exp([6.0, 3.9, 0.2, -0.2]), advantage)
        np.testing.assert_array_equal(found > 0, [True, True, False, True])


def test_fipo_amplifies_a_token_whose_future_is_reinforced():
    ratios, g = np.array([1.0, 1.1, 0.95]), 0.5
    future = np.log(1.1) + g * np.log(0.95), np.log(0.95)
    influence = np.exp([g * future[0], future[0], future[1]])
    rule = fipo(half_life=1.0, influence_min=0.1, influence_max=9.0)
    np.testing.assert_allclose(row_weight(rule, ratios), influence * ratios, rtol=1e-5)
    found = row_weight(fipo(half_life=1.0), ratios)  # its own log-ratio is part of it; high only
    np.testing.assert_allclose(found, np.maximum(influence, 1) * ratios, rtol=1e-5)
    np.testing.assert_allclose(row_weight(fipo(), [1.19] * 9), [1.2 * 1.19] * 8 + [1.19**2], 1e-5)


def test_fipo_never_amplifies_a_negative_token_beyond_the_safety_ratio():
    np.testing.assert_allclose(row_weight(fipo(), [3.9, 4.1], -1.0), [1.2 * 3.9, 4.1], rtol=1e-5)
    for floor, influence in [(1.0, 1.0), (0.9, 0.9), (0.5, 0.8)]:  # the future is bad enough
        found = row_weight(fipo(influence_min=floor), [4.1] + [0.81] * 20, -1.0)
        np.testing.assert_allclose(found[0], influence * 4.1, rtol=1e-5)


def test_fipos_dual_cap_takes_a_token_out_of_the_loss_and_of_the_future():
    ratios = [1.05, 20.0]
    found = row_weight(fipo(dual_cap=10.0), ratios, -1.0)
    np.testing.assert_allclose(found, [1.05**2, 0], rtol=1e-5)
    np.testing.assert_allclose(row_weight(fipo(), ratios, -1.0), [1.05 * 1.2, 20], rtol=1e-5)


def test_minpro_multiplies_by_the_least_ratio_before():
    np.testing.assert_allclose(row_weight(minpro(), [2.0, 2.0, 3.0, 0.5]), [2, 4, 5, 1], 1e-6)
    np.testing.assert_allclose(
        row_weight(minpro(), [0.5, 2.0, 0.1, 4.0]), [0.5, 1, 0.05, 0.4], 1e-5
    )


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "field", "name"),
    [(ctpo(), "position_BT", "ctpo"), (vespo(anchor="sampler"), "sampler_logp_BT", "vespo")],
)
def test_a_missing_field_is_named(rule, field, name):
    tokens = dataclasses.replace(random_tokens(0), **{field: None})
    with pytest.raises(ValueError, match=rf"{name} needs Tokens\.{field}"):
        policy_loss(rule, tokens, aggregate=token_mean)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gmpo", {"clip_low": -0.1}, r"gmpo.clip_low = -0.1; expected a number >= 0"),
        ("vespo", {"lam_negative": 0.0}, r"vespo.lam_negative = 0.0; expected a number > 0"),
        ("vespo", {"anchor": "ref"}, r"vespo.anchor = 'ref'; expected one of"),
        ("dhpo", {"mix": 1.5}, r"dhpo.mix = 1.5"),
        ("dhpo", {"sequence_clip_low": 2.0}, r"dhpo.sequence_clip_low = 2.0"),
        ("fiberpo", {"clip_base": -1.0}, r"fiberpo.clip_base = -1.0"),
        ("apc", {"delta": 0.0}, r"apc.delta = 0.0; expected a number > 0"),
        ("ctpo", {"dual_cap": 0.0}, r"ctpo.dual_cap = 0.0; expected a number > 0"),
        ("ctpo", {"prefix": "sum"}, r"ctpo.prefix = 'sum'; expected one of"),
        ("fipo", {"clip_low": 2.0}, r"fipo.clip_low = 2.0"),
        ("fipo", {"half_life": 0.0}, r"fipo.half_life = 0.0"),
        ("fipo", {"influence_min": 1.3}, r"fipo.influence_min = 1.3; expected at most fipo.infl"),
        ("fipo", {"dual_cap": 1.2}, r"fipo.dual_cap = 1.2; expected a ratio above 1 \+ fipo"),
        ("minpro", {"ratio_max": 0.0}, r"minpro.ratio_max = 0.0"),
    ],
)
def test_wrong_hyper_parameters_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**arguments)
