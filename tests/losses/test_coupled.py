"""The rules that are coupled over a mini-batch, on cases that can be computed by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
    at_ratio,
    coefficient,
    loss_and_grad,
    one_per_row,
    random_tokens,
    sequences,
    weight,
)

from aspo_jax.losses import (
    BAPO_PUBLISHED,
    OBJECTIVES,
    archer,
    aspo,
    bapo,
    chain,
    clip_cov,
    hapo,
    kl_cov,
    p3o,
    per_microbatch,
    real,
    reinforce,
    response_only,
    sequence_mean,
    token_mean,
)


def stats_of(rule, tokens, state=None):
    return rule.prepare(response_only(tokens), rule.init() if state is None else state)


def with_fields(tokens, **fields):
    """The tokens with whole columns replaced by flat values."""
    as_rows = {k: jnp.asarray(v).reshape(tokens.logp_BT.shape) for k, v in fields.items()}
    return dataclasses.replace(tokens, **as_rows)


# --- BAPO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positive", "negative", "low", "high"),
    [
        # P = 2 min(2, high), N = the sum of max(r, low) |A|
        ([2.0, 2.0], [(1.0, 2.3)], 0.6, 1.2),  # 2.4 : 2.3 at once
        ([2.0, 2.0], [(1.0, 2.97)], 0.9, 1.5),  # 2 high reaches 2.97
        ([2.0, 2.0], [(0.5, 4.0)], 0.6, 1.2),  # 0.6 * 4 is 2.4
        ([2.0, 2.0], [(0.5, 4.1)], 0.9, 1.85),  # 2.46 is too much, and becomes 0.9 * 4.1 = 3.69
        ([2.0, 2.0], [(1.0, 9.0)], 0.9, 3.0),  # never
        ([2.0, 2.0], [], 0.6, 1.2),
        ([], [(1.0, 1.0)], 0.9, 3.0),
    ],
)
def test_the_bounds_of_bapo(positive, negative, low, high):
    pairs = [(r, 1.0) for r in positive] + [(r, -a) for r, a in negative]
    ratios, advantages = np.array(pairs).T
    tokens = at_ratio(np.log(ratios), advantages)
    np.testing.assert_allclose(stats_of(bapo(), tokens), [low, high], rtol=1e-6)


def test_bapo_on_both_sides_of_its_bounds():
    rule = bapo()
    tokens = at_ratio(
        np.log([1.19, 1.21, 5.0, 0.59, 0.61, 2.9, 3.1]), [1.0, 1, 1, -0.1, -0.1, -0.1, -0.1]
    )
    assert np.allclose(stats_of(rule, tokens), [0.6, 1.2])
    expected = [1.19, 0, 0, 0, 0.61, 2.9, 0]
    np.testing.assert_allclose(weight(rule, tokens)[:, 0], expected, rtol=1e-6)


def test_the_published_settings_of_bapo():
    assert set(BAPO_PUBLISHED) == {"paper", "repository", "script"}
    tokens = at_ratio(np.log([3.0, 1.0]), [1.0, -9.0])  # too little for any target
    ends = {
        name: np.asarray(stats_of(bapo(**settings), tokens)).tolist()
        for name, settings in BAPO_PUBLISHED.items()
    }
    expected = {"paper": [0.9, 3.0], "repository": [0.8, 2.0], "script": [0.95, 2.0]}
    assert ends == {k: pytest.approx(v) for k, v in expected.items()}
    at_third = at_ratio(np.log([1.0, 1.0]), [1.01, -2.0])  # P : N a little above 1 : 2
    assert np.allclose(stats_of(bapo(**BAPO_PUBLISHED["script"]), at_third), [0.8, 1.2])


# --- P3O ----------------------------------------------------------------------------------------


def test_p3o_by_hand():
    tokens = at_ratio(np.log([1.0, 1.0, 2.0, 0.5]), 1.0)
    ess = 4.5**2 / (4 * 6.25)
    found = coefficient(p3o(), tokens)
    np.testing.assert_allclose(found.weight_BT[:, 0], [ess, ess, ess, 0.5], rtol=1e-6)
    expected = (1 - ess) * np.array([0, 0, -0.5, 1.0])
    np.testing.assert_allclose(found.bias_BT[:, 0], expected, rtol=1e-6, atol=1e-7)


def test_p3o_does_not_pull_tokens_beyond_ten_nats():
    tokens = at_ratio(np.array([-10.1, -9.9, 9.9, 10.1]), 1.0)
    bias = np.asarray(coefficient(p3o(), tokens).bias_BT)[:, 0]
    assert bias[0] == 0 and bias[3] == 0
    assert bias[1] > 1e3 and bias[2] < -0.5


def test_p3o_compares_with_its_anchor():
    tokens = at_ratio(np.log([1.0, 1.0, 2.0, 0.5]), 1.0)
    off = dataclasses.replace(tokens, old_logp_BT=tokens.logp_BT)
    assert stats_of(p3o(anchor="old"), off) == 1 and stats_of(p3o(), off) < 0.9


# --- HAPO ---------------------------------------------------------------------------------------


def entropies(log_entropy, ratio, advantage):
    tokens = at_ratio(np.log(ratio), advantage)
    return with_fields(tokens, entropy_BT=np.exp(np.float32(log_entropy)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        # log entropies -4, -1, 0, 1, 2 with the median as pivot: h = -1, -1/4, 0, 1/2, 1
        (1.0, 1, [0, 0.75, 1, 1, 1]),
        (1.12, 1, [1.12, 1.12, 1.12, 1.12, 1.12]),
        (1.17, 1, [1.17, 1.17, 1.17, 1.5 * 1.17, 1.17]),
        (1.25, 1, [0, 0, 0, 1.5 * 1.25, 2 * 1.25]),
        (1.35, 1, [0, 0, 0, 0, 2 * 1.35]),
        (1.45, 1, [0, 0, 0, 0, 0]),
        (0.85, -1, [0, 0.85, 0.85, 1.5 * 0.85, 2 * 0.85]),
        (0.88, -1, [0, 0.75 * 0.88, 0.88, 1.5 * 0.88, 2 * 0.88]),
        (0.78, -1, [0.78, 0.78, 0, 0, 0]),
        (0.65, -1, [0.65, 0, 0, 0, 0]),
        (0.59, -1, [0, 0, 0, 0, 0]),
        (9.9, -1, [9.9, 9.9, 9.9, 1.5 * 9.9, 2 * 9.9]),
        (10.1, -1, [0, 0, 0, 0, 0]),
    ],
)
def test_hapo_by_hand(ratio, advantage, expected):
    tokens = entropies([-4, -1, 0, 1, 2], np.full(5, ratio), float(advantage))
    found = weight(hapo(quantile=0.5), tokens)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_released_hapo_gives_its_surest_token_the_widest_bound():
    tokens = entropies([-4, -1, 0, 1, 2], np.full(5, 1.35), 1.0)
    as_coded = weight(hapo(quantile=0.5, code_sign=True), tokens)[:, 0]
    np.testing.assert_allclose(as_coded, [2 * 1.35, 0, 0, 0, 2 * 1.35], rtol=1e-5)


def test_hapo_on_tokens_that_are_certain():
    tokens = with_fields(
        entropies([0, 1, 2], np.ones(3), 1.0), entropy_BT=np.array([0, -1e-7, 1], np.float32)
    )
    assert np.isfinite(weight(hapo(), tokens)).all()


# --- Clip-Cov and KL-Cov ------------------------------------------------------------------------


def spread_out(count=400, seed=0, ratio=1.0):
    """Tokens of many answers, one each, whose covariances differ."""
    rng = np.random.default_rng(seed)
    tokens = at_ratio(
        np.full(count, np.log(ratio)), rng.normal(size=count), old_logp=-rng.exponential(1, count)
    )
    return with_fields(
        tokens,
        sampler_logp_BT=-rng.exponential(1, count).astype(np.float32),
        group_id_BT=np.arange(count) // 8,
    )


LOOSE: dict[str, Any] = dict(share=0.1, covariance_min=0.2, covariance_max=5.0)


def drawn(rule, tokens, updates=0, stats=None):
    """Which tokens Clip-Cov takes the gradient of, at an update, ``[B]``."""
    tokens = response_only(tokens)
    stats = rule.prepare(tokens, updates) if stats is None else stats
    return np.asarray(rule.coefficient(tokens, updates, stats).weight_BT)[:, 0] == 0


def covariances(tokens):
    a, logp = (np.asarray(x, np.float64)[:, 0] for x in (tokens.advantage_BT, tokens.logp_BT))
    return (a - a.mean()) * (logp - logp.mean())


def test_clip_cov_draws_its_share_of_the_candidates():
    tokens, rule = spread_out(), clip_cov(**LOOSE)
    candidate = (covariances(tokens) > 0.2) & (covariances(tokens) < 5)
    assert 60 < candidate.sum() < 340
    rounds = np.array([drawn(rule, tokens, updates) for updates in range(40)])
    assert not rounds[:, ~candidate].any()
    assert rounds[:, candidate].any(0).mean() > 0.95  # each has its turn
    assert abs(rounds.sum(1).mean() - 40) < 4  # floor(0.1 * 400); 6 standard errors
    assert rounds.sum(1).std() > 2  # not exactly 40, as in the released code


def test_a_draw_is_named_by_the_token_and_not_by_what_lies_beside_it():
    tokens, rule = spread_out(), clip_cov(**LOOSE)
    stats = stats_of(rule, tokens, 3)
    expected = drawn(rule, tokens, 3)
    order = np.random.default_rng(1).permutation(len(expected))[:150]
    part = jax.tree.map(lambda x: x[order], tokens)
    np.testing.assert_array_equal(drawn(rule, part, 3, stats), expected[order])
    others = [drawn(rule, tokens, 4), drawn(clip_cov(**LOOSE, seed=1), tokens, 3)]
    assert all((other != expected).any() for other in others)
    # What rounds anew for every layout has no say; what was recorded has.
    rounded = dataclasses.replace(tokens, old_logp_BT=tokens.old_logp_BT * (1 + 1e-7))
    np.testing.assert_array_equal(drawn(rule, rounded, 3), expected)
    moved = with_fields(tokens, position_BT=np.ones(len(expected), np.int32))
    assert (drawn(rule, moved, 3) != expected).any()


def test_clip_cov_counts_its_updates():
    rule = clip_cov()
    assert rule.init() == 0 and rule.update(rule.init(), None) == 1


def test_clip_cov_does_not_draw_what_the_gate_has_clipped():
    tokens, rule = spread_out(ratio=1.5), clip_cov(**{**LOOSE, "share": 1.0}, clip_high=0.2)
    is_candidate = (covariances(tokens) > 0.2) & (covariances(tokens) < 5)
    is_clipped = np.asarray(tokens.advantage_BT)[:, 0] > 0
    _, aux = loss_and_grad(rule, tokens, token_mean)[0]
    assert aux["covariance_share"].total == (is_candidate & ~is_clipped).sum() > 0


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 1), (1e-3, 1), (0.1, 40), (0.501, 200), (1, 400)]
)
def test_kl_cov_takes_the_highest_covariances(share, count):
    tokens = spread_out(ratio=1.5)
    bias = np.asarray(coefficient(kl_cov(share=share), tokens).bias_BT)[:, 0]
    expected = np.zeros(400)
    expected[np.argsort(-covariances(tokens))[:count]] = -1
    np.testing.assert_array_equal(bias, expected)


def test_the_first_update_of_kl_cov_is_reinforce():
    """sign(0) is 0, also of a difference of two log-probabilities that are the same number."""
    tokens, rule = spread_out(), kl_cov(share=0.5)
    tokens = dataclasses.replace(tokens, old_logp_BT=tokens.logp_BT)
    assert not np.any(coefficient(rule, tokens).bias_BT)
    ours, plain = (loss_and_grad(r, tokens, token_mean)[1] for r in (rule, reinforce()))
    np.testing.assert_array_equal(ours, plain)


def test_no_rounding_moves_a_token_across_the_threshold_of_kl_cov():
    tokens, rule = spread_out(ratio=1.5), kl_cov(share=0.1)
    stats = stats_of(rule, tokens)
    near = dataclasses.replace(tokens, logp_BT=tokens.logp_BT * (1 + 3e-7))
    found = [rule.coefficient(response_only(t), (), stats).bias_BT for t in (tokens, near)]
    np.testing.assert_array_equal(found[0], found[1])


def test_kl_cov_takes_ties_and_leaves_what_is_beyond_the_clamp():
    tokens = at_ratio(
        np.log([2.0, 2.0, 2.0, 2.0]), [1.0, 1.0, -1.0, -1.0], old_logp=[-1.0, -1, -9, -1]
    )
    bias = coefficient(kl_cov(share=0.25), tokens).bias_BT[:, 0]
    np.testing.assert_array_equal(bias, [0, 0, -1, 0])  # (-1) (-6), against 1 * 2 of two others
    bias = coefficient(kl_cov(share=0.5), tokens).bias_BT[:, 0]
    np.testing.assert_array_equal(bias, [-1, -1, -1, 0])
    far = at_ratio(np.array([25.0, 1.0]), [1.0, -1.0])
    np.testing.assert_array_equal(coefficient(kl_cov(share=1.0), far).bias_BT[:, 0], [0, -1])


# --- REAL ---------------------------------------------------------------------------------------


def answers(groups, advantage, log_ratio: Any = 0.0, lengths=None):
    """One answer a row, so many tokens long, of a group and an advantage each."""
    lengths = [2] * len(groups) if lengths is None else lengths
    tokens = jax.tree.map(
        lambda x: jnp.tile(x, (1, max(lengths))),
        at_ratio(np.broadcast_to(log_ratio, len(groups)), advantage),
    )
    is_response = np.arange(max(lengths)) < np.array(lengths)[:, None]
    group = np.tile(np.array(groups)[:, None], (1, max(lengths)))
    return dataclasses.replace(
        tokens, group_id_BT=jnp.asarray(group), is_response_BT=jnp.asarray(is_response)
    )


def test_real_by_hand():
    """A group of two right and one wrong, one of right answers alone, one of one and one."""
    tokens = answers([0, 0, 0, 1, 2, 2], [1.0, 3, -1, 1, 1, 0], lengths=[1, 2, 3, 3, 2, 1])
    bias = np.asarray(coefficient(real(), tokens).bias_BT)[:, 0]
    size = 6 / 3 / 0.5  # answers per group, over tau
    expected = size * np.array([1 / 3, 1 / 3, -1 / 2, 0, 1 / 2, -1 / 2])
    np.testing.assert_allclose(bias, expected, rtol=1e-6)
    (_, aux), _ = loss_and_grad(real(), tokens, sequence_mean)
    value = (np.log(3) + np.log(2) + 0 + 2 * np.log(2)) / 3
    np.testing.assert_allclose(aux["surrogate"].total, value, rtol=1e-6)


def test_real_of_moved_answers():
    tokens = answers([3, 3], [1.0, -1.0], log_ratio=np.array([0.1, 0.3]))
    right, wrong = np.exp(-0.1 / 0.5), np.exp(0.3 / 0.5)
    bias = np.asarray(coefficient(real(), tokens).bias_BT)[:, 0]
    expected = 4 * np.array([right / (1 + right), -wrong / (1 + wrong)])
    np.testing.assert_allclose(bias, expected, rtol=1e-5)


def test_a_group_beyond_the_table_spoils_the_update_and_is_not_passed_over():
    tokens = answers([0, 99], [1.0, -1.0])
    _, grad = loss_and_grad(real(), tokens, sequence_mean)
    assert np.isfinite(grad[0]).all() and np.isnan(grad[1]).all()


# --- Archer -------------------------------------------------------------------------------------


def test_archer_gives_uncertain_tokens_more_room_and_no_penalty():
    log_ratio = np.log(np.full(10, 1.3))
    row = jax.tree.map(lambda x: x.T, at_ratio(log_ratio, 1.0))
    row = dataclasses.replace(row, entropy_BT=jnp.arange(10.0)[None])
    found = coefficient(archer(), row)
    np.testing.assert_allclose(found.weight_BT[0], [0] * 8 + [1.3] * 2, rtol=1e-6)
    pull = 1e-3 * (1 - 1 / 1.3)
    np.testing.assert_allclose(found.bias_BT[0], [-pull] * 8 + [0] * 2, rtol=1e-4)


# --- statistics of each micro-batch --------------------------------------------------------------


@pytest.mark.parametrize("rule", [bapo(), kl_cov(share=0.3), real(), chain(hapo(), p3o())])
def test_per_microbatch_is_the_rule_on_its_own_tokens(rule):
    tokens = one_per_row(sequences(3, spread=0.4))
    own = per_microbatch(rule)
    assert own.prepare is None
    for part in (tokens, jax.tree.map(lambda x: x[:3], tokens)):
        expected = loss_and_grad(rule, part, token_mean)
        jax.tree.map(np.testing.assert_array_equal, loss_and_grad(own, part, token_mean), expected)


def test_per_microbatch_leaves_other_rules_and_refuses_a_state():
    plain = aspo()
    assert per_microbatch(plain) is plain
    with pytest.raises(ValueError, match="per_microbatch: the rule has a state"):
        per_microbatch(chain(aspo(), clip_cov()))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bapo", {"share": 1.5}, "bapo.share = 1.5; expected a number from 0 to 1"),
        ("bapo", {"ratio_min_start": 0.95}, "bapo.ratio_min_start = 0.95; expected at most ratio"),
        ("bapo", {"ratio_max_start": 0.5}, "bapo.ratio_max_start = 0.5; expected a ratio from 1"),
        ("bapo", {"ratio_max_end": 1.1}, "bapo.ratio_max_start = 1.2; .* ratio_max_end = 1.1"),
        ("bapo", {"ratio_max_end": float("inf")}, "ratio_max_end = inf, which is finite"),
        ("bapo", {"step": 0.0}, "bapo.step = 0.0; expected a number > 0"),
        ("bapo", {"dual_cap": 1.0}, "bapo.dual_cap = 1.0; expected a ratio above 1"),
        ("hapo", {"quantile": 80}, "hapo.quantile = 80; expected a number from 0 to 1"),
        ("hapo", {"clip_low": 2.0}, "hapo.clip_low = 2.0"),
        ("hapo", {"dual_cap": float("nan")}, "hapo.dual_cap = nan"),
        ("p3o", {"anchor": "ref"}, "p3o.anchor = 'ref'; expected one of"),
        ("real", {"tau": 0.0}, "real.tau = 0.0; expected a number > 0"),
        ("clip_cov", {"share": -1e-4}, "clip_cov.share = -0.0001"),
        ("clip_cov", {"covariance_min": 5.0}, "clip_cov.covariance_min = 5.0; expected a number"),
        ("clip_cov", {"clip_low": 1.1}, "clip_cov.clip_low = 1.1"),
        ("kl_cov", {"share": 2.0}, "kl_cov.share = 2.0"),
        ("kl_cov", {"beta": -1.0}, "kl_cov.beta = -1.0"),
        ("archer", {"clip_high_entropy": 1.5}, "archer.clip_high_entropy = 1.5"),
    ],
)
def test_wrong_hyper_parameters_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**arguments)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (hapo(), "entropy_BT"),
        (archer(), "entropy_BT"),
        (p3o(), "sampler_logp_BT"),
        (real(), "group_id_BT"),
        (clip_cov(), "sampler_logp_BT"),
        (clip_cov(), "group_id_BT"),
        (clip_cov(), "position_BT"),
    ],
)
def test_a_field_that_is_missing_is_named(rule, field):
    tokens = dataclasses.replace(random_tokens(0), **{field: None})
    with pytest.raises(ValueError, match=f"needs Tokens.{field}"):
        coefficient(rule, tokens)
