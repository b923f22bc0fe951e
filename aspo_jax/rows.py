"""Token sequences laid into the rows of mini-batches, whose shapes never change, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.data import pack
from aspo_jax.structs import Minibatch, Rows


class BatchShape(NamedTuple):
    """Fixed shapes of an iteration's updates.

    minibatches: optimizer updates per pass over the rollout.
    row_tokens, rows: T of a micro-batch and B, those of all processes, which fill equal shares.
    microbatches: M, room for the worst case (every answer of the longest length).
    sequences: the most that share a row; None: any number.
    """

    minibatches: int
    microbatches: int
    rows: int
    row_tokens: int
    sequences: int | None = None


def batch_shape(
    *,
    minibatches: int,
    groups: int,
    samples_per_prompt: int,
    longest: int,
    row_tokens: int,
    rows: int,
    sequences: int | None = None,
    processes: int = 1,
) -> BatchShape:
    """Room for ``groups`` groups of a mini-batch in every process, all samples of ``longest``.

    rows: a multiple of ``processes``.
    """
    per_row = min(row_tokens // longest, sequences or row_tokens)
    worst_rows = math.ceil(groups * samples_per_prompt / per_row)
    return BatchShape(
        minibatches=minibatches,
        microbatches=math.ceil(worst_rows / (rows // processes)),
        rows=rows,
        row_tokens=row_tokens,
        sequences=sequences,
    )


def own_groups(prompts_per_step: int, minibatches: int, processes: int = 1, rounds: int = 1) -> int:
    """The most groups of one mini-batch that a single process may hold.

    Of D prompts drawn for U mini-batches, one process of n can find ``ceil(D / (U + n - 1))`` of
    its own in one: a of them in a row leave (n - 1)(a - 1) prompts of others between them, which
    were dropped, so that the mini-batch of at most ceil((D - (n - 1)(a - 1)) / U) holds all a.

    rounds: of ``prompts_per_step`` prompts each, of which so many groups train at most.
    """
    drawn = prompts_per_step * rounds
    return min(
        math.ceil(drawn / (minibatches + processes - 1)), math.ceil(prompts_per_step / minibatches)
    )


class Example(NamedTuple):
    """One sequence of L tokens to train on: an answer, or a conversation of several.

    is_response_L: True where the policy chose the token; of the first token it cannot be.
    logp_L: log-probability of those when they were sampled; the others' are not read.
    group: number of the prompt within its mini-batch.
    """

    tokens_L: np.ndarray
    is_response_L: np.ndarray
    logp_L: np.ndarray
    advantage: float
    group: int


def answered(
    prompt: Sequence[int],
    response: Sequence[int] | np.ndarray,
    logp_T: np.ndarray | float,
    advantage: float,
    group: int,
) -> Example:
    """The example of one prompt and one response; ``logp_T`` is of the response's tokens."""
    tokens_L = np.concatenate([prompt, response]).astype(np.int32)
    is_response_L = np.arange(len(tokens_L)) >= len(prompt)
    logp_L = np.zeros(len(tokens_L), np.float32)
    logp_L[is_response_L] = logp_T
    return Example(tokens_L, is_response_L, logp_L, advantage, group)


def fill(examples: Sequence[Example], shape: BatchShape, processes: int = 1) -> Minibatch:
    """Lay token sequences into rows, and these into one process's share of the micro-batches.

    Raises:
        ValueError: a sequence too long for a row, or one that begins with a token of the policy's,
            which nothing predicts.
    """
    lengths = [len(e.tokens_L) - 1 for e in examples]
    packed = pack(lengths, shape.row_tokens, shape.sequences)
    own_rows = shape.rows // processes
    rows = _empty_rows(shape.microbatches * own_rows, shape.row_tokens)
    for row, contents in enumerate(packed):
        start = 0
        for sequence_id, index in enumerate(contents, start=1):
            _write(rows, row, start, sequence_id, examples[index])
            start += lengths[index]
    stacked: dict[str, Any] = {
        name: x.reshape(shape.microbatches, own_rows, shape.row_tokens) for name, x in rows.items()
    }
    return Minibatch(rows=Rows(**stacked), count=np.int32(math.ceil(len(packed) / own_rows)))


def _empty_rows(rows: int, row_tokens: int) -> dict[str, np.ndarray]:
    types = {"is_response_BT": bool, "advantage_BT": np.float32, "sampler_logp_BT": np.float32}
    fields = Rows.__dataclass_fields__
    return {name: np.zeros((rows, row_tokens), types.get(name, np.int32)) for name in fields}


def _write(rows: dict[str, np.ndarray], row: int, start: int, sequence_id: int, e: Example):
    """One sequence of L tokens into L-1 slots: inputs ``x[:-1]``, of all else ``x[1:]``."""
    if e.is_response_L[0]:
        raise ValueError(
            f"a sequence of {len(e.tokens_L)} tokens begins with one that the policy chose, "
            "expected one that was given, such as <bos>: nothing predicts the first"
        )
    slots, is_response_T = slice(start, start + len(e.tokens_L) - 1), e.is_response_L[1:]
    values = {
        "input_BT": e.tokens_L[:-1],
        "target_BT": e.tokens_L[1:],
        "position_BT": np.arange(len(is_response_T)),
        "sequence_id_BT": sequence_id,
        "response_position_BT": np.where(is_response_T, np.cumsum(is_response_T) - 1, 0),
        "is_response_BT": is_response_T,
        "advantage_BT": np.where(is_response_T, e.advantage, 0),
        "sampler_logp_BT": np.where(is_response_T, e.logp_L[1:], 0),
        "group_id_BT": e.group,
    }
    for name, x in values.items():
        rows[name][row, slots] = x
