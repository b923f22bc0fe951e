"""Sequence-level quantities, for padded rows and for packed rows alike.

Only response tokens count. ``N`` numbers the sequences of a row: one when ``sequence_id_BT`` is
None, otherwise T + 1 slots, of which slot 0 is the padding's and stays empty. Everything here
also accepts further leading axes, e.g. ``[M, B, T]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


def sums_per_group(x_BT: Array, group_id_BT: Array, tokens: Tokens) -> Array:
    """Sum of x over the response tokens of each prompt, at the prompt's number: ``[B T + 1]``."""
    x_BT = jnp.where(tokens.is_response_BT, x_BT, 0)
    return jax.ops.segment_sum(x_BT.ravel(), group_id_BT.ravel(), num_segments=x_BT.size + 1)


def of_group(x_K: Array, group_id_BT: Array) -> Array:
    """Hand every token its prompt's value, NaN if the table has none: ``[K] -> [B, T]``.

    Only a part of a mini-batch can have a prompt beyond a table of its own making; its NaN makes
    the update one that is skipped and counted.
    """
    return x_K.at[group_id_BT].get(mode="fill", fill_value=jnp.nan)


def _is_linked(tokens: Tokens | Rows, reverse: bool) -> Array:
    """True where the slot before (behind, if reverse) is of the same sequence, ``[B, T]``."""
    id_BT = tokens.sequence_id_BT
    if id_BT is None:
        return jnp.ones(tokens.is_response_BT.shape, bool)
    edge = (0, 1) if reverse else (1, 0)
    return jnp.pad(id_BT[..., 1:] == id_BT[..., :-1], [(0, 0)] * (id_BT.ndim - 1) + [edge])


Operator = Callable[[Array, Array], Array]


# Compiled as one: step by step, the log2 T levels take seconds to compile.
@partial(jax.jit, static_argnames=("times", "plus", "reverse"))
def _recurrence(
    x_BT: Array, link_BT: Array, times: Operator, plus: Operator, reverse: bool = False
) -> Array:
    """``y_t = plus(times(y_before, link_t), x_t)`` along each row."""

    def join(a, b):
        return times(a[0], b[0]), plus(times(a[1], b[0]), b[1])

    row = x_BT.ndim - 1
    return jax.lax.associative_scan(join, (link_BT, x_BT), reverse=reverse, axis=row)[1]


def running_sum(
    x_BT: Array, tokens: Tokens | Rows, *, decay: float = 1.0, reverse: bool = False
) -> Array:
    """Sum of x over the response tokens up to this one, itself included: ``[B, T] -> [B, T]``.

    decay: x of a token that is n response tokens away counts ``decay ** n``.
    reverse: from this token to the end of its response instead.
    """
    is_response_BT = tokens.is_response_BT
    step_BT = jnp.where(is_response_BT, jnp.asarray(decay, x_BT.dtype), 1)
    link_BT = jnp.where(_is_linked(tokens, reverse), step_BT, 0)
    x_BT = jnp.where(is_response_BT, x_BT, 0)
    return _recurrence(x_BT, link_BT, jax.lax.mul, jax.lax.add, reverse)


def earlier_min(x_BT: Array, tokens: Tokens | Rows) -> Array:
    """Least x of the response tokens before this one, inf before the first: ``[B, T]``."""
    is_linked_BT = _is_linked(tokens, reverse=False)
    link_BT = jnp.where(is_linked_BT, jnp.zeros_like(x_BT), jnp.inf)
    x_BT = jnp.where(tokens.is_response_BT, x_BT, jnp.inf)
    min_BT = _recurrence(x_BT, link_BT, jax.lax.add, jax.lax.min)
    first_B1 = jnp.full_like(x_BT[..., :1], jnp.inf)
    return jnp.concatenate([first_B1, min_BT[..., :-1]], axis=-1) + link_BT


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
