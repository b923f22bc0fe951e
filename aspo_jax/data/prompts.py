"""The stream of prompts: the same from the same seed, and its place in it is one integer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aspo_jax.data.countdown import CountdownSource
from aspo_jax.data.rows import DataError
from aspo_jax.data.sources import Mixture
from aspo_jax.data.tokenizer import encode, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from aspo_jax.structs import Prompt

# id, prompt (a string) or messages (a chat), answer, kind; where (file:line) and columns if any
Row = Mapping[str, Any]


def _render(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return render(tokenizer, messages)


def fitting_rows(
    source: Sequence[Row] | CountdownSource,
    *,
    tokenizer: PreTrainedTokenizerFast,
    max_prompt_tokens: int,
    remedy: Callable[[int], str] = "set Sampler.max_prompt_tokens = {} or drop the rows".format,
    too_long: list[str] | None = None,
) -> list[Row]:
    """The rows whose prompts fit, found out at the start rather than in hour five.

    remedy: what to do, from the length of the longest prompt in tokens.
    too_long: takes the names of the rows that do not fit; None: there may be none.

    Raises:
        DataError: no rows; a prompt that the vocabulary cannot spell; prompts that are longer than
            ``max_prompt_tokens``, of which the longest is named and the others are counted.
    """
    if len(source) == 0:
        raise DataError("found no prompts, expected at least one; check Data.train_path")
    rows = source.longest if isinstance(source, CountdownSource) else source
    lengths = [_length(row, tokenizer) for row in rows]
    fits = [length <= max_prompt_tokens for length in lengths]
    longest = max(lengths)
    if not any(fits) or (too_long is None and not all(fits)):
        many = sum(not fit for fit in fits)
        raise DataError(
            f"{_named(rows[lengths.index(longest)])}: found a prompt of {longest} tokens, the "
            f"longest of {many} (of {len(rows)}) that are too long, expected at most "
            f"{max_prompt_tokens}; {remedy(longest)}"
        )
    if too_long is not None:
        too_long += [_named(row) for row, fit in zip(rows, fits, strict=True) if not fit]
    return [row for row, fit in zip(rows, fits, strict=True) if fit]


def _length(row: Row, tokenizer: PreTrainedTokenizerFast) -> int:
    try:
        return len(encode(tokenizer, _render(row, tokenizer)))
    except ValueError as error:
        raise DataError(f"{_named(row)}: {error}") from error


def _named(row: Row) -> str:
    where = row.get("where", f"row {row['id']}")
    return f"{where} (id {row['id']})"


class PromptStream(Iterator["list[Prompt]"]):
    """An endless iterator of steps' prompts, or one process's share. Make one with `prompts`."""

    def __init__(self, batches: Any, tokenizer: PreTrainedTokenizerFast, draws: range):
        self._batches = batches  # index -> rows, all indices from 0
        self._tokenizer = tokenizer
        self._draws = draws  # of the first step; its stop is the number of prompts in a step
        self._drawn = 0

    def __next__(self) -> list[Prompt]:
        from aspo_jax.structs import Prompt  # here, for it loads jax

        rows = self._batches[self._drawn]
        first = self._drawn * self._draws.stop
        self._drawn += 1
        texts = [_render(row, self._tokenizer) for row in rows]
        return [
            Prompt(
                id=row["id"],
                draw=first + draw,
                text=text,
                tokens=tuple(encode(self._tokenizer, text)),
                answer=row["answer"],
                kind=row["kind"],
                columns=row.get("columns", {}),
            )
            for draw, row, text in zip(self._draws, rows, texts, strict=True)
        ]

    def state(self) -> int:
        """The number of batches drawn: all that a checkpoint needs."""
        return self._drawn

    def restore(self, state: int) -> None:
        """Go on as a stream does that has drawn ``state`` batches."""
        if state < 0:
            raise ValueError(f"a stream cannot have drawn {state} batches, expected 0 or more")
        self._drawn = state


def prompts(
    source: Sequence[Row] | CountdownSource | Mixture,
    *,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    shuffle: bool,
    prompts_per_step: int,
    process: int = 0,
    processes: int = 1,
) -> PromptStream:
    """An endless stream over ``source``, ``prompts_per_step`` at a time; see `fitting_rows`.

    One process of several reads its share of each step, prompts ``process::processes``; `draw` and
    the stream's state are those of the whole, so that a run may go on with another number.

    Every epoch holds each row once, with ``shuffle`` in an order of its own drawn from ``seed``
    (puzzles are drawn at random anyhow and keep theirs); a step may span two epochs. Of a `Mixture`
    each source has epochs of its own. `Prompt.draw` counts the prompts of the stream from 0.

    Raises:
        DataError: a step that the processes cannot share equally.
    """
    draws = share(prompts_per_step, process, processes)
    rows = _endless(source, seed, shuffle)
    # Indexed directly: grain's iterator adds threads and a state object, of which the only
    # content is this index.
    own = rows[process::processes] if processes > 1 else rows
    batches = own.batch(prompts_per_step // processes, batch_fn=list)
    return PromptStream(batches, tokenizer, draws)


def _endless(source: Any, seed: int, shuffle: bool) -> Any:
    """The rows of all epochs, from 0."""
    import grain

    if isinstance(source, Mixture):
        sources = [
            _endless(each, seed + number, shuffle) for number, each in enumerate(source.sources)
        ]
        return grain.MapDataset.mix(sources, weights=source.weights)
    rows = grain.MapDataset.source(source).seed(seed)
    is_drawn = isinstance(source, CountdownSource)  # in an order of its own already
    return (rows.shuffle() if shuffle and not is_drawn else rows).repeat()


def share(prompts_per_step: int, process: int, processes: int) -> range:
    """Which prompts of a step one process of several reads.

    Raises:
        DataError: a step that the processes cannot share equally.
    """
    if prompts_per_step % processes:
        raise DataError(
            f"{processes} processes cannot share Train.prompts_per_step = {prompts_per_step} "
            f"equally; set it to a multiple of {processes}"
        )
    return range(process, prompts_per_step, processes)
