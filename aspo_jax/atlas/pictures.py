"""Pictures of rules: maps of the token weight, and curves over the ratio.

A map is what arXiv 2510.06062 shows in its Figure 4, for any rule: each pair of probabilities has
the colour of its token's weight. Colours run from dark (below 1) over grey (1) to light (above 1),
so that they keep their order without colour and under every common colour blindness; a weight of
0, a token that is masked, is hatched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from aspo_jax.atlas.views import PLACES, RATIOS, Charted, edges
from aspo_jax.run.figures import COLOURS, GRID, INK

SIGNS = {1: "A > 0", -1: "A < 0"}
# From dark to light all the way.
LIGHTNESS = ["#08254f", "#1f4e8c", "#5b86b8", "#a3a3a3", "#e8a33d", "#f7d26a", "#fff6c8"]
COLOUR_MAP = LinearSegmentedColormap.from_list("weight", LIGHTNESS, N=32)  # bands: 8 per octave
LEVELS = (1 / 4, 1 / 2, 1, 2, 4)  # ticks of the colour bar
FLOOR, TOP = 1 / 16, 16.0  # of the curves' axis; below the floor is the strip of zeros
ZERO = FLOOR / 1.7  # where a zero is drawn
LINE = 0.02  # share of a map below which its zeros are a line: a bias turns its sign there
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)))


class Chart(NamedTuple):
    """A rule to draw: its name, what to say of its settings, and its views."""

    name: str
    settings: str
    views: Sequence[Charted]


# --- one rule -----------------------------------------------------------------------------------


def draw_rule(chart: Chart) -> Figure:
    """Maps for A > 0 and A < 0 and the curves of both, one row for each view."""
    rows = len(chart.views)
    figure = Figure(figsize=(9.6, 0.8 + 3.0 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, 3, squeeze=False, width_ratios=(1, 1, 1.1))
    figure.suptitle(chart.name, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    held = chart.views[0].view.caption if rows == 1 else ""
    words = "\n".join(filter(None, (chart.settings, held and f"held: {held}")))
    figure.supxlabel(words, x=0.01, ha="left", fontsize=9, color=INK)
    for row, charted in zip(axes, chart.views, strict=True):
        norm = _norm(charted)
        for ax, sign in zip(row, SIGNS, strict=False):
            image = _map(ax, charted, sign, norm)
        extend = "neither" if charted.shows == "bias" else "both"
        bar = figure.colorbar(image, ax=row[1], fraction=0.06, pad=0.03, extend=extend)
        _label_bar(bar, charted)
        _curves(row[2], charted)
    return figure


def _norm(charted: Charted) -> Normalize:
    """Value -> place in the colours, after `_scaled`."""
    if charted.shows != "bias":
        return Normalize(-2, 2)
    largest = max(np.abs(values).max() for values in charted.maps.values())
    return Normalize(-largest, largest)


def _scaled(charted: Charted, values: np.ndarray) -> np.ndarray:
    """Weights in powers of 2, a bias as it is; NaN where there is nothing to colour."""
    if charted.shows == "bias":
        return np.where(values == 0, np.nan, values)
    return np.log2(np.where(values > 0, values, np.nan))


def _map(ax: Axes, charted: Charted, sign: int, norm: Normalize) -> Any:
    values = charted.maps[sign]
    _frame(ax, f"{SIGNS[sign]}   {charted.view.label}".strip())
    ax.set_facecolor("white")
    image = ax.imshow(
        _scaled(charted, values),
        origin="lower",
        extent=(0, 1, 0, 1),
        cmap=COLOUR_MAP,
        norm=norm,
        interpolation="nearest",
    )
    has_rays = charted.is_of_ratio and charted.shows == "weight"
    if np.mean(values == 0) > LINE:
        _hatch(ax, values == 0, "////", "#8a8a8a", has_border=not has_rays)
    if charted.shows != "bias":
        _hatch(ax, values < 0, "xxxx", "#b2182b")
    ax.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
    if has_rays:
        _rays(ax, next(iter(charted.curves[sign].values())))
    first, second = (_symbol(name) for name in charted.view.axes)
    ax.set_xlabel(first, fontsize=10, color=INK)
    ax.set_ylabel(second, fontsize=10, color=INK)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    return image


def _hatch(ax: Axes, where: np.ndarray, pattern: str, colour: str, has_border: bool = True) -> None:
    """Hatch a region and draw its border."""
    if not where.any():
        return
    levels = (0.5, 1.5)
    filled = ax.contourf(PLACES, PLACES, where, levels=levels, colors="none", hatches=[pattern])
    filled.set(edgecolor=colour, linewidth=0)
    if has_border and not where.all():
        ax.contour(PLACES, PLACES, where, levels=levels[:1], colors="black", linewidths=1.2)


def _rays(ax: Axes, curve: np.ndarray) -> None:
    """The ratios where a rule's curve jumps (full) or bends (dashed), as lines through 0."""
    found = edges(curve)
    for ratios, dash in ((found.jumps, "-"), (found.bends, "--")):
        for ratio in ratios:
            x, y = (1 / ratio, 1) if ratio > 1 else (1, ratio)
            ax.plot([0, x], [0, y], dash, color="black", linewidth=1.2)
            text = f"{ratio:.2f}" if 2 / 3 < ratio < 1.5 else f"{ratio:.2g}"
            if ratio > 1:
                ax.text(x, 1.02, text, fontsize=8, color=INK, ha="center", va="bottom")
            else:
                ax.text(1.02, y, text, fontsize=8, color=INK, ha="left", va="center")


def _label_bar(bar: Any, charted: Charted) -> None:
    words = {"weight": "weight w", "coefficient": "(w A + b) / A", "bias": "bias b"}
    bar.set_label(words[charted.shows], fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    if charted.shows != "bias":
        bar.set_ticks([np.log2(x) for x in LEVELS], labels=[_number(x) for x in LEVELS])


def _curves(ax: Axes, charted: Charted) -> None:
    first, second = (_symbol(name) for name in charted.view.axes)
    _frame(ax, "over the ratio")
    ax.set_box_aspect(0.9)
    _axes_of_curves(ax, charted.shows, [charted])
    ax.set_xlabel(f"{second} / {first}", fontsize=10, color=INK)
    for sign, colour, dash in zip(SIGNS, COLOURS, DASHES, strict=False):
        for i, values in enumerate(charted.curves[sign].values()):
            width = 2.2 if i == 0 else 1.1
            line = {"color": colour, "linestyle": dash, "linewidth": width}
            for x, y in _pieces(values, ax.get_yscale()):
                ax.plot(x, y, **line)
    keys = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2.2, label=label)
        for label, colour, dash in zip(SIGNS.values(), COLOURS, DASHES, strict=False)
    ]
    ax.legend(handles=keys, fontsize=9, frameon=False, loc="best")


# --- several rules ------------------------------------------------------------------------------


def draw_overlay(charts: Sequence[Chart], title: str = "") -> Figure:
    """The curves of several rules over one another, one panel for each sign; biases not."""
    lines = list(_lines(charts))
    figure = Figure(
        figsize=(9.6, 4.3 + 0.2 * (len(lines) // 5)), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(1, 2, sharey=True)
    for ax, sign in zip(axes, SIGNS, strict=True):
        _frame(ax, SIGNS[sign])
        _axes_of_curves(ax, "weight", [line.charted for line in lines])
        ax.set_xlabel("ratio", fontsize=10, color=INK)
        for i, line in enumerate(lines):
            values = next(iter(line.charted.curves[sign].values()))
            # Where curves coincide, those below show at the sides of those above.
            width, zero = 1.5 + 5 * (1 - i / len(lines)), ZERO * 1.3 ** (1 - 2 * i / len(lines))
            for x, y in _pieces(values, ax.get_yscale(), zero):
                ax.plot(x, y, color=line.colour, linestyle=line.dash, linewidth=width)
    axes[0].set_ylabel("weight w", fontsize=10, color=INK)
    handles = [
        Line2D([], [], color=line.colour, linestyle=line.dash, linewidth=2, label=line.label)
        for line in lines
    ]
    columns = max(1, min(len(handles), 5))
    place = "outside lower center"
    figure.legend(handles=handles, loc=place, ncols=columns, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


class _Line(NamedTuple):
    label: str
    charted: Charted
    colour: str
    dash: Any


def _lines(charts: Sequence[Chart]) -> Iterator[_Line]:
    number = 0
    for chart in charts:
        for charted in chart.views:
            if charted.shows == "bias":
                continue
            label = f"{chart.name} ({charted.view.label})" if charted.view.label else chart.name
            colour = COLOURS[number % len(COLOURS)]
            yield _Line(label, charted, colour, DASHES[number % len(DASHES)])
            number += 1


# --- what both have -----------------------------------------------------------------------------


def _frame(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=14)
    ax.tick_params(labelsize=9, colors=INK, length=2)
    ax.spines[:].set_color("#bbbbbb")


def _axes_of_curves(ax: Axes, shows: str, charts: Sequence[Charted]) -> None:
    """Logarithmic axes with a strip for zeros; without it where values are negative."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(RATIOS[0], RATIOS[-1])
    _ticks(ax.xaxis, (1 / 16, 1 / 4, 1, 4, 16))
    ax.axvline(1, color=GRID, linewidth=1, zorder=0)
    ax.axhline(0 if shows == "bias" else 1, color=GRID, linewidth=1, zorder=0)
    if shows == "bias":
        return
    lowest = min(np.nanmin(y) for c in charts for of in c.curves.values() for y in of.values())
    if lowest < 0:
        ax.set_yscale("symlog", base=2, linthresh=1 / 2)
        ax.set_ylim(-TOP, TOP)
        _ticks(ax.yaxis, (-8, -2, -1 / 2, 0, 1 / 2, 1, 2, 8))
        return
    ax.set_yscale("log", base=2)
    ax.set_ylim(ZERO / 1.4, TOP)
    _ticks(ax.yaxis, (ZERO, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8), ("0",))
    ax.axhspan(ZERO / 1.4, ZERO * 1.4, color="#eeeeee", zorder=0, linewidth=0)


def _ticks(axis: Any, at: Sequence[float], first: Sequence[str] = ()) -> None:
    labels = [*first, *map(_number, at[len(first) :])]
    names = dict(zip(at, labels, strict=True))
    axis.set_major_locator(FixedLocator(list(at)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, "")))


def _pieces(
    values: np.ndarray, scale: str, zero: float = ZERO
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stretches between a curve's jumps; on a logarithmic axis zeros lie in their strip."""
    y = values
    if scale == "log":
        y = np.where(values == 0, zero, np.where(values < FLOOR, np.nan, values))
    cuts = [int(np.searchsorted(RATIOS, jump)) for jump in edges(values).jumps]
    for start, end in zip((0, *cuts), (*cuts, len(RATIOS)), strict=True):
        yield RATIOS[start:end], y[start:end]


def _number(x: float) -> str:
    return f"{'-' if x < 0 else ''}1/{round(1 / abs(x))}" if 0 < abs(x) < 1 else f"{x:g}"


def _symbol(name: str) -> str:
    """pi_old as it is written in mathematics."""
    _, _, index = name.partition("_")
    return r"$\pi_{\theta}$" if index == "theta" else rf"$\pi_{{\mathrm{{{index}}}}}$"


def save(figure: Figure, path: Path) -> None:
    """Write a picture: an SVG, or a PNG of few colours, which is small."""
    if path.suffix == ".svg":
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})
        return
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
