"""Packing: every sequence once, no row too full, the same every time."""

import random

import pytest

from aspo_jax.data import pack


def test_examples():
    assert pack([], 8) == []
    assert pack([8], 8) == [[0]]
    assert pack([3, 5, 8, 2, 6], 8) == [[2], [4, 3], [1, 0]]
    assert pack([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]  # ties by index
    assert pack([1, 7, 1, 7], 8) == [[1, 0], [3, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_laws(seed):
    rng = random.Random(seed)
    row_tokens = rng.randint(1, 300)
    lengths = [rng.randint(1, row_tokens) for _ in range(rng.randint(0, 200))]
    rows = pack(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= row_tokens for row in rows)
    fewest = -(-sum(lengths) // row_tokens)
    big = sum(2 * length > row_tokens for length in lengths)
    assert max(fewest, big) <= len(rows) <= 2 * fewest
    assert rows == pack(lengths, row_tokens)


@pytest.mark.parametrize("length", [9, 0, -1])
def test_impossible_lengths(length):
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens, expected 1 to row_tok"):
        pack([8, length], 8)
