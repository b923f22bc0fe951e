"""The dynamics of runs in one picture: what the paper watches, panel by panel.

The panels are those of arXiv 2510.06062, Figures 2, 3, 5 and 6 (score, entropy, repetition,
clip ratio, KL, length, mean ratio of responses by sign), and the ASPO weights of each sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart under every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GRID = "#333333", "#e4e4e4"


class Curve(NamedTuple):
    """One line of a panel; a band needs the names of its lower and upper edge.

    {k} in a label is the number of samples per held-out prompt.
    """

    metric: str
    label: str = ""
    dash: Literal["-", "--", ":"] = "-"
    has_markers: bool = False
    band: tuple[str, str] | None = None


class Panel(NamedTuple):
    """One small chart."""

    title: str
    unit: str
    curves: tuple[Curve, ...]


def _weights(sign: str) -> tuple[Curve, ...]:
    name = f"update/weight_{sign}"
    return (Curve(f"{name}_q50", band=(f"{name}_q10", f"{name}_q90")),)


PANELS = (
    Panel(
        "Right answers, held out",
        "share",
        (
            Curve("evaluate/avg", "avg@{k}", has_markers=True),
            Curve("evaluate/pass_any", "pass@{k}", "--", has_markers=True),
        ),
    ),
    Panel(
        "Mean reward",
        "reward",
        (
            Curve("evaluate/reward_mean", "held out", has_markers=True),
            Curve("rollout/reward_mean", "training", ":"),
        ),
    ),
    Panel("Entropy", "nats", (Curve("update/old_entropy"),)),
    Panel("Repetition", "share of 20-grams", (Curve("rollout/repetition"),)),
    Panel("Clip ratio", "share of tokens", (Curve("update/clip_share"),)),
    Panel("KL to the old policy", "nats", (Curve("update/ratio_kl"),)),
    Panel("Response length", "tokens", (Curve("rollout/response_length"),)),
    Panel(
        "Mean ratio of responses",
        "ratio",
        (
            Curve("update/response_ratio_positive", "A > 0"),
            Curve("update/response_ratio_negative", "A < 0", "--"),
        ),
    ),
    Panel("Token weight, A > 0", "weight: median, 10 and 90 %", _weights("positive")),
    Panel("Token weight, A < 0", "weight: median, 10 and 90 %", _weights("negative")),
)


def dynamics(runs: Mapping[str, Rows], path: str | Path) -> None:
    """Draw the runs, one colour each, over one another and save the PNG at ``path``.

    runs: label -> the rows of the run's metrics.jsonl.

    Raises ValueError if there is no run.
    """
    if not runs:
        raise ValueError("no run to draw; expected at least one")
    figure = Figure(figsize=(20, 8), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 5, gridspec_kw={"wspace": 0.06, "hspace": 0.09})
    for panel, ax in zip(PANELS, axes.flat, strict=True):
        _draw(ax, panel, runs)
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3) for i in range(len(runs))
    ]
    place, columns = "outside upper center", min(len(runs), 5)
    figure.legend(handles, list(runs), loc=place, ncols=columns, frameon=False, fontsize=13)
    words = "iteration   (faint: every iteration, full: moving average)"
    figure.supxlabel(words, fontsize=10, color=INK)
    canvas.print_png(str(path))


def plain(ax: Axes, size: float) -> None:
    """The look of every chart: a faint grid behind what is drawn, a line below and no frame.

    size: of the numbers along the axes.
    """
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=size, colors=INK, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _draw(ax: Axes, panel: Panel, runs: Mapping[str, Rows]) -> None:
    ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.set_ylabel(panel.unit, fontsize=9, color=INK)
    plain(ax, 9)
    ax.spines["bottom"].set_color("#bbbbbb")
    drawn = [
        _curve(ax, curve, rows, COLOURS[i % len(COLOURS)])
        for i, rows in enumerate(runs.values())
        for curve in panel.curves
    ]
    if not any(drawn):
        ax.text(
            0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color="#888"
        )
        ax.set(xticks=[], yticks=[])
        return
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(panel.curves) > 1:
        k = samples_shown(runs)
        keys = [
            Line2D([], [], color=INK, linestyle=c.dash, label=c.label.format(k=k))
            for c in panel.curves
        ]
        ax.legend(handles=keys, fontsize=8, frameon=False)


def samples_shown(runs: Mapping[str, Rows]) -> str:
    """16, or 4|16 where runs differ; k where none says."""
    name = "evaluate/samples"
    found = {int(row[name]) for rows in runs.values() for row in rows if row.get(name)}
    return "|".join(map(str, sorted(found))) or "k"


def _curve(ax: Axes, curve: Curve, rows: Rows, colour: str) -> bool:
    """Draw one line; False if the run did not record it."""
    x, y = _series(rows, curve.metric)
    if not len(x):
        return False
    if curve.has_markers:
        ax.plot(x, y, curve.dash, color=colour, linewidth=2, marker="o", markersize=5)
        return True
    for edge in curve.band or ():
        edge_x, edge_y = _series(rows, edge)
        ax.plot(edge_x, _moving_average(edge_y), "-", color=colour, linewidth=0.9, alpha=0.6)
    if curve.band is None:
        ax.plot(x, y, curve.dash, color=colour, linewidth=0.8, alpha=0.3)
    ax.plot(x, _moving_average(y), curve.dash, color=colour, linewidth=2)
    return True


def _series(rows: Rows, metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["iteration"], row[metric]) for row in rows if row.get(metric) is not None]
    table = np.array(points, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _moving_average(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a twelfth of the run, narrower at the ends."""
    half = len(y) // 24
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])
