"""Whole rollouts in Parquet files, to be read by anyone and replayed: ``RUN/rollouts/*.parquet``.

One file per iteration of ``Train.record`` and process, ``000020-0.parquet``, whole or not there; an
iteration that is done again after a resume replaces its own. One row per sample, `SCHEMA`; lists
have one entry per token of the response. What was not trained on (its group had no signal, or its
grader failed) has no mini-batch, no old log-probabilities and advantage 0.
"""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aspo_jax.errors import UserError, writing
from aspo_jax.files import write_bytes_atomic
from aspo_jax.rollout import Rollout
from aspo_jax.rows import Example, answered
from aspo_jax.run.folder import ROLLOUTS
from aspo_jax.sampler import TRAIN
from aspo_jax.structs import OldPolicy, Rows

Row = dict[str, Any]  # of a sample, by the names of `SCHEMA`

# What the update compared itself with: old_logp, old_entropy, ref_logp, ...
COMPARED = tuple(field.name.removesuffix("_BT") for field in dataclasses.fields(OldPolicy))

SCHEMA = pa.schema(
    {
        "iteration": pa.int64(),  # updates of so many iterations had been made when it was sampled
        "minibatch": pa.int64(),  # number of its mini-batch in the iteration; null: not trained on
        "group": pa.int64(),  # number of its prompt in the mini-batch
        "id": pa.string(),  # of its prompt
        "draw": pa.int64(),  # number of its prompt in the data stream
        "sample": pa.int64(),  # number among the samples of the prompt
        "seed": pa.int64(),  # with the identity it names the random draws
        "identity": pa.string(),  # domain, draw, retry and sample
        "prompt_tokens": pa.list_(pa.int32()),
        "response_tokens": pa.list_(pa.int32()),
        "response": pa.large_string(),  # as text
        "ending": pa.string(),  # how the response ended
        "reward": pa.float64(),
        "reason": pa.string(),  # of the verdict
        "valid": pa.bool_(),  # it could be learned from
        "advantage": pa.float32(),
        "sampler_logp": pa.list_(pa.float32()),  # of the whole softmax, as the sampler computed it
        **{name: pa.list_(pa.float32()) for name in COMPARED},  # by the trainer; nats
    }
)


class RecordError(UserError):
    """There is no recorded rollout, or it is damaged."""


class Trained(NamedTuple):
    """A mini-batch: its number in the iteration, its rows on the host, and what was computed."""

    number: int
    rows: Rows
    old: OldPolicy | None


def rollout_rows(
    rollout: Rollout, trained: Sequence[Trained], iteration: int, seed: int
) -> list[Row]:
    """A rollout as rows, with what became of each sample in the mini-batches.

    A sample is known in them by its tokens and log-probabilities; two samples that agree in all
    of these are the same to a rule.
    """
    found: dict[bytes, list[Row]] = defaultdict(list)
    for part in trained:
        for key, row in _sequences(part):
            found[key].append(row)
    rows = []
    for i, sample in enumerate(rollout.samples):
        c, number = sample.completion, i % rollout.samples_per_prompt
        prompt = np.asarray(sample.prompt.tokens, np.int32)
        same = found[_key(np.concatenate([prompt, c.tokens_T]), c.policy_logp_T)]
        rows.append(
            {
                "iteration": iteration,
                "id": sample.prompt.id,
                "draw": sample.prompt.draw,
                "sample": number,
                "seed": seed,
                "identity": f"{TRAIN} {sample.prompt.draw} 0 {number}",
                "prompt_tokens": prompt,
                "response_tokens": np.asarray(c.tokens_T, np.int32),
                "response": sample.text,
                "ending": c.ending,
                "reward": sample.verdict.reward,
                "reason": sample.verdict.reason,
                "valid": sample.is_valid,
                "advantage": 0.0,
                "sampler_logp": np.asarray(c.policy_logp_T, np.float32),
                **(same.pop(0) if same and sample.is_valid else {}),
            }
        )
    return rows


def _key(tokens: np.ndarray, logp_T: np.ndarray) -> bytes:
    return np.asarray(tokens, np.int32).tobytes() + np.asarray(logp_T, np.float32).tobytes()


def _sequences(part: Trained) -> Iterator[tuple[bytes, Row]]:
    """What a mini-batch says of each of its sequences, and what each is known by."""
    rows: Any = part.rows
    flat = {f.name: _flat(getattr(rows, f.name)) for f in dataclasses.fields(Rows)}
    old = part.old and {name: getattr(part.old, f"{name}_BT") for name in COMPARED}
    compared = {name: _flat(_own(x)) for name, x in (old or {}).items() if x is not None}
    for b, id_T in enumerate(flat["sequence_id_BT"]):
        for number in range(1, int(id_T.max()) + 1):
            slots = np.flatnonzero(id_T == number)
            chosen = slots[flat["is_response_BT"][b, slots]]
            tokens = np.append(flat["input_BT"][b, slots[:1]], flat["target_BT"][b, slots])
            yield (
                _key(tokens, flat["sampler_logp_BT"][b, chosen]),
                {
                    "minibatch": part.number,
                    "group": int(flat["group_id_BT"][b, chosen[0]]),
                    "advantage": float(flat["advantage_BT"][b, chosen[0]]),
                    **{name: x[b, chosen] for name, x in compared.items()},
                },
            )


def _flat(x_MBT: np.ndarray) -> np.ndarray:
    return np.reshape(x_MBT, (-1, np.shape(x_MBT)[-1]))


def _own(x_MBT: Any) -> np.ndarray:
    """The rows of this process of an array that all have a share of."""
    shards = {shard.index[1].start or 0: shard.data for shard in x_MBT.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)], axis=1)


# --- files --------------------------------------------------------------------------------------


def write_rollout(run: Path, iteration: int, rows: Sequence[Row], process: int = 0) -> None:
    """Keep one process's samples of an iteration; what an earlier try of it left is replaced."""
    place = run / ROLLOUTS
    with writing(place):
        place.mkdir(exist_ok=True)
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), out, compression="zstd")
    write_bytes_atomic(place / f"{iteration:06d}-{process}.parquet", out.getvalue())


def recorded_iterations(run: Path) -> list[int]:
    """The iterations of which the run has a rollout, in order."""
    return sorted({int(p.stem.partition("-")[0]) for p in (run / ROLLOUTS).glob("*-*.parquet")})


def read_rollout(run: Path, iteration: int) -> list[Row]:
    """The samples of an iteration, of all processes, in the order of the data stream.

    Raises:
        RecordError: there are none, or a file is damaged.
    """
    rows: list[Row] = []
    for path in sorted((run / ROLLOUTS).glob(f"{iteration:06d}-*.parquet")):
        try:
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowException) as error:
            raise RecordError(
                f"{path}: cannot be read ({error}); put back a copy, or choose another --iteration"
            ) from error
        if missing := set(SCHEMA.names) - set(table.schema.names):
            raise RecordError(f"{path}: no column {', '.join(sorted(missing))}; put back a copy")
        rows += table.to_pylist()
    if not rows:
        known = ", ".join(map(str, recorded_iterations(run))) or "none"
        raise RecordError(
            f"{run / ROLLOUTS}: no rollout of iteration {iteration}; recorded: {known} "
            "(Train.record says how often a run keeps one)"
        )
    return sorted(rows, key=lambda row: (row["draw"], row["sample"]))


def trained_on(rows: Sequence[Row]) -> list[int]:
    """The mini-batches that the rows are of."""
    return sorted({row["minibatch"] for row in rows if row["minibatch"] is not None})


def examples(rows: Sequence[Row], logp: str = "sampler_logp") -> list[Example]:
    """The sequences of a mini-batch's rows; ``logp`` names what stands for their log-probs."""
    return [
        answered(
            row["prompt_tokens"],
            np.asarray(row["response_tokens"], np.int32),
            np.asarray(row[logp], np.float32),
            row["advantage"],
            row["group"],
        )
        for row in rows
    ]
