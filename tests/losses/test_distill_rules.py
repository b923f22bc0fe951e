"""Distillation by hand: which way it pushes, what gates it, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import at_ratio, coefficient, loss_and_grad, random_tokens

from aspo_jax.losses import OBJECTIVES, chain, distill, grpo, reads, token_mean, with_teacher, zero
from aspo_jax.structs import Tokens


def tokens_of(teacher: list[float], advantage: Any = 0.0, log_ratio: Any = 0.0) -> Tokens:
    """One token a row: the old policy says -1 nat, the teacher as given."""
    rows = at_ratio(np.broadcast_to(log_ratio, len(teacher)), advantage, old_logp=-1.0)
    return dataclasses.replace(rows, teacher_logp_BT=jnp.asarray(teacher)[:, None])


def test_tokens_that_the_teacher_likes_better_are_pushed_up():
    tokens = tokens_of([-0.5, -3.0, -1.0])
    (_, aux), grad = loss_and_grad(distill(coef=2.0), tokens, token_mean)
    np.testing.assert_allclose(grad[:, 0], -2 * np.array([0.5, -2.0, 0.0]) / 3)
    total, count = aux["teacher_kl"]
    np.testing.assert_allclose(total / count, (-0.5 + 2.0) / 3)


def test_its_expectation_is_the_gradient_of_the_divergence():
    """Over every token of a small vocabulary, weighed as the policy itself would draw them."""
    rng = np.random.default_rng(0)
    z_V, teacher_V = (jnp.asarray(rng.normal(size=7), jnp.float32) for _ in range(2))
    teacher_V = jax.nn.log_softmax(teacher_V)

    def divergence(z_V):
        logp_V = jax.nn.log_softmax(z_V)
        return jnp.sum(jnp.exp(logp_V) * (logp_V - teacher_V))

    def expected_loss(z_V):
        logp_V = jax.nn.log_softmax(z_V)
        tokens = dataclasses.replace(
            at_ratio(np.zeros(7), 0.0), teacher_logp_BT=teacher_V[:, None], logp_BT=logp_V[:, None]
        )
        b_V = coefficient(distill(), tokens).bias_BT[:, 0]
        return -jnp.sum(jax.lax.stop_gradient(jnp.exp(logp_V) * b_V) * logp_V)

    np.testing.assert_allclose(jax.grad(expected_loss)(z_V), jax.grad(divergence)(z_V), atol=1e-6)


def test_chained_it_is_not_gated_and_inside_it_is():
    """A wrong answer's token beyond the clip range, which the teacher likes 3 nats better."""
    tokens = tokens_of([2.0], advantage=-1.0, log_ratio=0.5)
    beside = coefficient(chain(grpo(), distill()), tokens)
    np.testing.assert_allclose(beside.weight_BT, np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(beside.bias_BT, 2.5)
    inside = coefficient(with_teacher(grpo()), tokens)  # A + 3 = 2 > 0: already far enough
    assert inside.weight_BT == 0 and inside.bias_BT == 0
    less = coefficient(with_teacher(grpo(), coef=0.1), tokens)  # A + 0.3 < 0: the rule as it is
    np.testing.assert_allclose(less.weight_BT, np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(less.bias_BT, 0.3 * np.exp(0.5), rtol=1e-6)


def test_a_rule_inside_prepares_from_the_sum():
    seen = {}

    def prepare(tokens, state):
        seen["advantage"] = tokens.advantage_BT
        return state

    rule = grpo()._replace(prepare=prepare)
    tokens = tokens_of([-0.5, -3.0], advantage=1.0)
    coefficient(with_teacher(rule, coef=2.0), tokens)
    np.testing.assert_allclose(seen["advantage"][:, 0], [2.0, -3.0])
    assert with_teacher(grpo()).prepare is None


@pytest.mark.parametrize("rule", [distill(floor=-7.0), with_teacher(grpo(), floor=-7.0)])
def test_what_the_teacher_excludes_is_floored(rule):
    found = coefficient(rule, tokens_of([-np.inf, -8.0, -6.0], advantage=-1.0))
    np.testing.assert_allclose(found.bias_BT[:, 0], [-6.0, -6.0, -5.0])
    total, count = found.metrics["teacher_kl"]
    np.testing.assert_allclose(total / count, 17 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (distill(), {"teacher_logp_BT"}),
        (distill(anchor="sampler"), {"teacher_logp_BT", "sampler_logp_BT"}),
        (distill(ratio="sampler"), {"teacher_logp_BT", "sampler_logp_BT"}),
        (with_teacher(grpo()), {"teacher_logp_BT"}),
        (with_teacher(grpo(), anchor="sampler"), {"teacher_logp_BT", "sampler_logp_BT"}),
    ],
)
def test_what_is_read(rule, fields):
    optional = {"teacher_logp_BT", "sampler_logp_BT", "ref_logp_BT", "entropy_BT"}
    assert {field for field in optional if reads(rule, field)} == fields


@pytest.mark.parametrize("estimator", ["k2", "k3", "k1_loss"])
def test_other_estimators_are_refused_with_the_reason(estimator):
    with pytest.raises(ValueError, match=rf"distill.estimator = '{estimator}'.*push"):
        distill(estimator=estimator)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: distill(coef=-1.0), r"distill.coef = -1.0; expected a number >= 0"),
        (
            lambda: OBJECTIVES["distill"](anchor="reference"),
            r"distill.anchor = 'reference'; expected one of",
        ),
        (
            lambda: OBJECTIVES["distill"](ratio="current"),
            r"distill.ratio = 'current'; expected one of",
        ),
        (lambda: distill(floor=0.0), r"distill.floor = 0.0; expected a finite number"),
        (lambda: distill(floor=float("-inf")), r"distill.floor = -inf; expected a finite number"),
        (lambda: with_teacher(grpo(), coef=-1.0), r"with_teacher.coef = -1.0"),
        (lambda: with_teacher(grpo(), floor=float("nan")), r"with_teacher.floor = nan"),
    ],
)
def test_wrong_hyper_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_zero_teaches_nothing():
    tokens = random_tokens(0)
    advantage_PG = zero()(np.array([[1.0, 0.0], [np.nan, 2.0]]), np.array([[1, 1], [0, 1]], bool))
    assert advantage_PG.dtype == jnp.float32 and not np.any(advantage_PG)
    still = dataclasses.replace(
        tokens, teacher_logp_BT=tokens.logp_BT, advantage_BT=0 * tokens.logp_BT
    )
    _, grad = loss_and_grad(distill(), still, token_mean)
    assert not np.any(grad)
