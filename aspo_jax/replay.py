"""What objectives would do with a rollout that a run recorded, without training.

    python -m aspo_jax.replay runs/my_run --objective dapo --objective cispo --set cispo.ratio_max=3
    python -m aspo_jax.replay runs/my_run --objective gspo --iteration 40 --checkpoint 60 --json

The run must have been started with Train.record. pi_theta is a checkpoint that is newer than the
rollout, for the rules differ only once the ratios pi_theta / pi_old have left 1. Each objective's
gradient is compared with that of ASPO (--against). docs/atlas.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aspo_jax import losses, runtime
from aspo_jax.build import build_shape
from aspo_jax.config import Config
from aspo_jax.errors import CommandParser, run_command, writing
from aspo_jax.loading import find_model, load_weights
from aspo_jax.origin import locate
from aspo_jax.parts import FACTORIES, make
from aspo_jax.paths import path_argument
from aspo_jax.policy import load_policy
from aspo_jax.recording import RecordError, read_rollout, recorded_iterations, trained_on
from aspo_jax.replaying import SIGNS, Replay, Spread, replay
from aspo_jax.rules import named_objectives
from aspo_jax.run.figures import COLOURS, INK, plain
from aspo_jax.run.folder import INITIAL_MODEL
from aspo_jax.run.records import Saved, run_config

NEAR = 1e-4  # nats; a smaller mean |log r| says that the policies are the same


class Replayed(NamedTuple):
    """A replay, and what was replayed with what."""

    run: Path
    iteration: int
    checkpoint: int
    aggregate: str
    figures: Replay


def main(argv: Sequence[str] | None = None) -> int:
    """Replay what the command line names; returns the exit status."""
    parser = CommandParser("replay", __doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--objective",
        action="append",
        required=True,
        metavar="NAME",
        help="a rule, or package.module:factory; may be repeated. A second one of a name has a "
        "label: aspo.wide",
    )
    parser.add_argument(
        "--against", default="aspo", metavar="NAME", help="the rule whose gradient cosines are to"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="rule.argument=value",
        help="else as the run's config says; may be repeated",
    )
    parser.add_argument(
        "--iteration", type=int, metavar="I", help="of the rollout; else the newest before pi_theta"
    )
    parser.add_argument("--checkpoint", type=int, metavar="N", help="pi_theta; else the newest")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--out", type=path_argument, metavar="PNG", help="draw them too")
    a = parser.parse_args(argv)
    return run_command(lambda: _command(a))


def _command(a: argparse.Namespace) -> int:
    found = replayed(a.run, (a.against, *a.objective), a.set, a.iteration, a.checkpoint)
    print(as_json(found) if a.json else table(found))
    if a.out:
        with writing(a.out):
            draw(found, a.out)
        print(a.out, file=sys.stderr if a.json else sys.stdout)
    return 0


def replayed(
    run: Path,
    objectives: Sequence[str],
    settings: Sequence[str] = (),
    iteration: int | None = None,
    checkpoint: int | None = None,
) -> Replayed:
    """Replay a recorded rollout of a run; the first objective is the reference.

    settings: ``rule.argument=value`` each; the run's own hold for what is not set.
    iteration: of the rollout; None: the newest before the checkpoint with a group to learn from.
    checkpoint: None: the newest.

    Raises:
        UserError: no run, no rollout, no checkpoint, an unknown rule, ...
    """
    named = find_model(str(run), checkpoint)
    saved = named.saved
    if saved is None or saved.step is None:
        raise RecordError(f"{run}: not a run; expected a run folder, with config.gin and rollouts")
    iteration = _iteration(saved, saved.step) if iteration is None else iteration
    rows = read_rollout(saved.run, iteration)
    config = locate(run_config(saved.run, FACTORIES), saved.run)
    distinct = list(dict.fromkeys(objectives))
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    rules = named_objectives(distinct, "--objective", settings, config.factories)
    policy = load_policy(config, config.model_folder or saved.run / INITIAL_MODEL, mesh)
    figures = replay(
        policy,
        load_weights(named, config, policy, mesh),
        rows,
        build_shape(config, policy.model.attention.sequences, processes=1),
        {name: rule.objective for name, rule in rules.items()},
        _aggregate(config),
        mesh,
    )
    return Replayed(saved.run, iteration, saved.step, config.objective.aggregate, figures)


def _aggregate(config: Config) -> losses.Aggregate:
    return make(config, "aggregate", config.objective.aggregate)


def _iteration(saved: Saved, step: int) -> int:
    """The newest recorded iteration before a checkpoint that has something to replay."""
    recorded = recorded_iterations(saved.run)
    older = [i for i in recorded if i < step]
    if not older:
        known = ", ".join(map(str, recorded)) or "none"
        raise RecordError(
            f"{saved.run}: no rollout is older than the checkpoint of {step} iterations; recorded: "
            f"{known} (Train.record says how often a run keeps one)"
        )
    has_signal = (i for i in reversed(older) if trained_on(read_rollout(saved.run, i)))
    return next(has_signal, older[-1])


# --- what is shown ------------------------------------------------------------------------------


def as_json(found: Replayed) -> str:
    """All figures."""
    judged = {
        name: {
            **each._asdict(),
            "weights": {sign: [s._asdict() for s in of] for sign, of in each.weights.items()},
        }
        for name, each in found.figures.objectives.items()
    }
    body: dict[str, Any] = {
        "run": str(found.run),
        "iteration": found.iteration,
        "checkpoint": found.checkpoint,
        "aggregate": found.aggregate,
        **found.figures.distance._asdict(),
        "objectives": judged,
    }
    return json.dumps(body, indent=1)


def table(found: Replayed) -> str:
    """The figures as text."""
    d, judged = found.figures.distance, found.figures.objectives
    reference = next(iter(judged))
    lines = [
        f"{found.run}: rollout of iteration {found.iteration}, weights after {found.checkpoint} "
        f"iterations; aggregate {found.aggregate}",
        f"{d.responses:,} responses, {d.tokens:,} tokens in {d.minibatches} mini-batches; pi_theta "
        f"is mean |log r| = {d.abs_log_ratio_mean:.3g} (largest {d.abs_log_ratio_max:.3g}), "
        f"KL = {d.ratio_kl:.3g} nats from the policy that sampled",
    ]
    if d.abs_log_ratio_mean < NEAR:
        lines.append(
            "these are the same policies: every ratio is 1, where rules hardly differ; choose an "
            "older --iteration or a newer --checkpoint"
        )
    width = max(len("objective"), *map(len, judged))
    heads = ("gradient norm", f"cosine to {reference}", "clipped A>0", "clipped A<0")
    lines += ["", f"{'objective':{width}}  " + "  ".join(heads)]
    for name, each in judged.items():
        cosine = "-" if each.cosine is None else f"{each.cosine:.4f}"
        shares = [f"{each.clip_share[sign]:.2%}" for sign in SIGNS]
        cells = (f"{each.grad_norm:.4g}", cosine, *shares)
        aligned = (f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))
        lines.append(f"{name:{width}}  " + "  ".join(aligned))
    for sign, symbol in (("positive", "A > 0"), ("negative", "A < 0")):
        lines += ["", *_quartile_table(found.figures, sign, symbol, width)]
    return "\n".join(lines)


def _quartile_table(figures: Replay, sign: str, symbol: str, width: int) -> list[str]:
    """Mean weights and masked shares by quartiles of the ratio."""
    first = next(iter(figures.objectives.values())).weights[sign]
    if not first:
        return [f"no token with {symbol}"]
    heads = [f"r {s.lowest:.4g} to {s.highest:.4g}" for s in first]
    column = max(18, *map(len, heads))
    lines = [f"weight of tokens with {symbol}, by quartiles of their ratio: mean (masked)"]
    lines.append(f"{'objective':{width}}  " + "  ".join(f"{head:>{column}}" for head in heads))
    for name, each in figures.objectives.items():
        cells = (f"{s.mean:.3f} ({s.masked:.1%})" for s in each.weights[sign])
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>{column}}" for cell in cells))
    return lines


def draw(found: Replayed, path: Path) -> None:
    """Norms, cosines and the spread of weights in each quartile of the ratio."""
    judged = found.figures.objectives
    height = 2.2 + 0.3 * len(judged)
    figure = Figure(figsize=(10, 2 * height), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    (norms, cosines), spreads = figure.subplots(2, 2)
    reference = next(iter(judged))
    places = np.arange(len(judged))
    colours = [COLOURS[i % len(COLOURS)] for i in places]
    shown = {
        "Norm of the gradient": (norms, [each.grad_norm for each in judged.values()]),
        f"Cosine to {reference}'s": (cosines, [each.cosine or 0.0 for each in judged.values()]),
    }
    for title, (ax, values) in shown.items():
        _frame(ax, title)
        ax.barh(places, values, color=colours)
        ax.set_yticks(places, list(judged), fontsize=9)
        ax.invert_yaxis()
        for y, value in zip(places, values, strict=True):
            ax.text(value, y, f" {value:.3g}", va="center", fontsize=8, color=INK)
        ax.margins(x=0.15)
    for ax, sign, symbol in zip(spreads, SIGNS, ("A > 0", "A < 0"), strict=True):
        _frame(ax, f"Weights, {symbol}: 10 to 90 %, median")
        for i, each in enumerate(judged.values()):
            _spreads(ax, each.weights[sign], (i - (len(judged) - 1) / 2) / (len(judged) + 1), i)
        first = judged[reference].weights[sign]
        names = [f"{s.lowest:.4g}\nto {s.highest:.4g}" for s in first]
        ax.set_xticks(np.arange(len(first)), names, fontsize=8)
        ax.set_xlabel("quartile of the ratio", fontsize=9, color=INK)
    d = found.figures.distance
    words = (
        f"{found.run.name}: rollout of iteration {found.iteration}, weights after "
        f"{found.checkpoint}; mean |log r| {d.abs_log_ratio_mean:.2g}"
    )
    figure.suptitle(words, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    canvas.print_png(str(path))


def _spreads(ax: Any, spreads: Sequence[Spread], shift: float, number: int) -> None:
    colour = COLOURS[number % len(COLOURS)]
    for quartile, s in enumerate(spreads):
        x = quartile + shift
        ax.plot([x, x], [s.q10, s.q90], color=colour, linewidth=3, solid_capstyle="butt")
        ax.plot(x, s.q50, "o", color=colour, markersize=5, markeredgecolor="white")


def _frame(ax: Any, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    plain(ax, 9)
    ax.spines["bottom"].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
