"""The dynamics picture and the command that compares runs."""

from __future__ import annotations

import json

import matplotlib.image
import pytest

from aspo_jax.plot import main
from aspo_jax.run.figures import PANELS, dynamics, samples_shown
from aspo_jax.run.metrics import METRICS


def _rows(scale: float = 1.0):
    names = [c.metric for panel in PANELS for c in panel.curves]
    return [{"iteration": i, **{name: scale * i for name in names}} for i in range(30)]


def test_panels_show_defined_metrics():
    for panel in PANELS:
        for curve in panel.curves:
            assert {curve.metric, *(curve.band or ())} <= set(METRICS)


@pytest.mark.parametrize("runs", [1, 9])
def test_a_picture_of_several_runs(runs, tmp_path):
    dynamics({f"run {i}": _rows(1 + i) for i in range(runs)}, tmp_path / "a.png")
    image = matplotlib.image.imread(tmp_path / "a.png")
    assert image.shape[:2] == (800, 2000) and image.std() > 0.05


def test_missing_and_null_metrics_do_not_matter(tmp_path):
    dynamics(
        {"empty": [], "null": [{"iteration": 0, "update/old_entropy": None}]}, tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no run to draw"):
        dynamics({}, tmp_path / "a.png")


def _run(folder, name):
    (folder / name).mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in _rows())
    (folder / name / "metrics.jsonl").write_text(lines)
    return str(folder / name)


def test_plot_command(tmp_path, capsys):
    runs = [_run(tmp_path, "aspo"), _run(tmp_path, "dapo")]
    out = str(tmp_path / "both.png")
    for _ in range(2):  # asked for by name: written over
        assert main([*runs, "--out", out, "--labels", "one,two"]) == 0
        assert capsys.readouterr().out == f"{out}\n"


def test_a_picture_is_not_written_over_unasked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path, "aspo")
    for name in ("comparison.png", "comparison_2.png", "comparison_3.png"):
        assert main([run]) == 0
        assert capsys.readouterr().out == f"{name}\n"
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert main([run]) == 0
    assert all(path.stat().st_mtime_ns == before[path] for path in before)


def test_shares_and_rewards_have_panels_of_their_own():
    for panel in PANELS:
        units = {METRICS[curve.metric].unit.partition(" ")[0] for curve in panel.curves}
        assert len(units) == 1, panel.title


@pytest.mark.parametrize(("k", "shown"), [((), "k"), ((16, 16), "16"), ((16, 4), "4|16")])
def test_the_legend_says_k(k, shown):
    runs = {str(i): [{"iteration": 0, "evaluate/samples": float(n)}] for i, n in enumerate(k)}
    assert samples_shown(runs) == shown


def test_plot_command_explains_mistakes(tmp_path, capsys):
    a = _run(tmp_path, "aspo")
    for argv, message in [
        ([str(tmp_path / "no")], "expected a run folder written by aspo_jax.train"),
        ([a, "--labels", "x,y"], "--labels names 2 runs, but 1 are given"),
        ([a, a], "two runs are both called 'aspo'; name them with --labels"),
        ([a, "--out", str(tmp_path / "no" / "x.png")], "no does not exist"),
    ]:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
