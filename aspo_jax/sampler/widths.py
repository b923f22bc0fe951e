"""Decode calls of fewer rows for the last answers, on a CPU, where that changes no bit of them.

An accelerator's step takes as long as reading the weights, however few rows there are. A CPU's
grows with them, and the last long answers of an iteration decode nearly alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax.sampler.device import Drawn, Rows
from aspo_jax.sampler.limits import Limits

LEAST = 4  # rows of a class that are worth a program of their own
STEPS = 8  # positions that are compared
WORTH = 512  # steps with half of the rows or more idle: compiling takes about as long as they waste


@dataclasses.dataclass
class Widths:
    """How many rows decode calls have.

    candidates, known: numbers of rows, most first: those that are whole classes, for a class of
    another size reads its pages in other sums; and those of them that were found to round alike.
    thin_steps: positions decoded while half of the rows or more were idle and no request waited.
    """

    candidates: tuple[int, ...]
    known: tuple[int, ...]
    thin_steps: int = 0

    @classmethod
    def of(cls, limits: Limits, class_rows: int, mesh: Mesh) -> Widths:
        """All rows, and as candidates a half and a quarter on a CPU that holds all of them."""
        every = (limits.slots,)
        # A plan has a mesh without devices, and decodes nothing.
        is_one = isinstance(mesh, Mesh) and mesh.size == 1
        is_one_cpu = is_one and mesh.devices.flat[0].platform == "cpu"
        is_enough = limits.block >= STEPS and class_rows >= LEAST
        if not is_one_cpu or not is_enough:
            return cls(every, every)
        if limits.pool_pages(shards=1) < limits.slots * limits.pages(STEPS):
            return cls(every, every)
        fewer = (limits.slots // n for n in (2, 4) if limits.slots % (n * class_rows) == 0)
        return cls((*every, *fewer), every)

    def unknown(self) -> Widths:
        """For another way to draw, of which is known what this one has ruled out."""
        return Widths(self.candidates, self.candidates[:1])

    def fitting(self, running: int) -> int:
        """The fewest rows that hold so many sequences."""
        return min(count for count in self.known if count >= running)

    def below(self, count: int) -> int:
        """The next fewer rows, 0 if there are none."""
        return max((fewer for fewer in self.known if fewer < count), default=0)

    def note(self, lengths: list[int]) -> None:
        """Count what a call drew for each sequence while no request waited."""
        longest_first, half = sorted(lengths, reverse=True), self.candidates[0] // 2
        busy = longest_first[half] if len(lengths) > half else 0
        self.thin_steps += longest_first[0] - busy

    @property
    def is_due(self) -> bool:
        """Enough was wasted to look for fewer rows."""
        return self.candidates != self.known and self.thin_steps >= WORTH

    def compare(self, draw: Callable[[int], Drawn]) -> None:
        """Find the numbers of rows that round alike; those that do not are candidates no more.

        How XLA rounds a product of some rows can depend on how many there are.

        draw: (number of rows) -> what the program of so many draws for `made_up_rows`, from an
            empty cache.
        """
        expected = draw(self.candidates[0])
        for count in self.candidates[1:]:
            first = jax.tree.map(lambda x, n=count: x[:n] if x.ndim else x, expected)
            if not jax.tree.all(jax.tree.map(np.array_equal, draw(count), first)):
                break
            self.known = (*self.known, count)
        self.candidates = self.known


def made_up_rows(limits: Limits, count: int, is_serving: bool) -> Rows:
    """Running rows at many positions, the same whatever their number, in pages of their own."""
    rows, number_N = limits.no_rows(count, is_serving), np.arange(count)
    pages = limits.pages(STEPS)
    rows.token_N[:] = number_N
    rows.drawn_N[:] = number_N % (pages * limits.page - STEPS + 1)
    rows.limit_N[:] = limits.max_response_tokens
    rows.is_running_N[:] = True
    rows.identity_N4[:] = number_N[:, None]
    rows.table_JN[:pages] = 1 + pages * number_N + np.arange(pages)[:, None]
    return rows
