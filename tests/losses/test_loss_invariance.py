"""Masking, packing, and splitting into micro-batches change nothing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from laws import LAWS
from loss_cases import assert_trees_close, lay_out, loss_and_grad, one_per_row, sequences

from aspo_jax.losses import (
    OBJECTIVES,
    Coefficient,
    Objective,
    aspo,
    chain,
    count_totals,
    entropy_bonus,
    fixed_length,
    is_low_entropy,
    low_entropy_kl,
    policy_loss,
    response_only,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from aspo_jax.losses.segment import segment_mean
from aspo_jax.structs import Histogram, Max, empty_metrics, merge_metrics

RULES = {name: law.rule for name, law in LAWS.items()}
RULES["chained"] = chain(aspo(), low_entropy_kl(0.1))
AGGREGATES = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "fixed_length": fixed_length(16),
}
TOLERANCE: dict[str, Any] = dict(rtol=2e-5, atol=2e-6)
every_rule = pytest.mark.parametrize("rule", RULES)
# No rule knows its aggregate: each is tried with one, and all of them with some rules.
every_pair = pytest.mark.parametrize(
    ("rule", "aggregate"),
    [(rule, "sequence_mean") for rule in RULES]
    + [(rule, name) for rule in ("aspo", "chained") for name in AGGREGATES if "_mean" not in name]
    + [(rule, "token_mean") for rule in ("aspo", "chained")],
)


def by_sequence(grad_BT, bins, seqs):
    """Undo a layout: the gradient of each sequence, in order."""
    parts = {}
    for row, members in zip(np.asarray(grad_BT), bins, strict=True):
        at = 0
        for i in members:
            n = len(seqs[i]["logp_BT"])
            parts[i] = row[at : at + n]
            at += n
    return np.concatenate([parts[i] for i in range(len(seqs))])


@every_pair
def test_packing(rule, aggregate):
    seqs = sequences(0, spread=0.4)
    alone = [[i] for i in range(6)]
    packed = [[5, 0, 3], [1, 4], [2]]
    results = []
    for bins, length, with_ids in [(alone, 16, False), (alone, 16, True), (packed, 48, True)]:
        tokens = lay_out(seqs, bins, length, with_ids=with_ids)
        result, grad = loss_and_grad(RULES[rule], tokens, AGGREGATES[aggregate])
        results.append((result, by_sequence(grad, bins, seqs)))
        assert not np.any(np.asarray(grad)[~np.asarray(tokens.is_response_BT)])
    for other in results[1:]:
        assert_trees_close(results[0], other, **TOLERANCE)


@every_pair
def test_micro_batches_add_up(rule, aggregate):
    objective = RULES[rule]
    tokens = one_per_row(sequences(1, spread=0.4))
    (loss, aux), grad = loss_and_grad(objective, tokens, AGGREGATES[aggregate])
    parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], tokens) for i in range(3)]
    totals = add_up([count_totals(part) for part in parts])
    stats = None
    if objective.prepare:
        stats = objective.prepare(response_only(tokens), objective.init())
    results = [loss_and_grad(objective, p, AGGREGATES[aggregate], totals, stats) for p in parts]
    merged = empty_metrics(aux)
    for (_, part_aux), _ in results:
        merged = merge_metrics(merged, part_aux)
    np.testing.assert_allclose(sum(r[0][0] for r in results), loss, **TOLERANCE)
    np.testing.assert_allclose(np.concatenate([r[1] for r in results]), grad, **TOLERANCE)
    assert_trees_close(merged, dict(aux), **TOLERANCE)
    np.testing.assert_allclose(aux["surrogate"].count, 1)


def add_up(trees):
    return jax.tree.map(lambda *xs: sum(xs), *trees)


@every_rule
def test_masked_garbage_changes_nothing(rule):
    seqs = sequences(2)
    clean, spoilt = (one_per_row(seqs, garbage=g) for g in (False, True))
    assert not np.isfinite(np.asarray(spoilt.logp_BT)).all()
    a, b = (loss_and_grad(RULES[rule], t, sequence_mean) for t in (clean, spoilt))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.any(np.asarray(b[1])[~np.asarray(spoilt.is_response_BT)])


def test_what_a_rule_says_about_masked_tokens_is_ignored():
    def coefficient(tokens, state, stats):
        spoilt_BT = jnp.where(tokens.is_response_BT, 1.0, jnp.nan)
        return Coefficient(spoilt_BT, spoilt_BT, {}, spoilt_BT)

    result = loss_and_grad(Objective(coefficient), one_per_row(sequences(2)), token_mean)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))


def test_no_response_token_at_all_gives_zero():
    tokens = one_per_row(sequences(2))
    tokens = dataclasses.replace(tokens, is_response_BT=jnp.zeros_like(tokens.is_response_BT))
    (loss, aux), grad = loss_and_grad(RULES["chained"], tokens, sequence_mean)
    assert loss == 0 and not np.any(grad)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(aux))


@pytest.mark.parametrize("rule", [name for name in RULES if name in OBJECTIVES])
def test_jit_and_vmap_change_nothing(rule):
    both = [one_per_row(sequences(seed, spread=0.4)) for seed in (3, 4)]
    plain = [loss_and_grad(RULES[rule], tokens, sequence_mean) for tokens in both]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *both)
    mapped = jax.vmap(lambda t: loss_and_grad(RULES[rule], t, sequence_mean))
    found = quickly(mapped, stacked)
    assert_trees_close(jax.tree.map(lambda *xs: jnp.stack(xs), *plain), found, **TOLERANCE)


def quickly(function, *arguments):
    """Called as one program, compiled without optimization: that is most of the time here."""
    options: Any = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(options)(*arguments)


COUPLED = [name for name, rule in RULES.items() if rule.prepare]


@pytest.mark.parametrize("rule", [*COUPLED, "aspo", "gspo"])
def test_the_devices_that_share_the_rows_change_nothing(rule):
    """Neither the statistics of the mini-batch nor its gradient."""
    objective = RULES[rule]
    tokens = lay_out(sequences(5, spread=0.4), [[0], [1, 4], [2, 5], [3]], 32)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    shared = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("rows")))

    def update(tokens):
        stats = None
        if objective.prepare:
            stats = objective.prepare(response_only(tokens), objective.init())
        return stats, loss_and_grad(objective, tokens, sequence_mean, stats=stats)

    alone, on_four = quickly(update, tokens), quickly(update, shared)
    assert len(on_four[1][1].sharding.device_set) == 4
    assert_trees_close(alone, on_four, **TOLERANCE)


def test_entropy_bonus_adds_up():
    tokens = one_per_row(sequences(4))
    totals = count_totals(tokens)
    whole = entropy_bonus(tokens, scale=0.3, aggregate=sequence_mean)[0]
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], tokens) for i in range(6)]
    split = [entropy_bonus(p, scale=0.3, aggregate=sequence_mean, totals=totals)[0] for p in parts]
    np.testing.assert_allclose(sum(split), whole, rtol=1e-5)


def test_sequence_mean_is_the_mean_of_the_responses_token_means():
    tokens = one_per_row(sequences(6), garbage=False)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], tokens) for i in range(6)]
    means = [policy_loss(aspo(), row, aggregate=token_mean)[0] for row in rows]
    whole = policy_loss(aspo(), tokens, aggregate=sequence_mean)[0]
    np.testing.assert_allclose(np.mean(means), whole, rtol=1e-5)


def test_counts_go_through_leading_axes_and_skip_empty_sequences():
    seqs = sequences(7)
    seqs[3]["is_response_BT"][:] = False
    tokens = lay_out(seqs, [[0, 1, 2], [3, 4, 5]], 48)
    stacked = jax.tree.map(lambda x: x[:, None], tokens)
    expected = sum(s["is_response_BT"].sum() for s in seqs)
    for counted in (count_totals(tokens), count_totals(stacked)):
        assert counted == (expected, 5)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.8, 1.0])
def test_the_entropy_quantile_is_numpys_per_sequence(quantile):
    seqs = sequences(8, count=7)
    bins = [[0, 1, 2], [3, 4], [5, 6]]
    tokens = lay_out(seqs, bins, 48)
    is_low = is_low_entropy(quantile)(tokens)
    found = by_sequence(is_low, bins, seqs)
    expected = np.concatenate(
        [
            s["entropy_BT"]
            <= np.quantile(s["entropy_BT"][s["is_response_BT"]], quantile) * (1 + 1e-6)
            for s in seqs
        ]
    )
    mask = np.concatenate([s["is_response_BT"] for s in seqs])
    np.testing.assert_array_equal(found[mask], expected[mask])


def test_segment_mean_counts_response_tokens_of_its_own_sequence_only():
    seqs = sequences(9, count=3)
    tokens = lay_out(seqs, [[0, 1, 2]], 48)
    found = by_sequence(segment_mean(tokens.logp_BT, tokens), [[0, 1, 2]], seqs)
    expected = [np.full(len(s["logp_BT"]), s["logp_BT"][s["is_response_BT"]].mean()) for s in seqs]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)


def test_kinds_of_metrics():
    _, aux = policy_loss(aspo(), one_per_row(sequences(0)), aggregate=token_mean)
    assert isinstance(aux["abs_log_ratio_max"], Max)
    assert isinstance(aux["weight_positive"], Histogram)
