"""What a source of prompts is: rows by their index, asked for by what is wanted of them.

    def sums(wanted: Wanted, *, largest: int = 99) -> list[dict]:
        draw = random.Random(f"{wanted.split} {wanted.seed}")
        pairs = [(draw.randrange(largest), draw.randrange(largest)) for _ in range(1000)]
        return [{"prompt": f"{a}+{b}", "answer": a + b, "kind": "exact"} for a, b in pairs]

``Data.source = 'my_data:sums'`` names it, ``sums.largest = 9`` sets its argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Wanted(NamedTuple):
    """What a source is asked for.

    split: training or held-out rows; the two share none.
    seed: of whatever it draws, ``Run.seed`` or ``Evaluate.seed``.
    size: most rows that are of use; None: as many as there are.
    """

    split: Literal["train", "held_out"]
    seed: int = 0
    size: int | None = None


class Mixture(NamedTuple):
    """Several sources, drawn from in proportion to their weights, in a fixed order."""

    sources: Sequence[Sequence[Any]]
    weights: Sequence[float]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def once(self, size: int) -> list[Any]:
        """At most ``size`` rows, each once: of every source by its weight while it has any."""
        taken = [0] * len(self.sources)
        rows: list[Any] = []
        while len(rows) < size:
            due = [
                (used / weight, i)
                for i, (used, weight) in enumerate(zip(taken, self.weights, strict=True))
                if used < len(self.sources[i])
            ]
            if not due:
                break
            _, i = min(due)
            rows.append(self.sources[i][taken[i]])
            taken[i] += 1
        return rows
