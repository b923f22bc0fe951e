"""Recorded rollouts: what is written is what was sampled and trained on, and comes back as such."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_toy import FAILED, RIGHT, WRONG, rollout_of

from aspo_jax import recording
from aspo_jax.losses import group_zscore
from aspo_jax.recording import (
    COMPARED,
    SCHEMA,
    RecordError,
    Trained,
    examples,
    read_rollout,
    recorded_iterations,
    rollout_rows,
    write_rollout,
)
from aspo_jax.rollout import assemble
from aspo_jax.rows import batch_shape, fill
from aspo_jax.structs import OldPolicy

SHAPE = batch_shape(
    minibatches=2, groups=4, samples_per_prompt=3, longest=40, row_tokens=48, rows=2
)


def old_of(part, number: int) -> OldPolicy:
    """Numbers that say where they stand."""
    place = np.arange(part.rows.target_BT.size, dtype=np.float32).reshape(part.rows.target_BT.shape)
    values: Any = [jax.numpy.asarray(place + 1000 * (k + number)) for k in range(2)]
    return OldPolicy(*values)


@pytest.fixture
def rollout():
    return rollout_of(
        [
            [RIGHT, WRONG, WRONG],
            [RIGHT, RIGHT, RIGHT],  # no signal
            [RIGHT, FAILED, WRONG],
            [WRONG, RIGHT, WRONG],
            [RIGHT, RIGHT, WRONG],
        ]
    )


@pytest.fixture
def minibatches(rollout):
    return assemble(rollout, group_zscore(), SHAPE)[0]


@pytest.fixture
def written(rollout, minibatches, tmp_path):
    trained = [Trained(i, part.rows, old_of(part, i)) for i, part in enumerate(minibatches)]
    write_rollout(tmp_path, 7, rollout_rows(rollout, trained, 7, seed=5))
    return read_rollout(tmp_path, 7)


def test_every_sample_is_there_with_its_verdict(rollout, written):
    assert len(written) == len(rollout.samples) == 15
    for row, sample in zip(written, rollout.samples, strict=True):
        c = sample.completion
        assert row["prompt_tokens"] == list(sample.prompt.tokens)
        assert row["response_tokens"] == c.tokens_T.tolist()
        assert row["sampler_logp"] == c.logp_T.tolist()
        assert (row["id"], row["draw"]) == (sample.prompt.id, sample.prompt.draw)
        assert (row["response"], row["ending"]) == (sample.text, c.ending)
        assert (row["reward"], row["reason"]) == (sample.verdict.reward, sample.verdict.reason)
        assert (row["iteration"], row["seed"], row["valid"]) == (7, 5, sample.is_valid)
        assert row["identity"] == f"0 {row['draw']} 0 {row['sample']}"
    assert [row["sample"] for row in written] == [0, 1, 2] * 5


def test_what_was_not_trained_on_has_no_minibatch(written):
    trained = [row["minibatch"] is not None for row in written]
    assert trained == [True] * 3 + [False] * 3 + [True, False] + [True] * 7
    for row, is_trained in zip(written, trained, strict=True):
        assert (row["old_logp"] is not None) == (row["old_entropy"] is not None) == is_trained
        assert row["ref_logp"] is None
        assert is_trained or row["advantage"] == 0


def test_the_rows_come_back_as_they_were(minibatches, written):
    """Laid out again, tokens, advantages and all log-probabilities are where they were."""
    for number, part in enumerate(minibatches):
        own = [row for row in written if row["minibatch"] == number]
        again = fill(examples(own), SHAPE)
        jax.tree.map(np.testing.assert_array_equal, again, part)
        old: Any = old_of(part, number)
        is_response = part.rows.is_response_BT
        for name in COMPARED[:2]:
            found = fill(examples(own, name), SHAPE).rows.sampler_logp_BT
            expected = np.where(is_response, getattr(old, f"{name}_BT"), 0)
            np.testing.assert_array_equal(found, expected)


def test_an_iteration_that_is_done_again_replaces_its_file(rollout, tmp_path):
    for seed in (1, 2):
        write_rollout(tmp_path, 4, rollout_rows(rollout, [], 4, seed))
    write_rollout(tmp_path, 12, rollout_rows(rollout, [], 12, 0))
    assert recorded_iterations(tmp_path) == [4, 12]
    assert {row["seed"] for row in read_rollout(tmp_path, 4)} == {2}
    assert len(read_rollout(tmp_path, 4)) == 15


def test_each_process_has_a_file_of_its_own(rollout, tmp_path):
    rows = rollout_rows(rollout, [], 0, 0)
    for process in (1, 0):
        own = [row for row in rows if row["draw"] % 2 == process]
        write_rollout(tmp_path, 0, own, process)
    assert [(row["draw"], row["sample"]) for row in read_rollout(tmp_path, 0)] == [
        (row["draw"], row["sample"]) for row in rows
    ]


def test_a_file_is_whole_or_not_there(rollout, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recording, "write_bytes_atomic", fail)
    with pytest.raises(KeyboardInterrupt):
        write_rollout(tmp_path, 3, rollout_rows(rollout, [], 3, 0))
    assert recorded_iterations(tmp_path) == []


def test_what_cannot_be_read_is_said(rollout, tmp_path):
    with pytest.raises(RecordError, match=r"no rollout of iteration 3; recorded: none .*Train"):
        read_rollout(tmp_path, 3)
    write_rollout(tmp_path, 2, rollout_rows(rollout, [], 2, 0))
    with pytest.raises(RecordError, match="no rollout of iteration 3; recorded: 2"):
        read_rollout(tmp_path, 3)
    path = tmp_path / "rollouts" / "000002-0.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table.drop_columns(["old_logp"]), path)
    with pytest.raises(RecordError, match="000002-0.parquet: no column old_logp"):
        read_rollout(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecordError, match="000002-0.parquet: cannot be read"):
        read_rollout(tmp_path, 2)


def test_other_programs_read_the_files(written, tmp_path):
    table = pq.read_table(tmp_path / "rollouts")
    assert table.schema.names == SCHEMA.names and table.num_rows == 15
    assert table.schema.field("old_logp").type == pa.list_(pa.float32())
