"""The key-value cache: an argument and a result of `Model.apply`, never hidden state."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from aspo_jax.structs import struct


@struct
class Cache:
    """Keys and values of the slots filled so far.

    key_YSKNC, value_YSKNC: per layer, slot, key/value head, row, head width. Rows and features
        last: with any other order a TPU copies the whole cache at every token.
    segment_NS: 1 where the slot holds a token that may be attended to, 0 elsewhere.
    filled: number of slots written, the same for all rows (prompts are padded on the left), [].
    """

    key_YSKNC: Array
    value_YSKNC: Array
    segment_NS: Array
    filled: Array


def empty_cache(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """A cache with room for ``slots`` tokens in each of ``rows`` rows."""
    shape = (layers, slots, kv_heads, rows, head_dim)
    return Cache(
        key_YSKNC=jnp.zeros(shape, dtype),
        value_YSKNC=jnp.zeros(shape, dtype),
        segment_NS=jnp.zeros((rows, slots), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )
