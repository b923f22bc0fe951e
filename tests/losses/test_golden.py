"""Parity with numbers produced by the public reference implementation (Archer2.0, float64)."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import loss_and_grad, token_sum

from aspo_jax.losses import (
    archer,
    archer2,
    aspo,
    chain,
    dapo,
    fixed_length,
    group_mean,
    group_zscore,
    is_low_entropy,
    kl_penalty,
    low_entropy_kl,
    ppo_clip,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from aspo_jax.structs import Tokens

GOLDEN = np.load(Path(__file__).with_name("golden_aspo.npz"))
CASES = range(int(GOLDEN["n_cases"]))
# The reference adds 1e-8 to token counts, which is 1e-8 relative for a one-token response.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float64": dict(rtol=1e-9, atol=1e-12),
    "float32": dict(rtol=2e-5, atol=2e-6),
}

RULES = {
    "aspo_code": archer2(),
    "aspo_paper": aspo(),
    "ppo_02_02_c3": ppo_clip(0.2, 0.2, 3.0, dual_clip="hard"),
    "ppo_02_028_c10": dapo(),
    "archer1_02_05_c10": archer(beta_low_entropy=0.0),
}
AGGREGATES = {
    "token-mean": token_mean,
    "seq-mean-token-sum": sequence_sum,
    "seq-mean-token-mean": sequence_mean,
    "mb1": sequence_mean,
    "seq-mean-token-sum-norm": fixed_length(24),
}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(params=CASES)
def case(request):
    return lambda name: GOLDEN[f"c{request.param}__{name}"]


def golden_tokens(case, dtype):
    def array(name):
        return jnp.asarray(case(name), dtype)

    return Tokens(
        logp_BT=array("log_prob"),
        old_logp_BT=array("old_log_prob"),
        advantage_BT=array("advantages"),
        is_response_BT=jnp.asarray(case("response_mask"), bool),
        entropy_BT=array("entropy"),
        ref_logp_BT=array("ref_log_prob"),
    )


def close(actual, expected, precision, **override):
    np.testing.assert_allclose(actual, expected, **(PRECISIONS[precision] | override))


def test_entropy_split(case, precision):
    tokens = golden_tokens(case, precision)
    is_low = np.asarray(is_low_entropy(0.8)(tokens))
    mask = case("response_mask") > 0
    np.testing.assert_array_equal(is_low & mask, case("low_entropy_mask"))
    np.testing.assert_array_equal(~is_low & mask, case("high_entropy_mask"))


@pytest.mark.parametrize("rule", RULES)
def test_token_gradient_and_value(case, precision, rule):
    tokens = golden_tokens(case, precision)
    (_, aux), grad = loss_and_grad(RULES[rule], tokens, token_sum)
    close(grad, case(f"{rule}__token_grad"), precision)
    value = (case(f"{rule}__token_loss") * case("response_mask")).sum()
    close(aux["surrogate"].total, value, precision)


@pytest.mark.parametrize("rule", ["aspo_code", "aspo_paper"])
def test_aspo_weight_and_shares(case, precision, rule):
    tokens = golden_tokens(case, precision)
    coefficient = RULES[rule].coefficient(tokens, RULES[rule].init(), None)
    is_used = (case("response_mask") > 0) & (case("advantages") != 0)
    close(np.where(is_used, coefficient.weight_BT, 0), case(f"{rule}__token_weight"), precision)
    (_, aux), _ = loss_and_grad(RULES[rule], tokens, token_mean)
    for ours, theirs in [("positive", "pos"), ("negative", "neg")]:
        share = aux[f"cap_share_{ours}"]
        share_close(share.total / share.count, case(f"{rule}__clipfrac_dual_{theirs}"))
    # Upstream counts A = 0 tokens as clipped from above; here only tokens that carry a signal.
    count = case("response_mask").sum()
    share_close(aux["clip_share_negative"].total / count, case(f"{rule}__clipfrac_lower"))
    if not ((case("advantages") == 0) & (case("response_mask") > 0)).any():
        share_close(aux["clip_share_positive"].total / count, case(f"{rule}__clipfrac_upper"))


share_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_kl_estimators(case, precision, estimator):
    tokens = golden_tokens(case, precision)
    (_, aux), grad = loss_and_grad(KL_ONLY[estimator], tokens, token_sum)
    close(grad, case(f"kl_{estimator}__token_grad"), precision)
    kl = aux["ref_kl"]
    close(kl.total / kl.count, case(f"kl_{estimator}__token_mean"), precision)


def kl_only(beta, estimator):
    """A KL penalty whose (unit) weight meets no advantage."""
    penalty = kl_penalty(beta, estimator)

    def coefficient(tokens, state, stats):
        rule = penalty.coefficient(tokens, state, stats)
        return rule._replace(weight_BT=jnp.zeros_like(rule.weight_BT))

    return penalty._replace(coefficient=coefficient)


KL_ONLY = {name: kl_only(1.0, name) for name in ("k1", "abs", "k2", "k3")}
UNIFORM_KL = chain(archer2(), kl_penalty(1e-3))
SPLIT_KL = chain(
    archer2(),
    low_entropy_kl(1e-3),
    kl_penalty(0.0, where=lambda tokens: ~is_low_entropy()(tokens), metric="high_entropy_kl"),
)


def test_uniform_kl_total(case, precision):
    tokens = golden_tokens(case, precision)
    (_, aux), grad = loss_and_grad(UNIFORM_KL, tokens, token_mean)
    close(grad, case("total_uniform_kl__grad"), precision)
    close(aux["surrogate"].total, case("total_uniform_kl__loss"), precision)


def test_split_kl_total(case, precision):
    tokens = golden_tokens(case, precision)
    (_, aux), grad = loss_and_grad(SPLIT_KL, tokens, token_mean)
    close(grad, case("total_split_kl__grad"), precision)
    close(aux["surrogate"].total, case("total_split_kl__loss"), precision)
    for name, key in [("ref_kl", "low"), ("high_entropy_kl", "high")]:
        kl = aux[name]
        close(kl.total / kl.count, case(f"kl_{key}_entropy__token_mean"), precision)


def test_grpo_advantages(case):
    """Groups are gathered into [P, G] with invalid samples filling the gaps."""
    uid, reward = case("grpo_uid"), case("grpo_reward")
    group = 1 + max(np.bincount(uid))
    rewards, is_valid = np.full((5, group), np.nan), np.zeros((5, group), bool)
    slot = np.array([(uid[:i] == u).sum() for i, u in enumerate(uid)])
    rewards[uid, slot], is_valid[uid, slot] = reward, True
    for advantage, key in [(group_zscore(), "grpo_adv_std"), (group_mean(), "grpo_adv_nostd")]:
        ours = np.asarray(advantage(rewards, is_valid))
        expected = case(key)[:, 0]  # the first of a response's tokens is never masked
        np.testing.assert_allclose(ours[uid, slot], expected, rtol=2e-5, atol=2e-6)
        assert (ours[~is_valid] == 0).all()


def test_padding_of_the_golden_rows_is_garbage_and_changes_nothing(case):
    tokens = golden_tokens(case, "float32")
    hidden = ~tokens.is_response_BT
    spoilt = jax.tree.map(lambda x: x if x.dtype == bool else jnp.where(hidden, jnp.nan, x), tokens)
    spoilt = dataclasses.replace(spoilt, is_response_BT=tokens.is_response_BT)
    a, b = (loss_and_grad(SPLIT_KL, t, sequence_mean) for t in (tokens, spoilt))
    jax.tree.map(np.testing.assert_array_equal, a, b)
