"""How tokens are averaged: an aggregate gives each token its share ``a_BT`` of the loss.

    loss = - sum_t a_t c_t log pi(y_t)

An aggregate is a function ``(tokens, totals) -> a_BT``, zero on masked tokens. ``totals`` are the
counts of the whole optimizer mini-batch: with them the losses of its parts add up to the loss of
the whole, however it was split, packed or sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.segment import lengths_per_sequence, segment_count
from aspo_jax.structs import Rows, Tokens


class Totals(NamedTuple):
    """What a mini-batch is divided by; float32 scalars. Totals of disjoint parts add up."""

    tokens: Array  # response tokens
    sequences: Array  # sequences with at least one response token


Aggregate = Callable[[Tokens, Totals], Array]


def count_totals(tokens: Tokens | Rows) -> Totals:
    """Count response tokens and the sequences that have any; leading axes are counted through."""
    length_BN = lengths_per_sequence(tokens)
    return Totals(length_BN.sum(), (length_BN > 0).sum().astype(jnp.float32))


def _share(tokens: Tokens, divisor: Array) -> Array:
    """``1 / divisor`` on response tokens, 0 elsewhere, in the loss's precision."""
    dtype = jnp.promote_types(tokens.logp_BT.dtype, jnp.float32)
    return tokens.is_response_BT.astype(dtype) / jnp.maximum(divisor, 1).astype(dtype)


def token_mean(tokens: Tokens, totals: Totals) -> Array:
    """Every token alike, ``a = 1 / sum_i n_i``; ``[B, T]``. DAPO, arXiv 2503.14476."""
    return _share(tokens, totals.tokens)


def sequence_mean(tokens: Tokens, totals: Totals) -> Array:
    """Every sequence alike, ``a = 1 / (N n_i)``; ``[B, T]``. ASPO, arXiv 2510.06062 Eq. 1."""
    return _share(tokens, totals.sequences * segment_count(tokens))


def sequence_sum(tokens: Tokens, totals: Totals) -> Array:
    """Token sums averaged over sequences, ``a = 1 / N``; ``[B, T]``."""
    return _share(tokens, totals.sequences)


def fixed_length(length: int) -> Aggregate:
    """Token sums over a constant length, ``a = 1 / (N length)``. Dr. GRPO, arXiv 2503.20783.

    length: the longest response that may be generated, in tokens, at least 1: no response's own
        length matters.

    Some libraries leave the 1/N out; the loss here then is theirs divided by N.
    """
    if length <= 0:
        raise ValueError(
            f"fixed_length.length = {length}; expected the maximum response length, a positive int"
        )

    def aggregate(tokens: Tokens, totals: Totals) -> Array:
        return _share(tokens, totals.sequences * length)

    return aggregate
