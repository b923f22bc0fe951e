"""Random sequences for the tests of the losses, laid out in rows in several ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax.losses import coefficient_of, policy_loss, response_only
from aspo_jax.structs import Tokens

POLICIES = ("logp_BT", "old_logp_BT", "sampler_logp_BT", "ref_logp_BT", "teacher_logp_BT")
FLOATS = (*POLICIES, "advantage_BT", "entropy_BT", "old_entropy_BT", "old_square_BT")
INTEGERS = ("sequence_id_BT", "position_BT", "group_id_BT")
GARBAGE = (np.nan, np.inf, -np.inf, 1e30)


def sequences(seed, count=6, longest=14, spread=0.3, zero_share=0.0):
    """A list of dicts of ``[L]`` arrays, one advantage per sequence; prompts and holes included.

    Log-probabilities are negative and differ by about ``spread`` nats between the policies.
    """
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        n = int(rng.integers(5, longest + 1))
        common = -rng.exponential(1.0, n)
        is_response = np.arange(n) >= rng.integers(0, 3)
        is_response[n // 2] = rng.random() < 0.5
        is_response[-1] = True
        advantage = (1.0 if i % 2 else -1.0) * rng.uniform(0.2, 2.0)
        out.append(
            {
                **{name: common - np.abs(rng.normal(0, spread, n)) for name in POLICIES},
                "entropy_BT": rng.exponential(1.0, n),
                "old_entropy_BT": rng.exponential(1.0, n),
                "old_square_BT": np.exp(2 * common) + rng.random(n) * (1 - np.exp(common)) ** 2,
                "advantage_BT": np.full(n, 0.0 if rng.random() < zero_share else advantage),
                "is_response_BT": is_response,
                "position_BT": np.maximum(np.cumsum(is_response) - 1, 0),
                "group_id_BT": np.full(n, i // 3),
            }
        )
    return out


def lay_out(seqs, bins, length, *, with_ids=True, garbage=True, dtype: Any = np.float32):
    """Rows of ``length`` tokens; ``bins[b]`` lists the sequences of row b in order."""
    shape = (len(bins), length)
    rows: dict[str, Any] = {name: np.zeros(shape, dtype) for name in FLOATS}
    rows |= {name: np.zeros(shape, np.int32) for name in INTEGERS}
    rows["is_response_BT"] = np.zeros(shape, bool)
    for b, members in enumerate(bins):
        at = 0
        for number, i in enumerate(members, start=1):
            n = len(seqs[i]["logp_BT"])
            for name, value in {**seqs[i], "sequence_id_BT": number}.items():
                rows[name][b, at : at + n] = value
            at += n
    if garbage:
        masked = np.flatnonzero(~rows["is_response_BT"])
        for k, name in enumerate(FLOATS):
            rows[name].flat[masked] = np.resize(np.roll(GARBAGE, k), len(masked))
    if not with_ids:
        rows["sequence_id_BT"] = None
    return Tokens(**jax.tree.map(jnp.asarray, rows))


def one_per_row(seqs, length=16, **how):
    return lay_out(seqs, [[i] for i in range(len(seqs))], length, **how)


def random_tokens(seed, *, spread=0.3, per_token=False, dtype: Any = np.float32, count=6):
    """One sequence per row, clean padding; ``per_token`` draws an advantage for each token."""
    tokens = one_per_row(
        sequences(seed, count, spread=spread), with_ids=False, garbage=False, dtype=dtype
    )
    if not per_token:
        return tokens
    rng = np.random.default_rng(seed)
    advantage = rng.normal(size=tokens.logp_BT.shape) * (rng.random(tokens.logp_BT.shape) < 0.8)
    return dataclasses.replace(tokens, advantage_BT=jnp.asarray(advantage, dtype))


def loss_and_grad(objective, tokens, aggregate, totals=None, stats=None):
    """``(loss, aux), d loss / d logp_BT`` of `policy_loss`; not jitted, compiling is the cost."""

    def loss(logp_BT):
        own = dataclasses.replace(tokens, logp_BT=logp_BT)
        return policy_loss(objective, own, aggregate=aggregate, totals=totals, stats=stats)

    return jax.value_and_grad(loss, has_aux=True)(tokens.logp_BT)


def token_sum(tokens, totals):
    """The aggregate of the plain sum."""
    return tokens.is_response_BT.astype(tokens.logp_BT.dtype)


def at_ratio(log_ratio, advantage, dtype: Any = jnp.float32, old_logp: Any = 0.0):
    """One row per (log-ratio, advantage) pair, one token each; each other policy is the old one."""
    log_ratio, advantage, old = np.broadcast_arrays(log_ratio, advantage, old_logp)
    old, advantage, logp = (
        jnp.asarray(x.reshape(-1, 1), dtype) for x in (old, advantage, old + log_ratio)
    )
    ones = jnp.ones_like(old)
    zeros = jnp.zeros(old.shape, jnp.int32)
    return Tokens(
        **{name: old for name in POLICIES} | {"logp_BT": logp},
        **dict.fromkeys(("entropy_BT", "old_entropy_BT", "old_square_BT"), ones),
        advantage_BT=advantage,
        is_response_BT=jnp.ones(old.shape, bool),
        position_BT=zeros,
        group_id_BT=zeros,
    )


def coefficient(objective, tokens) -> Any:
    """What the rule says of tokens that are the whole mini-batch."""
    return coefficient_of(objective, response_only(tokens))


def weight(objective, tokens):
    """The rule's weight, ``[B, T]``."""
    return np.asarray(coefficient(objective, tokens).weight_BT)


def assert_trees_close(x, y, **tolerance):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)
