"""The picture of the README: runs of the default with several objectives, in three panels.

python benchmarks/picture.py ASPO=RUN DAPO=RUN ... docs/countdown_objectives.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aspo_jax.run.figures import COLOURS, INK, plain
from aspo_jax.run.metrics import read_metrics

SMOOTHED = 7  # iterations


class Panel(NamedTuple):
    """A chart of one metric; ``is_held_out``: known at evaluations only."""

    metric: str
    title: str
    unit: str
    is_held_out: bool = True


PANELS = (
    Panel("evaluate/avg", "Right answers, held out", "share (avg@16)"),
    Panel("evaluate/distinct_right", "Different right answers to a puzzle", "answers of 16"),
    Panel("update/old_entropy", "Entropy", "nats per token", is_held_out=False),
)


def main(words: list[str]) -> None:
    """Draw ``LABEL=RUN`` words into the PNG that is the last word."""
    runs = {label: folder for label, _, folder in (word.partition("=") for word in words[:-1])}
    figure = Figure(figsize=(13, 3.9), dpi=120, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for panel, ax in zip(PANELS, figure.subplots(1, len(PANELS)), strict=True):
        ax.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=INK)
        ax.set_ylabel(panel.unit, fontsize=11, color=INK)
        ax.set_xlabel("iteration", fontsize=11, color=INK)
        plain(ax, 11)
        for colour, (label, folder) in zip(COLOURS, runs.items(), strict=False):
            x, y = series(Path(folder), panel.metric)
            style = {"marker": "o", "markersize": 6} if panel.is_held_out else {}
            y = y if panel.is_held_out else smooth(y)
            ax.plot(x, y, color=colour, linewidth=2.5, label=label, **style)
        ax.set_ylim(bottom=0)
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(runs),
        fontsize=13,
        frameon=False,
    )
    canvas.print_png(words[-1])


def series(folder: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get(metric) is not None]
    return np.array([row["iteration"] for row in rows]), np.array([row[metric] for row in rows])


def smooth(y: np.ndarray) -> np.ndarray:
    """A centred moving average, narrower at the ends."""
    half = SMOOTHED // 2
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


if __name__ == "__main__":
    main(sys.argv[1:])
