"""Random sequences for the tests of the losses, laid out in rows in several ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax.losses import policy_loss
from aspo_jax.structs import Tokens

FLOATS = (
    "logp_BT",
    "old_logp_BT",
    "advantage_BT",
    "entropy_BT",
    "ref_logp_BT",
)
GARBAGE = (np.nan, np.inf, -np.inf, 1e30)


def sequences(seed, count=6, longest=14, spread=0.3, zero_share=0.0):
    """A list of dicts of ``[L]`` arrays, one advantage per sequence; prompts and holes included."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        n = int(rng.integers(5, longest + 1))
        logp = -rng.exponential(1.0, n)
        is_response = np.arange(n) >= rng.integers(0, 3)
        is_response[n // 2] = rng.random() < 0.5
        is_response[-1] = True
        advantage = (1.0 if i % 2 else -1.0) * rng.uniform(0.2, 2.0)
        out.append(
            {
                "logp_BT": logp,
                "old_logp_BT": logp - rng.normal(0, spread, n),
                "ref_logp_BT": logp - rng.normal(0, spread, n),
                "entropy_BT": rng.exponential(1.0, n),
                "advantage_BT": np.full(n, 0.0 if rng.random() < zero_share else advantage),
                "is_response_BT": is_response,
            }
        )
    return out


def lay_out(seqs, bins, length, *, with_ids=True, garbage=True, dtype: Any = np.float32):
    """Rows of ``length`` tokens; ``bins[b]`` lists the sequences of row b in order."""
    rows = {name: np.zeros((len(bins), length)) for name in FLOATS}
    rows["is_response_BT"] = np.zeros((len(bins), length), bool)
    ids = np.zeros((len(bins), length), np.int32)
    for b, members in enumerate(bins):
        at = 0
        for number, i in enumerate(members, start=1):
            n = len(seqs[i]["logp_BT"])
            for name, array in rows.items():
                array[b, at : at + n] = seqs[i][name]
            ids[b, at : at + n] = number
            at += n
    if garbage:
        masked = np.flatnonzero(~rows["is_response_BT"])
        for k, name in enumerate(FLOATS):
            rows[name].flat[masked] = np.resize(np.roll(GARBAGE, k), len(masked))
    fields = {k: jnp.asarray(v, bool if v.dtype == bool else dtype) for k, v in rows.items()}
    return Tokens(**fields, sequence_id_BT=jnp.asarray(ids) if with_ids else None)


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


def loss_and_grad(objective, tokens, aggregate, totals=None, sums=None):
    """``(loss, aux), d loss / d logp_BT`` of `policy_loss`; not jitted, compiling is the cost."""

    def loss(logp_BT):
        own = dataclasses.replace(tokens, logp_BT=logp_BT)
        return policy_loss(objective, own, aggregate=aggregate, totals=totals, sums=sums)

    return jax.value_and_grad(loss, has_aux=True)(tokens.logp_BT)


def token_sum(tokens, totals):
    """The aggregate of the plain sum."""
    return tokens.is_response_BT.astype(tokens.logp_BT.dtype)


def at_ratio(log_ratio, advantage, dtype: Any = jnp.float32):
    """One row per (log-ratio, advantage) pair, one token each."""
    log_ratio, advantage = np.broadcast_arrays(log_ratio, advantage)
    shape = (log_ratio.size, 1)
    return Tokens(
        logp_BT=jnp.asarray(log_ratio.reshape(shape), dtype),
        old_logp_BT=jnp.zeros(shape, dtype),
        advantage_BT=jnp.asarray(advantage.reshape(shape), dtype),
        is_response_BT=jnp.ones(shape, bool),
        entropy_BT=jnp.ones(shape, dtype),
        ref_logp_BT=jnp.zeros(shape, dtype),
    )


def weight(objective, tokens):
    """The rule's weight, ``[B, T]``."""
    return np.asarray(objective.coefficient(tokens, objective.init(), None).weight_BT)


def assert_trees_close(x, y, **tolerance):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)
