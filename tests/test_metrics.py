"""The log: a line per iteration, strict about names, and whole after a crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import pytest

from aspo_jax.errors import UserError, WriteError
from aspo_jax.run.metrics import (
    Log,
    MetricsError,
    metrics_page,
    profile,
    read_metrics,
    update_name,
)
from aspo_jax.run.writers import JsonLines, Open, Start, TensorBoard, rows_to, trackio, wandb
from aspo_jax.structs import Histogram, Max, Mean

A, B = "rollout/reward_mean", "update/clip_share"
DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def _log(folder: Path, start_iteration: int = 0, *writers: Open) -> Log:
    start = Start(folder, start_iteration, {"Run.seed": 0})
    return Log(start_iteration, [open_(start) for open_ in (JsonLines, *writers)])


def test_page_is_the_one_in_docs():
    assert DOCS.read_text() == metrics_page(), "see the page itself for the command"


def test_a_line_is_written_when_it_is_whole(tmp_path):
    log = _log(tmp_path)
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
    log = _log(tmp_path)
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
    log = _log(tmp_path, 0, TensorBoard)
    log.write(0, {A: jnp.float32(jnp.nan), B: math.inf})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 0, A: None, B: None}]
    assert math.isnan(log.latest[A])


def test_a_metric_that_counted_nothing_is_absent_and_a_broken_one_null(tmp_path):
    zero, weight = jnp.zeros(()), "update/weight_positive"
    nothing = {A: Mean(zero, zero), B: Max(-jnp.inf + zero), weight: Histogram(jnp.zeros(401))}
    log = _log(tmp_path, 0, TensorBoard)
    log.write(0, nothing)
    log.write(1, nothing | {"update/entropy": Mean(zero * jnp.nan, zero + 3)})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"iteration": 0}, {"iteration": 1, "update/entropy": None}]


def test_resume_drops_what_will_be_written_again(tmp_path):
    log = _log(tmp_path, 0, TensorBoard)
    for i in range(4):
        log.write(i, {A: i / 10})
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 4, "rollout/rew')  # torn by a crash
    assert len(read_metrics(path)) == 4
    log = _log(tmp_path, 2, TensorBoard)
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
    log = _log(tmp_path, 8)
    log.write(8, {A: 0.8})
    log.close()
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 2, 5, 7, 8]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == damaged
    assert f"{path}:4: not JSON" in caplog.text and "in metrics.jsonl.damaged-1" in caplog.text
    assert "lacks iterations 3-4, 6: the run goes on from its checkpoint" in caplog.text

    caplog.clear()
    _log(tmp_path, 9).close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # the gap alone
    assert [p.name for p in tmp_path.iterdir() if "damaged" in p.name] == [f"{path.name}.damaged-1"]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_a_message_and_never_a_wait(full_disk, tensorboard):
    log = _log(full_disk, 0, *[TensorBoard] * tensorboard)
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
    for iteration in (1, 2):
        with profile(iteration, (2,), tmp_path / "profile"):
            jnp.ones(3).block_until_ready()
        assert any(tmp_path.rglob("*.xplane.pb")) == (iteration == 2)


# --- writers ----------------------------------------------------------------------------------


def test_every_writer_gets_every_row_and_the_names_of_a_strangers_rule(tmp_path):
    rows = []
    log = _log(tmp_path, 0, rows_to(lambda iteration, row: rows.append((iteration, dict(row)))))
    log.write(0, {A: 0.5, "rule/mine": Mean(jnp.float32(3), jnp.float32(2))})
    log.write(1, {A: 0.25})
    log.close()
    assert rows == [(0, {A: 0.5, "rule/mine": 1.5}), (1, {A: 0.25})]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["rule/mine"] == 1.5
    assert update_name("mine") == "rule/mine"
    assert update_name("clip_share") == B and update_name("weight_positive").startswith("update/")


def test_a_log_without_writers_fetches_nothing():
    log = Log()
    log.write(0, {A: cast(Any, object())})
    log.flush()
    log.close()
    assert log.latest == {}


def test_wandb_offline_keeps_the_rows_in_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    code = _WRITE.format(folder=str(tmp_path), writer="wandb(project='p', mode='offline')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"rollout/reward_mean" in record.read_bytes(), done.stderr


def test_trackio_keeps_the_rows_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    code = _WRITE.format(folder=str(tmp_path), writer="trackio(project='p')")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept")}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "kept" / "p.db")) as kept:
        rows = kept.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)[A]) for step, metrics in rows] == [(0, 0.5), (1, 0.25)]


_WRITE = """
from pathlib import Path
from aspo_jax.run.metrics import Log
from aspo_jax.run.writers import JsonLines, Start, trackio, wandb
start = Start(Path({folder!r}), 0, {{"Run.seed": 0}})
log = Log(0, [JsonLines(start), {writer}(start)])
for iteration, reward in enumerate((0.5, 0.25)):
    log.write(iteration, {{"rollout/reward_mean": reward, "update/grad_norm": float("nan")}})
log.close()
log.close()
"""


@pytest.mark.parametrize("writer", [wandb, trackio])
def test_a_writer_that_is_not_installed_is_named_with_its_extra(writer, monkeypatch):
    monkeypatch.setitem(sys.modules, writer.__name__, None)
    message = rf"names {writer.__name__}, .*installed; pip install 'aspo_jax\[{writer.__name__}\]'"
    with pytest.raises(UserError, match=message):
        writer(project="p")
