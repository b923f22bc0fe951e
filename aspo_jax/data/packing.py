"""Which sequences share a row."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the longest first, each into the first row that has room for it.

    At most 11/9 of the fewest possible rows, plus 6/9 (Dosa 2007). Depends on ``lengths`` alone;
    of equally long sequences the one with the smaller index goes first.

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
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(i)
        room[row] -= lengths[i]
    return sorted(rows, key=lambda row: -sum(lengths[i] ** 2 for i in row))
