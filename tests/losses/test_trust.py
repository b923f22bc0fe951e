"""Trust regions by hand: both sides of every bound, the first mini-batch, NaN, scans that end."""

import dataclasses
from math import exp, log

import jax.numpy as jnp
import numpy as np
import pytest
from laws import LAWS
from loss_cases import at_ratio, coefficient, loss_and_grad, random_tokens, weight

from aspo_jax.losses import (
    OBJECTIVES,
    chain,
    cppo,
    dis,
    dppo_kl,
    dppo_tv,
    drpo,
    opsm,
    ppo_clip,
    reads,
    reinforce,
    ripo,
    token_mean,
    up,
)

ANCHORED = [
    *(dppo_tv(), dppo_tv(cap=None, sides="both"), dppo_kl(), dppo_kl(cap=None)),
    *(dis(), cppo(), cppo(cap=20.0), drpo(), drpo(is_mu_weighted=False)),
    chain(reinforce(), opsm(delta=0.1)),
]


def tokens_of(pi, x, advantage):
    """One response of tokens whose probabilities went from x to pi."""
    pi, x, advantage = (np.atleast_1d(v).astype(float) for v in (pi, x, advantage))
    column = at_ratio(np.log(pi / x), advantage, old_logp=np.log(x))
    row = {
        field.name: value.reshape(1, -1)
        for field in dataclasses.fields(column)
        if (value := getattr(column, field.name)) is not None
    }
    row["position_BT"] = jnp.arange(len(pi))[None]
    return dataclasses.replace(column, **row)


def binary_kl(x, pi):
    return x * log(x / pi) + (1 - x) * log((1 - x) / (1 - pi))


@pytest.mark.parametrize(
    ("rule", "x", "pi", "advantage", "expected"),
    [
        (dppo_tv(), 0.5, 0.69, 1, 0.69 / 0.5),
        (dppo_tv(), 0.5, 0.71, 1, 0.0),
        (dppo_tv(), 0.5, 0.29, 1, 0.29 / 0.5),  # inward: never dropped
        (dppo_tv(), 0.5, 0.31, -1, 0.31 / 0.5),
        (dppo_tv(), 0.5, 0.29, -1, 0.0),
        (dppo_tv(), 0.5, 0.71, -1, 0.71 / 0.5),
        (dppo_tv(), 0.01, 0.09, 1, 9.0),  # PPO would drop it
        (dppo_tv(), 0.01, 0.11, 1, 10.0),
        (dppo_tv(cap=None), 0.01, 0.11, 1, 11.0),
        (dppo_tv(delta_low=0.1, delta_high=0.1, cap=None, sides="both"), 0.5, 0.39, 1, 0.0),
        (dppo_tv(delta_low=0.1, delta_high=0.1, cap=None, sides="both"), 0.5, 0.41, 1, 0.82),
        (dppo_tv(delta_low=0.1, delta_high=0.1, cap=None, sides="both"), 0.5, 0.61, -1, 0.0),
        (dppo_kl(delta=binary_kl(0.5, 0.651)), 0.5, 0.65, 1, 1.3),
        (dppo_kl(delta=binary_kl(0.5, 0.649)), 0.5, 0.65, 1, 0.0),
        (dppo_kl(delta=binary_kl(0.5, 0.649)), 0.5, 0.65, -1, 1.3),
        (dppo_kl(delta=binary_kl(0.5, 0.301)), 0.5, 0.30, -1, 0.0),
        (dppo_kl(delta=binary_kl(0.5, 0.299)), 0.5, 0.30, -1, 0.6),
        (dis(), 0.1, 0.119, 1, 1.19),
        (dis(), 0.1, 0.121, 1, 0.0),
        (dis(), 0.1, 0.121, -1, 0.0),
        (dis(), 0.1, 0.079, 1, 0.0),
        (dis(), 0.1, 0.081, -1, 0.81),
        (ripo(), 0.9, 0.9 * 1.235, 1, 1.235),
        (ripo(), 0.9, 0.9 * 1.237, 1, 0.0),
        (ripo(), 0.9, 0.9 * 0.765, -1, 0.765),
        (ripo(), 0.9, 0.9 * 0.763, -1, 0.0),
        (ripo(), 0.05, 0.05 * 1.99, 1, 1.99),
        (ripo(), 0.05, 0.05 * 2.01, 1, 0.0),
        (ripo(), 0.05, 0.05 * 0.51, -1, 0.51),
        (ripo(), 0.05, 0.05 * 0.49, -1, 0.0),
        (ripo(), 1e-5, 9.9e-5, 1, 9.9),
        (ripo(), 1e-5, 10.1e-5, 1, 0.0),
        (up(), 0.1, 0.9, 1, 1.0),
        (up(), 0.1, 0.081, -1, 0.81),
        (up(), 0.1, 0.079, -1, 0.0),
    ],
)
def test_weight_on_both_sides_of_every_bound(rule, x, pi, advantage, expected):
    found = weight(rule, tokens_of(pi, x, advantage))
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_bounds_of_dis_are_strict(advantage):
    for log_ratio in (0.25, -0.25):
        tokens = at_ratio(np.array([log_ratio]), advantage)
        width = abs(float(jnp.exp(tokens.logp_BT)[0, 0]) - 1)
        assert weight(dis(clip_low=width, clip_high=width), tokens) == 0
        assert weight(dis(clip_low=width + 1e-6, clip_high=width + 1e-6), tokens) > 0


def test_a_probability_of_almost_one_keeps_its_digits():
    """1 - pi is 1e-9 and 1e-5 here; as a float32 difference it would be 0 and 1.0014e-5."""
    for log_pi, log_x, advantage in [(-1e-9, -1e-5, 1.0), (-1e-5, -1e-9, -1.0)]:
        x, rest_x, rest = exp(log_x), -np.expm1(log_x) + 1e-8, -np.expm1(log_pi) + 1e-8
        kl = x * (log_x - log_pi) + (rest_x - 1e-8) * log(rest_x / rest)
        tokens = at_ratio(np.array([log_pi - log_x]), advantage, old_logp=log_x)
        tokens = dataclasses.replace(tokens, logp_BT=jnp.full((1, 1), log_pi, jnp.float32))
        assert weight(dppo_kl(delta=1.001 * kl), tokens) > 0
        assert weight(dppo_kl(delta=0.999 * kl), tokens) == 0


def test_a_probability_rounded_to_above_one_is_still_near():
    """1 - pi is then negative, and its logarithm NaN."""
    np.testing.assert_allclose(weight(dppo_kl(), at_ratio(np.array([1e-6]), 1.0)), 1, rtol=1e-5)


def test_drpo_attenuates_what_moves_outward():
    pi, x, advantage = [0.7, 0.3, 0.7, 0.3], [0.5] * 4, [2.0, 2.0, -2.0, -2.0]
    found = coefficient(drpo(epsilon=0.5), tokens_of(pi, x, advantage))
    total = found.weight_BT * jnp.array([advantage]) + found.bias_BT
    expected = [2 * 1.4 * 0.6, 2 * 0.6 * 1.4, -2 * 1.4 * 1.4, -2 * 0.6 * 0.6]
    np.testing.assert_allclose(total, [expected], rtol=1e-5)
    simple = coefficient(drpo(epsilon=0.5, is_mu_weighted=False), tokens_of(pi, x, advantage))
    np.testing.assert_allclose(simple.bias_BT, 2 * found.bias_BT, rtol=1e-5)


def test_the_prefix_budget_by_hand():
    """v is 1, 0.9, 0.8 and the budget per token at its largest, 0.04.

    After a move of 0.19 there is room for 0.2 + 0.04 - 0.19 = 0.05, and after one of 0.02, which
    counts 0.018, for 0.05 + 0.036 - 0.018 = 0.068: a third may be 0.085.
    """
    for third, expected in [(0.084, 1.0), (0.086, 0.0)]:
        tokens = tokens_of([0.69, 0.52, 0.5 + third], 0.5, 1.0)
        np.testing.assert_array_equal(weight(cppo(), tokens) > 0, [[True, True, expected > 0]])
    inward = tokens_of([0.69, 0.52, 0.1], 0.5, 1.0)
    assert (weight(cppo(), inward) > 0).all()
    first = [weight(cppo(), tokens_of(pi, 0.5, 1.0))[0, 0] for pi in (0.699, 0.701)]
    np.testing.assert_allclose(first, [0.699 / 0.5, 0.0], rtol=1e-5)


def test_what_a_tool_wrote_spends_no_budget():
    """The middle token is an observation: it has no rank, no share of the quantile, no move."""
    tokens = tokens_of([0.69, 0.9, 0.52, 0.584], 0.5, 1.0)
    tokens = dataclasses.replace(
        tokens,
        is_response_BT=jnp.array([[True, False, True, True]]),
        position_BT=jnp.array([[0, 0, 1, 2]]),
    )
    assert (weight(cppo(), tokens)[0, [0, 2, 3]] > 0).all()


@pytest.mark.parametrize("rule", [*ANCHORED, ripo(), up(), dppo_tv(delta_low=0, delta_high=0)])
def test_the_first_mini_batch_is_reinforce(rule):
    """r is 1 and pi - x is 0 on every token: no gate closes and no penalty has a sign."""
    tokens = random_tokens(0, spread=0.5)
    same = ("old_logp_BT", "sampler_logp_BT")
    tokens = dataclasses.replace(tokens, **dict.fromkeys(same, tokens.logp_BT))
    found, expected = (loss_and_grad(x, tokens, token_mean)[1] for x in (rule, reinforce()))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rule", ANCHORED)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_sampler_that_reports_nan_is_never_trained_on_as_if_it_had_not(rule, advantage):
    """Of bad responses at least, as for a good one OPSM does not look; see the assembly's error."""
    tokens = tokens_of([0.5, 0.5, 0.5], 0.5, advantage)
    sampler_BT = jnp.asarray(tokens.sampler_logp_BT).at[0, 1].set(jnp.nan)
    found = weight(rule, dataclasses.replace(tokens, sampler_logp_BT=sampler_BT))[0, 1]
    is_exempt = rule is ANCHORED[-1] and advantage > 0
    assert is_exempt or np.isnan(found) or found == 0


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl", "dis", "cppo", "drpo"])
def test_a_rule_needs_the_sampler_only_where_it_is_the_anchor(name):
    factory = OBJECTIVES[name]
    assert reads(factory(), "sampler_logp_BT")
    assert not reads(factory(anchor="old"), "sampler_logp_BT")
    tokens = random_tokens(0)
    moved = dataclasses.replace(tokens, old_logp_BT=tokens.sampler_logp_BT)
    np.testing.assert_array_equal(weight(factory(anchor="old"), moved), weight(factory(), tokens))


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl", "dis", "cppo", "ripo", "opsm"])
def test_the_laws_have_seen_both_sides_of_the_gate(name):
    tokens = random_tokens(1, spread=0.5)
    mask = np.asarray(tokens.is_response_BT)
    is_dropped = weight(LAWS[name].rule, tokens)[mask] == 0
    assert 0.03 < is_dropped.mean() < 0.97


def test_opsm_drops_bad_responses_that_became_improbable():
    """Mean losses of 0.15 and 0.25 nats; a good response is kept, one that rose is kept."""
    tokens = random_tokens(2)
    shifts = jnp.array([[0.15], [0.25], [0.25], [-3.0], [0.25], [0.0]])
    tokens = dataclasses.replace(
        tokens,
        old_logp_BT=tokens.logp_BT + shifts,
        advantage_BT=jnp.array([[-1.0], [-1.0], [1.0], [-1.0], [-0.0], [-1.0]])
        * jnp.ones_like(tokens.logp_BT),
    )
    rule = chain(reinforce(), opsm(delta=0.2, anchor="old"))
    mask = np.asarray(tokens.is_response_BT)
    found = [set(w[m]) for w, m in zip(weight(rule, tokens), mask, strict=True)]
    assert found == [{1.0}, {0.0}, {1.0}, {1.0}, {1.0}, {1.0}]
    (_, aux), _ = loss_and_grad(rule, tokens, token_mean)
    share = aux["opsm_share"]
    np.testing.assert_allclose(share.total / share.count, mask[1].sum() / mask.sum())


def test_up_is_reinforce_where_positive_and_ppo_elsewhere():
    tokens = random_tokens(3, spread=0.5)
    expected = np.where(tokens.advantage_BT > 0, 1.0, weight(ppo_clip(), tokens))
    np.testing.assert_array_equal(weight(up(), tokens), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OBJECTIVES["dppo_tv"](anchor="mu"), r"dppo_tv.anchor = 'mu'; expected one of"),
        (lambda: OBJECTIVES["dppo_tv"](sides="all"), r"dppo_tv.sides = 'all'"),
        (lambda: dppo_tv(delta_low=-0.1), r"dppo_tv.delta_low = -0.1; expected a number >= 0"),
        (lambda: dppo_tv(cap=0.0), r"dppo_tv.cap = 0.0; expected a number > 0"),
        (lambda: dppo_kl(delta=float("nan")), r"dppo_kl.delta = nan"),
        (lambda: dis(clip_low=2.0), r"dis.clip_low = 2.0"),
        (lambda: cppo(w_min=0.0), r"cppo.w_min = 0.0"),
        (lambda: cppo(w_min=1.1), r"cppo.w_min = 1.1"),
        (lambda: cppo(delta_b=-1.0), r"cppo.delta_b = -1.0"),
        (lambda: drpo(epsilon=0.0), r"drpo.epsilon = 0.0"),
        (lambda: OBJECTIVES["drpo"](anchor="mu"), r"drpo.anchor = 'mu'"),
        (lambda: ripo(delta_low=0.0), r"ripo.delta_low = 0.0"),
        (lambda: ripo(ratio_min=1.5), r"ripo.ratio_min = 1.5"),
        (lambda: ripo(ratio_max=0.5), r"ripo.ratio_max = 0.5; expected a ratio of at least 1"),
        (lambda: up(clip_low=1.5), r"up.clip_low = 1.5"),
        (lambda: opsm(delta=-1.0), r"opsm.delta = -1.0"),
        (lambda: OBJECTIVES["opsm"](delta=1.0, anchor="mu"), r"opsm.anchor = 'mu'"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
