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


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_few_sequences(seed):
    rng = random.Random(seed)
    row_tokens, most = rng.randint(10, 300), rng.randint(1, 6)
    lengths = [rng.randint(1, row_tokens // 4) for _ in range(100)]
    rows = pack(lengths, row_tokens, most)
    assert sorted(i for row in rows for i in row) == list(range(100))
    assert all(len(row) <= most and sum(lengths[i] for i in row) <= row_tokens for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // row_tokens) + -(-100 // most)


def test_rows_that_can_be_full_are():
    """First-fit decreasing puts 5 and 4 together, and needs a third row for the last."""
    assert pack([5, 4, 3, 3, 3, 2], 10) == [[0, 2, 5], [1, 3, 4]]
    rng = random.Random(0)
    lengths = [n for _ in range(50) for n in _cut(rng, 512)]
    rng.shuffle(lengths)
    assert len(pack(lengths, 512)) <= 51


def _cut(rng: random.Random, row_tokens: int) -> list[int]:
    """Lengths that fill a row."""
    cuts = sorted(rng.sample(range(1, row_tokens), rng.randint(1, 5)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, row_tokens], strict=True)]


def test_many_sequences_are_searched_among_a_few():
    rng = random.Random(0)
    lengths = [rng.randint(1, 900) for _ in range(1500)]
    rows = pack(lengths, 1000)
    assert sorted(i for row in rows for i in row) == list(range(1500))
    assert all(sum(lengths[i] for i in row) <= 1000 for row in rows)


@pytest.mark.parametrize("length", [9, 0, -1])
def test_impossible_lengths(length):
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens, expected 1 to row_tok"):
        pack([8, length], 8)
