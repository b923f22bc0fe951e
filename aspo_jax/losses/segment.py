"""Sequence-level quantities, for padded rows and for packed rows alike.

Only response tokens count. ``N`` numbers the sequences of a row: one when ``sequence_id_BT`` is
None, otherwise T + 1 slots, of which slot 0 is the padding's and stays empty. Everything here
also accepts further leading axes, e.g. ``[M, B, T]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.structs import Rows, Tokens


def sums_per_sequence(x_BT: Array, tokens: Tokens | Rows) -> Array:
    """Sum of x over the response tokens of each sequence: ``[B, T] -> [B, N]``."""
    x_BT = jnp.where(tokens.is_response_BT, x_BT, 0)
    if tokens.sequence_id_BT is None:
        return x_BT.sum(axis=-1, keepdims=True)
    slots = x_BT.shape[-1] + 1

    def row(x_T, id_T):
        return jax.ops.segment_sum(x_T, id_T, num_segments=slots)

    return jnp.vectorize(row, signature="(t),(t)->(n)")(x_BT, tokens.sequence_id_BT)


def to_tokens(x_BN: Array, tokens: Tokens | Rows) -> Array:
    """Hand every token its sequence's value: ``[B, N] -> [B, T]``."""
    if tokens.sequence_id_BT is None:
        return jnp.broadcast_to(x_BN, tokens.is_response_BT.shape)
    return jnp.take_along_axis(x_BN, tokens.sequence_id_BT, axis=-1)


def lengths_per_sequence(tokens: Tokens | Rows) -> Array:
    """Number of response tokens of each sequence, float32 ``[B, N]``."""
    return sums_per_sequence(tokens.is_response_BT.astype(jnp.float32), tokens)


def segment_count(tokens: Tokens | Rows) -> Array:
    """Length of the token's response, float32 ``[B, T]``; at least 1, safe to divide by."""
    return jnp.maximum(to_tokens(lengths_per_sequence(tokens), tokens), 1)


def segment_mean(x_BT: Array, tokens: Tokens | Rows) -> Array:
    """Mean over the token's response, on each of its tokens: ``[B, T] -> [B, T]``."""
    return to_tokens(sums_per_sequence(x_BT, tokens), tokens) / segment_count(tokens)


def segment_quantile(x_BT: Array, tokens: Tokens, quantile: float) -> Array:
    """Linearly interpolated quantile over the token's response, on each of its tokens: ``[B, T]``.

    One sort by (sequence, value) puts each response's values side by side, in order and in front
    of everything masked; the quantile is read between two ranks, as in ``numpy.quantile``.
    """
    is_response_BT = tokens.is_response_BT
    id_BT = jnp.zeros(x_BT.shape, jnp.int32)
    if tokens.sequence_id_BT is not None:
        id_BT = tokens.sequence_id_BT
    key_BT = jnp.where(is_response_BT, id_BT, x_BT.shape[-1] + 1)
    x_BT = jnp.where(is_response_BT, x_BT, 0)
    _, sorted_BT = jax.lax.sort((key_BT, x_BT), dimension=-1, num_keys=2)

    length_BN = lengths_per_sequence(tokens)
    start_BT = to_tokens(jnp.cumsum(length_BN, axis=-1) - length_BN, tokens).astype(jnp.int32)
    rank_BT = quantile * (segment_count(tokens).astype(x_BT.dtype) - 1)

    def at(rank_BT):
        return jnp.take_along_axis(
            sorted_BT, start_BT + rank_BT.astype(jnp.int32), axis=-1, mode="clip"
        )

    below_BT, above_BT = at(jnp.floor(rank_BT)), at(jnp.ceil(rank_BT))
    return below_BT + (rank_BT - jnp.floor(rank_BT)) * (above_BT - below_BT)
