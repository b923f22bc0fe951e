"""Pages read where they lie: the kernel, interpreted, against the pages gathered."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_mesh

from aspo_jax.model import Decode, choose_in_place
from aspo_jax.model.cache import Cache, empty_cache
from aspo_jax.model.paged import (
    attend_in_place,
    is_within_reach,
    over_mesh,
    programs_of_a_row,
)

LAYERS, PAGE, WIDTH, KEY_HEADS, GROUP = 3, 6, 16, 2, 3
# Prompts of two rows that share them, ragged responses, a row that ends with its page, one without
# a sequence.
PROMPT_N, OWN_N = [13, 13, 6, 0, 1, 0], [0, 400, 5, 11, 70, 0]
INTERPRETED = functools.partial(attend_in_place, is_interpreted=True)


def _rows(seed: int = 0, dtype=jnp.float32, shards: int = 1) -> tuple[Decode, tuple]:
    """Rows over a pool of random numbers, and the query, key and value of their next token."""
    rng = np.random.default_rng(seed)
    prompt_N, own_N = np.tile(PROMPT_N, shards), np.tile(OWN_N, shards)
    needed = [-(-p // PAGE) + o // PAGE + 1 for p, o in zip(prompt_N, own_N, strict=True)]
    pages = sum(needed)
    table_JN = np.zeros((max(needed), len(prompt_N)), np.int32)
    for shard in range(shards):
        free = iter(rng.permutation(np.arange(1, pages + 1)))
        for n in range(shard * len(PROMPT_N), (shard + 1) * len(PROMPT_N)):
            own = [next(free) for _ in range(needed[n])]
            table_JN[: needed[n], n] = own
        first = shard * len(PROMPT_N)
        table_JN[:3, first + 1] = table_JN[:3, first]  # 13 tokens of a prompt are three pages
    cache = empty_cache(LAYERS, shards, pages, KEY_HEADS, PAGE, WIDTH, dtype)

    def drawn(pool):
        if pool is None:
            return None
        if pool.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, pool.shape), jnp.int8)
        scale = 1.0 if pool.ndim == 6 else 0.02  # a scale of int8 pages is positive
        x = rng.normal(size=pool.shape) * scale
        return jnp.asarray(x if pool.ndim == 6 else np.abs(x), pool.dtype)

    keys = jnp.int32(-(-max(needed) // 4))
    rows = Decode(
        jax.tree.map(drawn, cache),
        jnp.asarray(table_JN),
        jnp.asarray(prompt_N, jnp.int32),
        jnp.asarray(own_N, jnp.int32),
        reads_c=keys[None],
        pages_per_read=4,
    )
    kind = jnp.float32 if dtype == jnp.int8 else dtype
    heads = (KEY_HEADS * GROUP, KEY_HEADS, KEY_HEADS)
    token = tuple(jnp.asarray(rng.normal(size=(len(prompt_N), 1, n, WIDTH)), kind) for n in heads)
    return rows, token


def _attended(rows: Decode, token: tuple, in_place) -> tuple[Cache, np.ndarray]:
    attend = jax.jit(lambda rows, y, token: rows.attend(y, *token, None))
    grown, out = attend(dataclasses.replace(rows, in_place=in_place), 1, token)
    return grown.cache, np.asarray(out, np.float32)


@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 2e-2), ("int8", 2e-5)])
def test_it_is_the_attention_of_gathered_pages(dtype, error):
    """Holes behind a prompt, shared pages, several programs a row, scales of int8 pages."""
    rows, token = _rows(dtype=jnp.dtype(dtype))
    pairs, positions = len(PROMPT_N) * KEY_HEADS, PAGE * rows.table_JN.shape[0]
    assert programs_of_a_row(pairs, positions) == 3
    expected, out = (_attended(rows, token, how) for how in (None, INTERPRETED))
    assert jax.tree.all(jax.tree.map(np.array_equal, expected[0], out[0]))  # the pools
    np.testing.assert_allclose(out[1], expected[1], atol=error, rtol=error)


def test_a_row_depends_on_no_other_row():
    """Its numbers are the same bits beside rows of other lengths, with other pages."""
    rows, token = _rows()
    _, out = _attended(rows, token, INTERPRETED)
    others = dataclasses.replace(
        rows, own_N=rows.own_N.at[1].set(3), prompt_N=rows.prompt_N.at[2].set(1)
    )
    _, again = _attended(others, token, INTERPRETED)
    np.testing.assert_array_equal(out[[0, 3, 4, 5]], again[[0, 3, 4, 5]])
    assert not np.array_equal(out[1], again[1])


def test_a_broken_value_reaches_only_who_reads_it():
    """Its key says NaN, in a page of the row of 70 own tokens; what follows the end is not read."""
    rows, token = _rows()
    page, beyond = rows.table_JN[5, 4], rows.table_JN[0, 3]
    key = rows.cache.key_EKYXSC.at[0, :, 1, page, 2].set(jnp.nan)
    key = key.at[0, :, 1, beyond, 5].set(jnp.nan)
    shorter = dataclasses.replace(
        rows,
        cache=dataclasses.replace(rows.cache, key_EKYXSC=key),
        own_N=rows.own_N.at[3].set(3),
    )
    _, out = _attended(shorter, token, INTERPRETED)
    assert np.isnan(out[4]).all() and np.isfinite(np.delete(out, 4, axis=0)).all()


def test_each_device_reads_its_own_rows_and_heads():
    mesh = toy_mesh(2, 1, 2)
    rows, token = _rows(shards=2)
    alone = [
        _attended(_shard(rows, shard), tuple(x[6 * shard :][:6] for x in token), None)[1]
        for shard in range(2)
    ]
    _, out = _attended(rows, token, over_mesh(mesh, is_interpreted=True))
    np.testing.assert_allclose(out, np.concatenate(alone), atol=2e-6, rtol=2e-6)


def _shard(rows: Decode, shard: int) -> Decode:
    own = slice(6 * shard, 6 * (shard + 1))
    cache = jax.tree.map(lambda pool: pool[shard : shard + 1], rows.cache)
    return dataclasses.replace(
        rows,
        cache=cache,
        table_JN=rows.table_JN[:, own],
        prompt_N=rows.prompt_N[own],
        own_N=rows.own_N[own],
    )


@pytest.mark.parametrize(
    "dtype, gib, is_read",
    [("int8", 1, True), ("int8", 3, False), ("int8", 5, True), ("bfloat16", 3, True)],
)
def test_a_pool_beyond_the_offsets_of_the_kernel_is_gathered(dtype, gib, is_read):
    """Between 2 and 4 GiB the offsets of single bytes would be signed numbers of 32 bits."""
    pages = gib * 2**30 // (64 * 128 * jnp.dtype(dtype).itemsize)
    cache = jax.eval_shape(lambda: empty_cache(1, 1, pages, 1, 64, 128, jnp.dtype(dtype)))
    assert is_within_reach(cache) == is_read


def test_who_reads_in_place():
    alone = toy_mesh(1, 1, 1)
    assert choose_in_place("gpu", 128, alone) and choose_in_place("gpu", 64, toy_mesh(2, 1, 2))
    assert choose_in_place("gpu", 96, alone) is None  # a power of two only
    assert choose_in_place("tpu", 128, alone) is None and choose_in_place("cpu", 128, alone) is None
