"""The log: a line per iteration, strict about names, and whole after a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from aspo_jax.errors import WriteError
from aspo_jax.run.metrics import METRICS, Log, MetricsError, metrics_page, profile, read_metrics
from aspo_jax.structs import Histogram, Max, Mean

A, B = "rollout/reward_mean", "update/clip_share"
DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def test_page_is_the_one_in_docs():
    assert DOCS.read_text() == metrics_page(), "see the page itself for the command"


def test_every_metric_is_defined_and_on_the_page():
    page = metrics_page()
    for name, info in METRICS.items():
        assert info.definition and f"| `{name}` |" in page


def test_a_line_is_written_when_it_is_whole(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    path = tmp_path / "metrics.jsonl"
    log.write(0, {A: jnp.float32(0.5)})
    assert read_metrics(path) == [] and log.latest == {}
    log.write(0, {B: 0.25})
    assert read_metrics(path) == []
    log.end_row()
    assert read_metrics(path) == [{"iteration": 0, A: 0.5, B: 0.25}]
    assert log.latest == {A: 0.5, B: 0.25}
    with pytest.raises(ValueError, match="iteration 0 after iteration 1"):
        log.write(0, {A: 1.0})
    log.write(1, {A: 0.75})
    log.flush()
    assert log.latest == {A: 0.75}
    log.close()
    log.close()
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1]


def test_unknown_names_and_steps_back_are_refused(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    with pytest.raises(
        ValueError, match=r"unknown metric 'update/clip_shar' .*update/clip_share\?"
    ):
        log.write(0, {"update/clip_shar": 1.0})
    log.write(3, {A: 1.0})
    with pytest.raises(ValueError, match="iteration 2 after iteration 3"):
        log.write(2, {A: 1.0})
    log.flush()
    with pytest.raises(ValueError, match="iteration 3 after iteration 4"):
        log.write(3, {A: 1.0})
    log.close()


def test_not_finite_is_null(tmp_path):
    log = Log(tmp_path)
    log.write(0, {A: jnp.float32(jnp.nan), B: math.inf})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 0, A: None, B: None}]
    assert math.isnan(log.latest[A])


def test_a_metric_that_counted_nothing_is_absent_and_a_broken_one_null(tmp_path):
    zero, weight = jnp.zeros(()), "update/weight_positive"
    nothing = {A: Mean(zero, zero), B: Max(-jnp.inf + zero), weight: Histogram(jnp.zeros(401))}
    log = Log(tmp_path)
    log.write(0, nothing)
    log.write(1, nothing | {"update/entropy": Mean(zero * jnp.nan, zero + 3)})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"iteration": 0}, {"iteration": 1, "update/entropy": None}]


def test_resume_drops_what_will_be_written_again(tmp_path):
    log = Log(tmp_path)
    for i in range(4):
        log.write(i, {A: i / 10})
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 4, "rollout/rew')  # torn by a crash
    assert len(read_metrics(path)) == 4
    log = Log(tmp_path, start_iteration=2)
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1]
    log.write(2, {A: 0.9})
    log.close()
    assert read_metrics(path)[-1] == {"iteration": 2, A: 0.9}
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 2]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_damage_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"iteration": 0}) + "\nnot json\n")
    with pytest.raises(MetricsError, match=r"metrics.jsonl:2: not JSON"):
        read_metrics(path)
    path.write_text('{"step": 0}\n')
    with pytest.raises(MetricsError, match=r"metrics.jsonl:1: expected an object with a whole"):
        read_metrics(path)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(MetricsError, match=r"metrics.jsonl:1: not JSON"):
        read_metrics(path)


def test_a_damaged_log_is_kept_and_its_gap_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, A: i / 10}) for i in range(9)]
    lines[3:5] = ["\0" * 40]  # as a power cut leaves it
    del lines[5]
    path.write_text("\n".join(lines) + "\n")
    damaged = path.read_bytes()
    log = Log(tmp_path, start_iteration=8, tensorboard=False)
    log.write(8, {A: 0.8})
    log.close()
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 2, 5, 7, 8]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == damaged
    assert f"{path}:4: not JSON" in caplog.text and "in metrics.jsonl.damaged-1" in caplog.text
    assert "lacks iterations 3-4, 6: the run goes on from its checkpoint" in caplog.text

    caplog.clear()
    Log(tmp_path, start_iteration=9, tensorboard=False).close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # the gap alone
    assert [p.name for p in tmp_path.iterdir() if "damaged" in p.name] == [f"{path.name}.damaged-1"]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_a_message_and_never_a_wait(full_disk, tensorboard):
    log = Log(full_disk, tensorboard=tensorboard)
    log.write(0, {A: 0.5})
    log.flush()
    (full_disk / "filler").write_bytes(b"x" * (2**20 - 2**14))
    message = r"cannot write .*full_disk/(metrics.jsonl|tensorboard): No space left .*MiB free"
    with pytest.raises(WriteError, match=message):
        for i in range(1, 1000):
            log.write(i, {A: 0.5, B: 0.5})
    (full_disk / "filler").unlink()
    known = [row["iteration"] for row in read_metrics(full_disk / "metrics.jsonl")]
    assert known == list(range(len(known)))


def test_profile_only_the_chosen_iterations(tmp_path):
    with profile(1, (2,), tmp_path / "profile"):
        pass
    assert not (tmp_path / "profile").exists()
