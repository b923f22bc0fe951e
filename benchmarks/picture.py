"""The pictures of the README: runs with several objectives, a panel for each of some metrics.

    python benchmarks/picture.py ASPO=RUN DAPO=RUN ... docs/countdown_objectives.png
    python benchmarks/picture.py --panels reward,avg,entropy ASPO=RUN ASPO=RUN DAPO=RUN ... OUT.png

Runs of one label, seeds, share a colour: each is a thin line and their mean a thick one.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aspo_jax.run.figures import COLOURS, INK, plain
from aspo_jax.run.metrics import read_metrics

SMOOTHED = 7  # iterations; fewer in a run of less than 30


class Panel(NamedTuple):
    """A chart of one metric; ``is_held_out``: known at evaluations only."""

    metric: str
    title: str
    unit: str
    is_held_out: bool = True


PANELS = {
    "avg": Panel("evaluate/avg", "Right answers, held out", "share of all samples"),
    "distinct": Panel(
        "evaluate/distinct_right", "Different right answers to a puzzle", "answers of 16"
    ),
    "entropy": Panel("update/old_entropy", "Entropy", "nats per token", is_held_out=False),
    "length": Panel("rollout/response_length", "Length of a response", "tokens", is_held_out=False),
    "reward": Panel("rollout/reward_mean", "Right answers, training", "share", is_held_out=False),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--panels", default="avg,distinct,entropy", help=", ".join(PANELS))
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("png", type=Path)
    a = parser.parse_args()
    runs: dict[str, list[Path]] = defaultdict(list)
    for label, _, folder in (word.partition("=") for word in a.runs):
        runs[label].append(Path(folder))
    panels = [PANELS[name] for name in a.panels.split(",")]
    figure = Figure(figsize=(13, 3.9), dpi=120, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for panel, ax in zip(panels, figure.subplots(1, len(panels)), strict=True):
        ax.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=INK)
        ax.set_ylabel(panel.unit, fontsize=11, color=INK)
        ax.set_xlabel("iteration", fontsize=11, color=INK)
        plain(ax, 11)
        for colour, (label, folders) in zip(COLOURS, runs.items(), strict=False):
            draw(ax, panel, label, folders, colour)
        ax.set_ylim(bottom=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *(handles, labels), loc="outside upper center", ncols=len(runs), fontsize=13, frameon=False
    )
    canvas.print_png(str(a.png))
    return 0


def draw(ax: Any, panel: Panel, label: str, folders: Sequence[Path], colour: str) -> None:
    """The runs of one label."""
    marks = {"marker": "o", "markersize": 6} if panel.is_held_out else {}
    found = [series(folder, panel.metric) for folder in folders]
    lines = [(x, y if panel.is_held_out else smooth(y)) for x, y in found]
    if len(lines) > 1:
        for x, y in lines:
            ax.plot(x, y, color=colour, linewidth=1, alpha=0.5, **marks)
        marks = {}
    mean = np.mean([y for _, y in lines], axis=0)
    ax.plot(lines[0][0], mean, color=colour, linewidth=2.5, label=label, **marks)


def series(folder: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get(metric) is not None]
    return np.array([row["iteration"] for row in rows]), np.array([row[metric] for row in rows])


def smooth(y: np.ndarray) -> np.ndarray:
    """A centred moving average, narrower at the ends."""
    half = min(SMOOTHED // 2, len(y) // 10)
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


if __name__ == "__main__":
    sys.exit(main())
