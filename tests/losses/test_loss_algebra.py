"""Laws of chain and select, and of what `policy_loss` reports."""

import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import at_ratio, loss_and_grad, random_tokens, weight

from aspo_jax.losses import (
    WEIGHT_BIN_EDGES,
    Coefficient,
    Objective,
    archer2,
    aspo,
    chain,
    cispo,
    fixed_length,
    grpo,
    gspo,
    histogram_quantile,
    kl_penalty,
    low_entropy_kl,
    policy_loss,
    reads,
    reinforce,
    select,
    token_mean,
)
from aspo_jax.losses.report import weight_histogram


def constant(weight=1.0, bias=0.0, value=1.0, **parts):
    def coefficient(tokens, state, stats):
        full = jnp.full(tokens.logp_BT.shape, 1.0)
        return Coefficient(weight * full, bias * full, {}, value * full)

    return Objective(coefficient, **parts)


def is_uncertain(tokens):
    return tokens.entropy_BT > 1


def test_chain_multiplies_weights_and_adds_biases():
    rule = chain(constant(2.0, 0.5), constant(3.0, -1.5), constant(0.5, 0.25))
    coefficient = rule.coefficient(random_tokens(0), rule.init(), None)
    assert (coefficient.weight_BT == 3.0).all()
    assert (coefficient.bias_BT == -0.75).all()


def test_chain_corrects_the_surrogate_of_the_rule_and_not_that_of_a_penalty():
    rule, correction, penalty = constant(2, value=5), constant(3, value=0), constant(value=7)
    for chained in (
        chain(rule, correction, penalty),
        chain(rule, penalty, correction),
        chain(chain(rule, correction), penalty),
        chain(rule, chain(correction, penalty)),
    ):
        found = chained.coefficient(random_tokens(0), chained.init(), None).surrogate_BT
        assert (found == 5.0 * 3.0 + 7.0).all()


def test_chain_is_associative_and_has_reinforce_as_neutral_weight():
    tokens = random_tokens(1)
    a, b, c = grpo(), cispo(), kl_penalty(0.1)
    left, right = chain(chain(a, b), c), chain(a, chain(b, c))
    x, y = (rule.coefficient(tokens, rule.init(), None) for rule in (left, right))
    for field in ("weight_BT", "bias_BT", "surrogate_BT"):
        ours, theirs = getattr(x, field), getattr(y, field)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(weight(chain(a, reinforce()), tokens), weight(a, tokens))


def test_chain_of_one_is_the_rule():
    tokens = random_tokens(2)
    alone, chained = (loss_and_grad(r, tokens, token_mean) for r in (aspo(), chain(aspo())))
    np.testing.assert_array_equal(alone[1], chained[1])


def test_an_empty_chain_is_an_error():
    with pytest.raises(ValueError, match="at least one objective"):
        chain()


def test_a_metric_emitted_twice_is_named():
    tokens = random_tokens(0)
    with pytest.raises(ValueError, match="metric 'cap_share_positive' is emitted twice"):
        policy_loss(chain(aspo(), aspo()), tokens, aggregate=token_mean)
    with pytest.raises(ValueError, match="metric 'clip_share' is emitted twice"):
        policy_loss(kl_penalty(metric="clip_share"), tokens, aggregate=token_mean)


def test_a_missing_surrogate_stays_missing():
    silent = Objective(lambda *args: constant().coefficient(*args)._replace(surrogate_BT=None))
    tokens = random_tokens(0)
    for rule in (chain(aspo(), silent), select(lambda t: t.logp_BT > -1, silent, aspo())):
        _, aux = policy_loss(rule, tokens, aggregate=token_mean)
        assert "surrogate" not in aux


def test_states_and_sums_are_tuples_with_one_entry_per_rule():
    stateful = constant(
        init=lambda: jnp.float32(5.0),
        prepare=lambda tokens, state: state + 1,
        update=lambda state, stats: state + stats,
    )
    tokens = random_tokens(0)
    for rule in (chain(aspo(), stateful), select(lambda t: t.logp_BT > 0, aspo(), stateful)):
        assert rule.prepare
        state = rule.init()
        assert state == ((), 5.0)
        stats = rule.prepare(tokens, state)
        assert stats == (None, 6.0)
        assert rule.update(state, stats) == ((), 11.0)
        policy_loss(rule, tokens, aggregate=token_mean)
    plain = chain(aspo(), kl_penalty())
    assert plain.prepare is None and plain.update(plain.init(), None) == ((), ())


def test_coefficients_read_state_and_sums():
    def coefficient(tokens, state, stats):
        full = jnp.ones_like(tokens.logp_BT)
        return Coefficient(state * stats * full, 0 * full, {}, full)

    rule = Objective(
        coefficient,
        prepare=lambda tokens, state: tokens.is_response_BT.sum() * state,
        init=lambda: jnp.float32(2.0),
    )
    tokens = at_ratio(np.zeros(4), 1.0)
    _, default = loss_and_grad(rule, tokens, token_mean)
    np.testing.assert_allclose(default, -np.full((4, 1), 2.0 * 8.0 / 4))
    loss, _ = policy_loss(
        rule, tokens, aggregate=token_mean, state=jnp.float32(1.0), stats=jnp.float32(7.0)
    )
    np.testing.assert_allclose(loss, -(7.0 * tokens.logp_BT).mean())


def test_select_of_a_rule_with_itself_is_the_rule():
    tokens = random_tokens(3)
    for rule in (aspo(), gspo()):
        both = select(is_uncertain, rule, rule)
        (_, aux_one), one = loss_and_grad(rule, tokens, token_mean)
        (_, aux_two), two = loss_and_grad(both, tokens, token_mean)
        np.testing.assert_array_equal(one, two)
        assert aux_one.keys() == aux_two.keys()
        for name in aux_one:
            for x, y in zip(aux_one[name], aux_two[name], strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6)


def test_select_chooses_per_token():
    tokens = random_tokens(4)
    chosen = weight(select(is_uncertain, aspo(), grpo()), tokens)
    expected = np.where(is_uncertain(tokens), weight(aspo(), tokens), weight(grpo(), tokens))
    np.testing.assert_array_equal(chosen, expected)


def test_reported_shares_and_ratios():
    tokens = at_ratio(np.log([0.5, 1.1, 1.3, 0.7, 1.0, 9.0]), [1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
    (_, aux), _ = loss_and_grad(grpo(), tokens, token_mean)

    def mean(name):
        return float(aux[name].total / aux[name].count)

    np.testing.assert_allclose(mean("clip_share"), 2 / 5)
    np.testing.assert_allclose(mean("clip_share_positive"), 1 / 3)
    np.testing.assert_allclose(mean("clip_share_negative"), 1 / 2)
    np.testing.assert_allclose(mean("response_ratio_positive"), 2.9 / 3, rtol=1e-6)
    np.testing.assert_allclose(mean("response_ratio_negative"), 0.85, rtol=1e-6)
    r = np.array([0.5, 1.1, 1.3, 0.7, 1.0, 9.0])
    np.testing.assert_allclose(mean("ratio_kl"), (r - 1 - np.log(r)).mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["abs_log_ratio_max"].value, np.log(9), rtol=1e-6)
    assert aux["weight_positive"].counts.sum() == 3
    assert aux["weight_positive"].counts[0] == 1  # the clipped one


def test_weight_quantiles_survive_the_histogram():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 0.5, 20000)).astype(np.float32)[None]
    histogram = weight_histogram(jnp.asarray(values), jnp.ones(values.shape, bool))
    for q in (0.01, 0.5, 0.99):
        found = histogram_quantile(np.asarray(histogram.counts), WEIGHT_BIN_EDGES, q)
        np.testing.assert_allclose(found, np.quantile(values, q), rtol=0.02)
    ones = weight_histogram(jnp.ones((1, 9)), jnp.ones((1, 9), bool))
    np.testing.assert_allclose(
        histogram_quantile(np.asarray(ones.counts), WEIGHT_BIN_EDGES, 0.5), 1, rtol=1e-5
    )


def test_the_ends_of_a_histogram():
    bins = len(WEIGHT_BIN_EDGES) + 1
    empty = np.zeros(bins)
    assert np.isnan(histogram_quantile(empty, WEIGHT_BIN_EDGES, 0.5))
    for slot, expected in [(0, 0.0), (bins - 1, WEIGHT_BIN_EDGES[-1])]:
        counts = empty.copy()
        counts[slot] = 3
        for q in (0.0, 0.5, 1.0):
            assert histogram_quantile(counts, WEIGHT_BIN_EDGES, q) == expected


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (aspo(), set()),
        (archer2(), {"entropy_BT"}),
        (chain(aspo(), kl_penalty()), {"ref_logp_BT"}),
        (chain(aspo(), low_entropy_kl()), {"ref_logp_BT", "entropy_BT"}),
    ],
)
def test_reads_names_the_fields_a_rule_needs(rule, fields):
    optional = {"entropy_BT", "old_entropy_BT", "ref_logp_BT", "sampler_logp_BT", "position_BT"}
    assert {field for field in optional if reads(rule, field)} == fields


def test_a_length_that_is_no_length():
    with pytest.raises(ValueError, match=r"fixed_length.length = 0"):
        fixed_length(0)
