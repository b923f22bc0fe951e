"""Keys and values of sampled sequences: pages of a pool, arguments and results of `Model.apply`.

A page holds S successive positions of one sequence, in every layer. A sequence reads the pages of
its prompt, which all samples of the prompt share, and then pages of its own; the prompt's last
token opens the first of these. Page 0 belongs to no sequence: writes that are to be
forgotten go there.

A row reads a few pages at once, then the next few, with a running softmax (as in arXiv
2307.08691; pages of a pool: arXiv 2309.06180), so pages that hold nothing for a row add exactly
nothing to it: its numbers do not depend on how long its neighbours are.
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
from aspo_jax.model.paged import is_within_reach
from aspo_jax.model.sharding import RULES
from aspo_jax.structs import struct


@struct
class Cache:
    """The pool. With int8 pages a number is its scale times an integer; else scales are None.

    key_EKYXSC, value_EKYXSC: per shard, key/value head, layer, page, slot, feature. Each of the E
        shards of the devices holds the pages of its own rows. A page of one head is one piece
        and a token of it another: with the heads within the page a TPU would copy the pool at every
        token.
    key_scale_EKYXS, value_scale_EKYXS: float32.
    """

    key_EKYXSC: Array
    value_EKYXSC: Array
    key_scale_EKYXS: Array | None
    value_scale_EKYXS: Array | None

    def keys_values(self) -> tuple[tuple[Array, Array | None], tuple[Array, Array | None]]:
        """Keys and values, each with its scales."""
        return (
            (self.key_EKYXSC, self.key_scale_EKYXS),
            (self.value_EKYXSC, self.value_scale_EKYXS),
        )


def empty_cache(
    layers: int, shards: int, pages: int, kv_heads: int, slots: int, head_dim: int, dtype: Any
) -> Cache:
    """A pool of ``pages`` pages of ``slots`` positions on each shard of the devices, page 0 aside.

    dtype: of the numbers; int8 adds a scale per position and head.
    """
    shape = (shards, kv_heads, layers, pages + 1, slots)
    is_int8 = jnp.dtype(dtype) == jnp.int8
    return Cache(
        *(jnp.zeros((*shape, head_dim), dtype) for _ in range(2)),
        *(jnp.zeros(shape, jnp.float32) if is_int8 else None for _ in range(2)),
    )


def cache_specs(cache: Any) -> Any:
    """Shards over the data axes, key/value heads over the tensor axis; shaped as the cache."""
    return jax.tree.map(lambda x: PartitionSpec(RULES["batch"], RULES["kv_heads"]), cache)


@struct
class Prefill:
    """Prompts on their way into pages; their tokens attend to each other.

    page_AJ: page of every S tokens of A prompts, A a multiple of the shards E; 0: nowhere.
    """

    cache: Cache
    page_AJ: Array

    def attend(self, y: Array, q_ATHC, k_ATKC, v_ATKC, fresh: Callable) -> tuple[Prefill, Array]:
        """Layer y: the new tokens' attention to each other; their keys and values into pages."""
        cache = self.store(y, k_ATKC, v_ATKC)
        return dataclasses.replace(self, cache=cache), fresh(q_ATHC, k_ATKC, v_ATKC)

    def store(self, y: Array, k_ATKC: Array, v_ATKC: Array) -> Cache:
        """The cache with the keys and values of layer y in the prompts' pages."""
        E = self.cache.key_EKYXSC.shape[0]
        A, J = self.page_AJ.shape
        page_Em = self.page_AJ.reshape(E, -1)

        def paged(x_ATKC: Array) -> Array:
            _, T, K, C = x_ATKC.shape
            return x_ATKC.reshape(E, -1, T // J, K, C).transpose(0, 3, 1, 2, 4)

        def put(pool_EKYX: Array, x_EKm: Array) -> Array:
            def set_pages(pool_YX, x_m, page_m):
                return pool_YX.at[y, page_m].set(x_m)

            return _each(set_pages, pool_EKYX, x_EKm, numbers=(page_Em,))

        return _stored(self.cache, (paged(k_ATKC), paged(v_ATKC)), put)


@struct
class Extend:
    """Prompts of which the next T tokens are read; they attend to all that came before too.

    table_JA: pages of A prompts, a multiple of the shards E; 0 where a prompt has none.
    start_A: tokens of each prompt that are in its pages, a multiple of T, as T is of the page.
    length_A: how many of the T tokens there are; 0: none of this prompt.
    """

    cache: Cache
    table_JA: Array
    start_A: Array
    length_A: Array
    pages_per_read: int = dataclasses.field(default=1, metadata={"static": True})

    def attend(self, y: Array, q_ATHC, k_ATKC, v_ATKC, fresh: Callable) -> tuple[Extend, Array]:
        """Layer y: the new tokens' keys and values into pages; attention to all of the prompt's."""
        del fresh  # for tokens that attend to each other only
        E, S = self.cache.key_EKYXSC.shape[0], self.cache.key_EKYXSC.shape[4]
        A, T, H, C = q_ATHC.shape
        K = k_ATKC.shape[2]
        table_AJ = _whole_reads(self.table_JA, self.pages_per_read)
        slot_T = jnp.arange(T)
        place_AJ = self.start_A[:, None] // S + jnp.arange(T // S)
        page_AJ = jnp.take_along_axis(table_AJ, place_AJ, axis=1, mode="fill", fill_value=0)
        is_filled_AJ = jnp.arange(0, T, S) < self.length_A[:, None]
        pages = Prefill(self.cache, jnp.where(is_filled_AJ, page_AJ, 0))
        cache = pages.store(y, k_ATKC, v_ATKC)

        def by_shard(x_A: Array) -> Array:
            return x_A.reshape(E, A // E, *x_A.shape[1:])

        g = H // K
        query_En1mT = by_shard(self.start_A)[..., None] + jnp.tile(slot_T, g)
        q = (q_ATHC * C**-0.5).reshape(A, T, K, g, C).transpose(0, 2, 3, 1, 4)
        longest = jnp.max(jnp.where(self.length_A > 0, self.start_A + self.length_A, 0))
        keys = jnp.arange(self.pages_per_read * S)

        def is_visible(i: Array) -> Array:
            key_s = i * self.pages_per_read * S + keys
            return (key_s <= query_En1mT[..., None])[:, None]

        out = _over_pages(
            cache,
            y,
            by_shard(q.reshape(A, K, g * T, C)),
            by_shard(table_AJ),
            is_visible,
            -(-longest // (S * self.pages_per_read)),
            self.pages_per_read,
        )
        out_ATHC = out.reshape(A, K, g, T, C).transpose(0, 3, 1, 2, 4).reshape(A, T, H, C)
        return dataclasses.replace(self, cache=cache), out_ATHC


@struct
class Decode:
    """Rows that grow by one token.

    table_JN: pages of each row, those of its prompt first; 0 where it has none.
    prompt_N: positions in the prompt's pages. own_N: positions in the row's own pages before this
        token, which becomes number own_N of them.
    reads_c: how many reads of ``pages_per_read`` pages reach the end of the longest row, in each of
        c classes. A class is an equal share of each shard's rows, in their order. A row pays for
        the longest of its class, so rows of like length should stand beside each other.
    pages_per_read: pages of a row that are read at once.
    in_place: what reads pages where they lie, see `aspo_jax.model.paged`; then classes and reads
        are no matter. None: pages are gathered, ``pages_per_read`` at once.
    """

    cache: Cache
    table_JN: Array
    prompt_N: Array
    own_N: Array
    reads_c: Array
    pages_per_read: int = dataclasses.field(default=1, metadata={"static": True})
    in_place: Callable | None = dataclasses.field(default=None, metadata={"static": True})

    def attend(self, y: Array, q_N1HC, k_N1KC, v_N1KC, fresh: Callable) -> tuple[Decode, Array]:
        """Layer y: put the new token's key and value into its page; attend to all of the row's."""
        del fresh  # for tokens that attend to each other only
        E, S = self.cache.key_EKYXSC.shape[0], self.cache.key_EKYXSC.shape[4]
        of_prompt_N = -(-self.prompt_N // S)
        place_N = of_prompt_N + self.own_N // S
        page_N = jnp.take_along_axis(self.table_JN, place_N[None], axis=0)[0]
        page_En, slot_En = (x.reshape(E, -1) for x in (page_N, self.own_N % S))

        def put(pool_EKYX: Array, x_EKn: Array) -> Array:
            def set_slots(pool_YX, x_n, page_n, slot_n):
                return pool_YX.at[y, page_n, slot_n].set(x_n)

            return _each(set_slots, pool_EKYX, x_EKn, numbers=(page_En, slot_En))

        new = (x.reshape(E, -1, *x.shape[2:]).swapaxes(1, 2) for x in (k_N1KC, v_N1KC))
        cache = _stored(self.cache, tuple(new), put)

        if self.in_place is None or not is_within_reach(cache):
            out_N1HC = self._over_classes(cache, y, q_N1HC)
        else:
            rows = (self.table_JN, self.prompt_N, self.own_N)
            out_N1HC = self.in_place(cache, y, q_N1HC, *rows)
        return dataclasses.replace(self, cache=cache), out_N1HC

    def _over_classes(self, cache: Cache, y: Array, q_N1HC: Array) -> Array:
        """Attention of each row to its pages, class after class."""
        N, _, H, C = q_N1HC.shape
        E, K, _, _, S = cache.key_EKYXSC.shape[:5]
        classes = self.reads_c.shape[0]
        of_prompt_N = -(-self.prompt_N // S)

        def by_class(x_N: Array) -> Array:
            return x_N.reshape(E, classes, N // E // classes, *x_N.shape[1:]).swapaxes(0, 1)

        table_NJ = _whole_reads(self.table_JN, self.pages_per_read)
        numbers = jnp.arange(table_NJ.shape[1])
        held_NJ = jnp.where(
            numbers < of_prompt_N[:, None],
            self.prompt_N[:, None] - numbers * S,
            self.own_N[:, None] + 1 - (numbers - of_prompt_N[:, None]) * S,
        )
        q_cEnKgC = by_class((q_N1HC * C**-0.5).reshape(N, K, H // K, C))

        def of_class(xs):
            q_EnKgC, table_EnJ, held_EnJ, reads = xs

            def is_visible(i: Array) -> Array:
                held_Enj = _some(held_EnJ, i, self.pages_per_read)
                is_filled_EnjS = jnp.arange(S) < held_Enj[..., None]
                return is_filled_EnjS.reshape(E, 1, -1, 1, self.pages_per_read * S)

            return _over_pages(cache, y, q_EnKgC, table_EnJ, is_visible, reads, self.pages_per_read)

        arrays = (q_cEnKgC, by_class(table_NJ), by_class(held_NJ), self.reads_c)
        out_cEnKgC = jax.lax.map(of_class, arrays)
        return out_cEnKgC.swapaxes(0, 1).reshape(N, 1, H, C)


def _over_pages(
    cache: Cache,
    y: Array,
    q_EnKgC: Array,
    table_EnJ: Array,
    is_visible: Callable[[Array], Array],
    reads: Array,
    pages_per_read: int,
) -> Array:
    """Attention of a row's g queries to the first ``reads`` x ``pages_per_read`` pages of its row.

    is_visible: (number of the read) -> which of its slots s each query sees, of a shape that goes
        with [E, K, n, g, s].
    """
    E, n, K, g, C = q_EnKgC.shape
    S, dtype = cache.key_EKYXSC.shape[4], q_EnKgC.dtype
    q_EKngC = q_EnKgC.swapaxes(1, 2)

    def pages_of(pool_EKYX: Array, scale_EKYX: Array | None, i: Array) -> Array:
        def take(x_EKYX: Array) -> Array:
            x_EKy = x_EKYX.reshape(E, K, -1, *x_EKYX.shape[4:])
            return jax.vmap(lambda x_Ky, page_nj: x_Ky[:, page_nj])(
                x_EKy, y * cache.key_EKYXSC.shape[3] + _some(table_EnJ, i, pages_per_read)
            )

        pages = take(pool_EKYX)
        if scale_EKYX is not None:
            pages = (pages * take(scale_EKYX)[..., None]).astype(dtype)
        return pages.reshape(E, K, n, pages_per_read * S, C)

    def add(i, carry):
        top, mass, total = carry
        k_EKnsC, v_EKnsC = (pages_of(*pool, i) for pool in cache.keys_values())
        score = jnp.einsum(
            "ekngc,eknsc->ekngs", q_EKngC, k_EKnsC, preferred_element_type=jnp.float32
        )
        score = jnp.where(is_visible(i), score, MASKED)
        new_top = jnp.maximum(top, jnp.max(score, axis=-1))
        p, shrink = jnp.exp(score - new_top[..., None]), jnp.exp(top - new_top)
        part = jnp.einsum(
            "ekngs,eknsc->ekngc", p.astype(dtype), v_EKnsC, preferred_element_type=jnp.float32
        )
        mass = mass * shrink + jnp.sum(p, axis=-1)
        return new_top, mass, total * shrink[..., None] + part

    rows = (E, K, n, g)
    nothing = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, C), jnp.float32))
    _, mass, total = jax.lax.fori_loop(0, reads, add, nothing)
    # The mass is 1 at least, but for a row that no one waits for and that has read nothing.
    return (total / jnp.maximum(mass, 1.0)[..., None]).astype(dtype).swapaxes(1, 2)


def _whole_reads(table_JN: Array, pages_per_read: int) -> Array:
    """A table by rows, [N, J], with page 0 behind the end until whole reads make it up."""
    J = table_JN.shape[0]
    return jnp.pad(table_JN.T, ((0, 0), (0, -J % pages_per_read)))


def _some(x_EnJ: Array, i: Array, count: int) -> Array:
    """The ``i``-th ``count`` of J."""
    return jax.lax.dynamic_slice_in_dim(x_EnJ, i * count, count, axis=2)


def _each(of_head: Callable, pool_EKYX: Array, *arrays: Array, numbers: tuple[Array, ...]) -> Array:
    """``of_head`` for every head of every shard of the devices; page and slot numbers have E only.

    Each head gets its own copy of the numbers: a write of all heads at once would be one piece, and
    a TPU would copy the pool to have the pieces together.
    """
    K = pool_EKYX.shape[1]
    own = [jnp.broadcast_to(x[:, None], (x.shape[0], K, *x.shape[1:])) for x in numbers]
    return jax.vmap(jax.vmap(of_head))(pool_EKYX, *arrays, *own)


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
