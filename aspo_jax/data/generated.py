"""Prompts from a Python generator: made while the run goes on, in the order that it yields them.

def sums():
    draw = random.Random(0)
    while True:
        a, b = draw.randrange(100), draw.randrange(100)
        yield {"prompt": f"{a}+{b}", "answer": a + b, "kind": "exact"}

stream = generated(sums, tokenizer=tokenizer, prompts_per_step=32, max_prompt_tokens=64)
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from aspo_jax.data.prompts import PromptStream, Row, fitting_rows, share
from aspo_jax.data.rows import DataError, Place, checked_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def generated(
    make: Callable[[], Iterable[dict[str, Any]]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    prompts_per_step: int,
    max_prompt_tokens: int,
    kinds: Collection[str] | None = None,
    process: int = 0,
    processes: int = 1,
) -> PromptStream:
    """An endless stream of the rows that ``make()`` yields, ``prompts_per_step`` at a time.

    A row has the fields of a line of a data file (`read_rows`); without ``id`` its id is its
    number, from 1. A generator that ends is made again and starts from its beginning.

    The stream's state is one integer, as that of `prompts`: `PromptStream.restore` makes the
    generator anew and skips the rows of so many steps. So ``make()`` must yield the same rows
    every time: seed what it draws. Each of several processes makes all rows, and reads its share.

    kinds: the graders there are, such as `aspo_jax.rewards.KINDS`; None accepts any.

    Raises:
        DataError: a step that the processes cannot share equally. From the stream, when the step of
            the row is reached: a row that a data file could not hold either, a prompt that is too
            long or that the vocabulary cannot spell, a generator without rows.
    """

    def check(rows: list[Row]) -> None:
        fitting_rows(rows, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens)

    draws = share(prompts_per_step, process, processes)
    return PromptStream(_Steps(make, kinds, check, draws), tokenizer, draws)


class _Steps:
    """Step -> its rows, of which a process reads those of ``draws``; all of them are checked."""

    def __init__(
        self,
        make: Callable[[], Iterable[dict[str, Any]]],
        kinds: Collection[str] | None,
        check: Callable[[list[Row]], None],
        draws: range,
    ):
        self._make = make
        self._kinds = kinds
        self._check = check
        self._draws = draws
        self._rows = self._endless()
        self._step: int | None = 0  # the one that comes next; None after an error in the middle

    def __getitem__(self, step: int) -> list[Row]:
        reached, self._step = self._step, None
        if reached is None or step < reached:
            self._rows, reached = self._endless(), 0
        many = self._draws.stop
        collections.deque(itertools.islice(self._rows, (step - reached) * many), maxlen=0)
        rows: list[Row] = [
            checked_row(Place(f"row {number} of the generator", number), row, self._kinds)
            for number, row in itertools.islice(self._rows, many)
        ]
        self._check(rows)
        self._step = step + 1
        return [rows[draw] for draw in self._draws]

    def _endless(self) -> Iterator[tuple[int, Any]]:
        """(number from 1, row) of one generator after the other."""
        for times in itertools.count(1):
            number = 0
            for number, row in enumerate(self._make(), start=1):
                yield number, row
            if number == 0:
                raise DataError(
                    f"found no row in generator {times} of the stream, expected at least one; "
                    "return a new generator from every call"
                )
