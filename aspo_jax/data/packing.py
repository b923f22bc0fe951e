"""Which sequences share a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

CANDIDATES = 64  # sequences among which those are searched that fill a row best


def pack(lengths: Sequence[int], row_tokens: int, sequences: int | None = None) -> list[list[int]]:
    """Rows of sequences, as few as found: by first-fit decreasing, or, if fewer, the fullest.

    At most 11/9 of the fewest possible rows, plus 6/9 (Dosa 2007). Depends on ``lengths`` alone;
    of equally long sequences the one with the smaller index goes first.

    Args:
        sequences: the most in a row; None: any number.

    Returns:
        One list of indices into ``lengths`` per row; every index occurs once. Rows come in the
        order of falling attention cost, the sum of squared lengths: neighbours, which share a
        micro-batch and are dealt out over its devices, cost about the same.

    Raises:
        ValueError: a length below 1 or above ``row_tokens``.
    """
    for i, length in enumerate(lengths):
        if not 1 <= length <= row_tokens:
            raise ValueError(
                f"sequence {i} has {length} tokens, expected 1 to row_tokens = {row_tokens}; "
                "raise Train.row_tokens or shorten prompts and responses"
            )
    lengths = list(map(int, lengths))  # whole numbers of any size, which those of NumPy are not
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    most = sequences or len(lengths)
    rows = _first_fit(lengths, longest_first, row_tokens, most)
    if most > 1 and len(rows) > math.ceil(sum(lengths) / row_tokens):
        fullest = _fullest(lengths, longest_first, row_tokens)
        if max(map(len, fullest)) <= most:
            rows = min(rows, fullest, key=len)
    return sorted(rows, key=lambda row: -sum(lengths[i] ** 2 for i in row))


def _first_fit(
    lengths: Sequence[int], order: Sequence[int], row_tokens: int, most: int
) -> list[list[int]]:
    """Each into the first row that has room for it and fewer than ``most`` sequences."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(i)
        room[row] = room[row] - lengths[i] if len(rows[row]) < most else 0
    return rows


def _fullest(lengths: Sequence[int], order: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Each row begins with the first that is left, and takes the others that fill it best."""
    left, rows = list(order), []
    while left:
        first, *others = left
        chosen = {first, *_best_subset(lengths, others, row_tokens - lengths[first])}
        rows.append([i for i in left if i in chosen])
        left = [i for i in left if i not in chosen]
    return rows


def _best_subset(lengths: Sequence[int], order: Sequence[int], room: int) -> list[int]:
    """Those that have together as many tokens as there is room for, or the most below it.

    Searched among `CANDIDATES` of them, evenly spread over their order.
    """
    fitting = [i for i in order if lengths[i] <= room]
    candidates = fitting[:: math.ceil(len(fitting) / CANDIDATES) or 1]
    within = (2 << room) - 1
    sums = [1]  # bit s of the k-th: some of the first k candidates have s tokens together
    for i in candidates:
        sums.append((sums[-1] | sums[-1] << lengths[i]) & within)
    total, chosen = sums[-1].bit_length() - 1, []
    for i, without in zip(reversed(candidates), reversed(sums[:-1]), strict=True):
        if not without >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    return chosen
