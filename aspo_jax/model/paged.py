"""Attention of rows that grow by one token, with pages read where they lie: a kernel for GPUs.

`Decode.attend` gathers pages by itself, some at a time. A TPU's compiler keeps these in the chip's
fast memory; a GPU's writes them out and reads them again: three times the bytes. Here every pair of
row and key head is a program of its own, or several where there are few pairs; each reads the row's
own pages and no more, so that a row's numbers depend on no other row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from aspo_jax.model.attention import MASKED
from aspo_jax.model.sharding import RULES

BLOCK = 128  # positions that a program reads at once
LEAST = 16  # rows of the smallest product of a GPU's tensor cores
PROGRAMS = 256  # from which on a GPU is busy, about

InPlace = Callable[..., Array]


def choose_in_place(platform: str, head_dim: int, mesh: Mesh) -> InPlace | None:
    """The kernel of a platform; None where pages are gathered.

    It is ``(cache, y, q_N1HC, table_JN, prompt_N, own_N) -> out_N1HC``, see `Decode`.
    """
    is_power_of_two = head_dim >= LEAST and not head_dim & (head_dim - 1)
    return over_mesh(mesh) if platform == "gpu" and is_power_of_two else None


def over_mesh(mesh: Mesh, is_interpreted: bool = False) -> InPlace:
    """Each device its own rows and heads."""
    attend = functools.partial(attend_in_place, is_interpreted=is_interpreted)
    if mesh.size == 1:
        return attend
    rows, heads = RULES["batch"], RULES["kv_heads"]
    of_rows = PartitionSpec(rows)
    wide = PartitionSpec(rows, None, heads, None)
    # check_vma would look for replication rules inside the kernel, which has none.
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(
            *(PartitionSpec(rows, heads), PartitionSpec(), wide),
            *(PartitionSpec(None, rows), of_rows, of_rows),
        ),
        out_specs=wide,
        check_vma=False,
    )


def is_within_reach(cache: Any) -> bool:
    """Whether the kernel can read the pools.

    Its offsets have 32 bits, signed, in pools of less than 4 GiB: enough for two bytes a number.
    """
    pool = cache.key_EKYXSC
    return pool.dtype.itemsize > 1 or not 2**31 <= pool.size <= 2**32


def programs_of_a_row(pairs: int, positions: int) -> int:
    """How many share a row's positions, where so many pairs of row and key head are programs."""
    return max(min(PROGRAMS // pairs, positions // BLOCK), 1)


def attend_in_place(
    cache: Any,
    y: Array,
    q_N1HC: Array,
    table_JN: Array,
    prompt_N: Array,
    own_N: Array,
    is_interpreted: bool = False,
) -> Array:
    """Layer y of one device: attention of each row to what its pages hold, `Decode`'s meaning.

    cache: of one shard.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    N, _, H, C = q_N1HC.shape
    _, K, Y, X, S, _ = cache.key_EKYXSC.shape
    J, g = table_JN.shape[0], H // K
    queries = max(LEAST, 2 ** math.ceil(math.log2(g)))  # of a program; what is beyond g is masked
    splits = programs_of_a_row(N * K, J * S)

    def of_head(pool: Array | None, *width: int) -> tuple[Array | None, Any]:
        """A pool by its positions, and the head that a program sees of it."""
        if pool is None:
            return None, None
        spec = pl.BlockSpec((None, Y * X * S, *width), lambda n, k, i: (k, 0, 0)[: 2 + len(width)])
        return pool.reshape(K, Y * X * S, *width), spec

    (keys, of_keys), (values, of_values) = (
        of_head(pool, C) for pool in (cache.key_EKYXSC, cache.value_EKYXSC)
    )
    (key_scales, of_scales), (value_scales, _) = (
        of_head(pool) for pool in (cache.key_scale_EKYXS, cache.value_scale_EKYXS)
    )
    rows = (splits, N, K, g)
    parts = [
        jax.ShapeDtypeStruct((*rows, C), q_N1HC.dtype if splits == 1 else jnp.float32),
        *[jax.ShapeDtypeStruct(rows, jnp.float32)] * 2 * (splits > 1),
    ]
    of_part = [
        pl.BlockSpec((None, None, None, queries, C), lambda n, k, i: (i, n, k, 0, 0)),
        *[pl.BlockSpec((None, None, None, queries), lambda n, k, i: (i, n, k, 0))] * 2,
    ]
    out_NKgC, *others = pl.pallas_call(
        functools.partial(_read, S, g, splits),
        grid=(N, K, splits),
        in_specs=[
            pl.BlockSpec((None, None, queries, C), lambda n, k, i: (n, k, 0, 0)),
            *(of_keys, of_values, of_scales, of_scales),
            pl.BlockSpec((None, J), lambda n, k, i: (n, 0)),
            pl.BlockSpec((None, 2), lambda n, k, i: (n, 0)),
        ],
        out_specs=of_part[: len(parts)],
        out_shape=parts,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=is_interpreted,
        name="paged_attention",
    )(
        *((q_N1HC * C**-0.5).reshape(N, K, g, C), keys, values, key_scales, value_scales),
        *(table_JN.T + y * X, jnp.stack([prompt_N, own_N], axis=1)),
    )
    if splits == 1:
        return out_NKgC.reshape(q_N1HC.shape)
    top, mass = others
    share = jnp.exp(top - jnp.max(top, axis=0)) * mass
    share /= jnp.sum(share, axis=0)
    return jnp.sum(out_NKgC * share[..., None], axis=0).reshape(q_N1HC.shape).astype(q_N1HC.dtype)


def _read(S: int, g: int, splits: int, *refs: Any) -> None:
    """One program: a running softmax over its share of a row's positions.

    refs: queries [m, C], of which g count; keys, values [positions, C] and their scales or None;
        the row's pages [J]; tokens in the prompt's pages and in its own. Written are the outputs
        of the share, and where there are several of each query the highest score and the mass.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    q_ref, key_ref, value_ref, key_scale_ref, value_scale_ref, page_ref, held_ref = refs[:7]
    out_ref, *other_refs = refs[7:]
    prompt, own = held_ref[0], held_ref[1]
    first = pl.cdiv(prompt, S) * S  # place of the row's own pages; what lies before may be a hole
    end = first + own + 1
    blocks = pl.cdiv(end, BLOCK)
    share = pl.cdiv(blocks, splits)
    start = pl.program_id(2) * share
    is_query_m = jnp.arange(q_ref.shape[0]) < g
    q_mC = triton.load(q_ref, mask=is_query_m[:, None], other=0.0)
    exact = jax.lax.Precision.HIGHEST if q_mC.dtype == jnp.float32 else None
    product = functools.partial(jnp.dot, precision=exact, preferred_element_type=jnp.float32)

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_m, mass_m, total_mC = carry
        place_t = jnp.minimum(i * BLOCK + jnp.arange(BLOCK), end - 1)
        is_new_t = i * BLOCK + jnp.arange(BLOCK) < end
        is_held_t = is_new_t & ((place_t < prompt) | (place_t >= first))
        position_t = page_ref[jax.lax.div(place_t, S)] * S + jax.lax.rem(place_t, S)
        score_mt = product(q_mC, key_ref[position_t].astype(q_mC.dtype).T)
        if key_scale_ref is not None:
            score_mt = score_mt * key_scale_ref[position_t]
        score_mt = jnp.where(is_held_t, score_mt, MASKED)
        new_m = jnp.maximum(top_m, jnp.max(score_mt, axis=1))
        p_mt, shrink_m = jnp.exp(score_mt - new_m[:, None]), jnp.exp(top_m - new_m)
        mass_m = mass_m * shrink_m + jnp.sum(p_mt, axis=1)
        if value_scale_ref is not None:
            p_mt = p_mt * value_scale_ref[position_t]
        part_mC = product(p_mt.astype(q_mC.dtype), value_ref[position_t].astype(q_mC.dtype))
        return new_m, mass_m, total_mC * shrink_m[:, None] + part_mC

    m, C = q_mC.shape
    nothing = (jnp.full(m, MASKED), jnp.zeros(m), jnp.zeros((m, C), jnp.float32))
    stop = jnp.minimum(start + share, blocks)
    top_m, mass_m, total_mC = jax.lax.fori_loop(start, stop, add, nothing)
    # A share may be empty: there is a row's first token at least, so one of its shares is not.
    out_mC = total_mC / jnp.where(mass_m > 0, mass_m, 1.0)[:, None]
    triton.store(out_ref, out_mC.astype(out_ref.dtype), mask=is_query_m[:, None])
    for ref, x_m in zip(other_refs, (top_m, mass_m), strict=False):
        triton.store(ref, x_m, mask=is_query_m)
