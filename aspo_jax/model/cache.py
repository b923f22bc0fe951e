"""Keys and values of sampled sequences: pages of a pool, arguments and results of `Model.apply`.

A page holds S successive positions of one sequence, in every layer. A sequence reads the pages of
its prompt, which all samples of the prompt share, and then pages of its own; the prompt's last
token opens the first of these. Page 0 belongs to no one: what must go nowhere goes there.

Pages are read one after the other with a running softmax (as in arXiv 2307.08691; pages of a pool:
arXiv 2309.06180), so pages that hold nothing for a row add exactly nothing to it: its numbers do
not depend on how long its neighbours are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from aspo_jax.model.attention import MASKED
from aspo_jax.model.sharding import RULES
from aspo_jax.structs import struct


@struct
class Cache:
    """The pool. With int8 pages a number is its scale times an integer; else scales are None.

    key_EYXKSC, value_EYXKSC: per part of the devices, layer, page, key/value head, slot, feature.
        Each part E of the devices holds the pages of its own rows.
    key_scale_EYXKS, value_scale_EYXKS: float32.
    """

    key_EYXKSC: Array
    value_EYXKSC: Array
    key_scale_EYXKS: Array | None
    value_scale_EYXKS: Array | None

    def keys_values(self) -> tuple[tuple[Array, Array | None], tuple[Array, Array | None]]:
        """Keys and values, each with its scales."""
        return (
            (self.key_EYXKSC, self.key_scale_EYXKS),
            (self.value_EYXKSC, self.value_scale_EYXKS),
        )


def empty_cache(
    layers: int, parts: int, pages: int, kv_heads: int, slots: int, head_dim: int, dtype: Any
) -> Cache:
    """A pool of ``pages`` pages of ``slots`` positions on each part of the devices, page 0 aside.

    dtype: of the numbers; int8 adds a scale per position and head.
    """
    shape = (parts, layers, pages + 1, kv_heads, slots)
    is_int8 = jnp.dtype(dtype) == jnp.int8
    return Cache(
        *(jnp.zeros((*shape, head_dim), dtype) for _ in range(2)),
        *(jnp.zeros(shape, jnp.float32) if is_int8 else None for _ in range(2)),
    )


def cache_specs(cache: Any) -> Any:
    """Parts over the data axes, key/value heads over the tensor axis; shaped as the cache."""
    return jax.tree.map(
        lambda x: PartitionSpec(RULES["batch"], None, None, RULES["kv_heads"]), cache
    )


@struct
class Prefill:
    """Prompts on their way into pages; their tokens attend to each other.

    page_AJ: page of every S tokens of A prompts, A a multiple of the parts E; 0: nowhere.
    """

    cache: Cache
    page_AJ: Array

    def attend(self, y: Array, q_ATHC, k_ATKC, v_ATKC, fresh: Callable) -> tuple[Prefill, Array]:
        """Layer y: the new tokens' attention to each other; their keys and values into pages."""
        E = self.cache.key_EYXKSC.shape[0]
        A, J = self.page_AJ.shape
        page_Em = self.page_AJ.reshape(E, -1)

        def paged(x_ATKC: Array) -> Array:
            _, T, K, C = x_ATKC.shape
            x_AJKSC = x_ATKC.reshape(A, J, T // J, K, C).swapaxes(2, 3)
            return x_AJKSC.reshape(E, -1, K, T // J, C)

        def put(pool_EYX: Array, x_Em: Array) -> Array:
            set_pages = jax.vmap(lambda p_YX, page, x: p_YX.at[y, page].set(x))
            return set_pages(pool_EYX, page_Em, x_Em)

        cache = _stored(self.cache, (paged(k_ATKC), paged(v_ATKC)), put)
        return dataclasses.replace(self, cache=cache), fresh(q_ATHC, k_ATKC, v_ATKC)


@struct
class Decode:
    """Rows that grow by one token.

    table_JN: pages of each row, those of its prompt first; 0 where it has none.
    prompt_N: positions in the prompt's pages. own_N: positions in the row's own pages before this
        token, which becomes number own_N of them.
    pages: how many pages of the table are read, enough for every row that matters, [].
    """

    cache: Cache
    table_JN: Array
    prompt_N: Array
    own_N: Array
    pages: Array

    def attend(self, y: Array, q_N1HC, k_N1KC, v_N1KC, fresh: Callable) -> tuple[Decode, Array]:
        """Layer y: put the new token's key and value into its page; attend to all of the row's."""
        del fresh  # for tokens that attend to each other only
        E, S = self.cache.key_EYXKSC.shape[0], self.cache.key_EYXKSC.shape[4]
        of_prompt_N = -(-self.prompt_N // S)
        place_N = of_prompt_N + self.own_N // S
        page_N = jnp.take_along_axis(self.table_JN, place_N[None], axis=0)[0]
        page_En, slot_En = (x.reshape(E, -1) for x in (page_N, self.own_N % S))

        def put(pool_EYX: Array, x_En: Array) -> Array:
            set_slots = jax.vmap(lambda p_YX, page, slot, x: p_YX.at[y, page, :, slot].set(x))
            return set_slots(pool_EYX, page_En, slot_En, x_En)

        new = (x.reshape(E, -1, *x.shape[2:]) for x in (k_N1KC, v_N1KC))
        cache = _stored(self.cache, tuple(new), put)

        def is_filled_NS(j: Array) -> Array:
            """Which slots of each row's page number j hold a token."""
            held_N = jnp.where(
                j < of_prompt_N,
                self.prompt_N - j * S,
                self.own_N + 1 - (j - of_prompt_N) * S,
            )
            return jnp.arange(S) < held_N[:, None]

        out = _over_pages(cache, y, q_N1HC, self.table_JN, self.pages, is_filled_NS)
        return dataclasses.replace(self, cache=cache), out


def _over_pages(
    cache: Cache, y: Array, q_N1HC: Array, table_JN: Array, pages: Array, is_filled_NS: Callable
) -> Array:
    """Attention of one query per row to the pages of its row, page after page."""
    N, _, H, C = q_N1HC.shape
    E, K = cache.key_EYXKSC.shape[0], cache.key_EYXKSC.shape[3]
    dtype = q_N1HC.dtype
    q_EnKgC = (q_N1HC * C**-0.5).reshape(E, N // E, K, H // K, C)
    table_JEn = table_JN.reshape(-1, E, N // E)

    def page_of(pool_EYX: Array, scale_EYX: Array | None, j: Array) -> Array:
        def take(x_EYX: Array) -> Array:
            return jax.vmap(lambda x_YX, page: x_YX[y, page])(x_EYX, table_JEn[j])

        if scale_EYX is None:
            return take(pool_EYX)
        return (take(pool_EYX) * take(scale_EYX)[..., None]).astype(dtype)

    def add(j, carry):
        top, mass, total = carry
        k_EnKSC, v_EnKSC = (page_of(*pool, j) for pool in cache.keys_values())
        score = jnp.einsum(
            "enkgc,enksc->enkgs", q_EnKgC, k_EnKSC, preferred_element_type=jnp.float32
        )
        score = jnp.where(is_filled_NS(j).reshape(E, N // E, 1, 1, -1), score, MASKED)
        new_top = jnp.maximum(top, jnp.max(score, axis=-1))
        p, shrink = jnp.exp(score - new_top[..., None]), jnp.exp(top - new_top)
        part = jnp.einsum(
            "enkgs,enksc->enkgc", p.astype(dtype), v_EnKSC, preferred_element_type=jnp.float32
        )
        mass = mass * shrink + jnp.sum(p, axis=-1)
        return new_top, mass, total * shrink[..., None] + part

    rows = q_EnKgC.shape[:-1]
    nothing = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_EnKgC.shape, jnp.float32))
    _, mass, total = jax.lax.fori_loop(0, pages, add, nothing)
    return (total / mass[..., None]).astype(dtype).reshape(N, 1, H, C)


def _stored(cache: Cache, new: tuple[Array, ...], put: Callable[[Array, Array], Array]) -> Cache:
    """The cache with new keys and values, [..., C], written by ``put``.

    A value that is not finite would reach rows that give it no weight, 0 * NaN being NaN: its key
    says so in its stead, which reaches those that read it.
    """
    key, value = new
    is_sound = jnp.all(jnp.isfinite(value), axis=-1, keepdims=True)
    sound = (jnp.where(is_sound, key, jnp.nan), jnp.where(is_sound, value, 0))
    pools, scales = [], []
    for (pool, scale), x in zip(cache.keys_values(), sound, strict=True):
        if scale is None:
            pools.append(put(pool, x.astype(pool.dtype)))
            scales.append(None)
        else:
            x_scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / 127.0
            whole = jnp.round(x / jnp.maximum(x_scale, 1e-30)[..., None])
            pools.append(put(pool, whole.astype(jnp.int8)))
            scales.append(put(scale, x_scale))
    return Cache(*pools, *scales)
