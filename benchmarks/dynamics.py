"""What arXiv 2510.06062 claims of ASPO, tried on the embedded task.

    python benchmarks/dynamics.py --out RUNS [--jobs 2] [--only stress] [--report]

Every rule of a seed begins from one warm start and has the same prompts, sampling keys, learning
rate and number of updates; seeds are 0, 1, ... and were fixed in advance. Three parts:

- `main`: DAPO, GRPO without IS and ASPO, 5 seeds;
- `more`: GRPO, GRPO with response-mean IS, CISPO, GSPO, the released code's ASPO, ASPO without the
  soft cap, 3 seeds;
- `stress`: more epochs over each rollout, so that ratios travel: DAPO with and without its dual
  clip, ASPO with and without the soft cap, 3 seeds.

About two hours on two cores. A run is a process of its own with one thread; killed, the same
command goes on where each was. `--report` reads what is there. Printed are the figures of every
rule, with standard errors over seeds, and a verdict on each claim; drawn are the paper's figures 2,
5 and 8 with these curves.

A verdict compares two rules seed by seed: "reproduced" where the 95 % interval of the mean
difference (Student's t) lies on the claimed side of 0, "not reproduced" where it lies on the other,
"not at this scale" where it holds 0. Entropy is compared at equal reward: where the smoothed
training reward of each run first reaches what both reach. That DAPO comes to repeat itself (its
20-grams) cannot be seen in answers of 20 tokens.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import header, table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from picture import smooth
from scipy import stats

from aspo_jax.run.figures import COLOURS, INK, plain
from aspo_jax.run.metrics import read_metrics

ITERATIONS, LATE = 80, 20
BASE = ("Evaluate.every=10", "Reward.workers=1", "Checkpoint.every=20")
STRESS = ("Train.epochs=8",)
NO_CAP = ("aspo.positive_cap='none'", "aspo.negative_cap='none'")


class Arm(NamedTuple):
    """A rule under its name in the tables, and the settings that make it."""

    name: str
    settings: tuple[str, ...]
    seeds: int


def _arm(name: str, rule: str, seeds: int, *more: str) -> Arm:
    return Arm(name, (f"Objective.name={rule!r}", *more), seeds)


PARTS: dict[str, tuple[Arm, ...]] = {
    "main": (
        _arm("ASPO", "aspo", 5),
        _arm("DAPO", "dapo", 5),
        _arm("GRPO without IS", "grpo_without_is", 5),
    ),
    "more": (
        _arm("GRPO", "grpo", 3),
        _arm("DAPO, response-mean IS", "positive_response_mean", 3),
        _arm("CISPO", "cispo", 3),
        _arm("GSPO", "gspo", 3, "Objective.aggregate='sequence_mean'"),
        _arm("ASPO, released code", "archer2", 3),
        _arm("ASPO, no soft cap", "aspo", 3, "aspo.positive_cap='none'"),
    ),
    "stress": (
        _arm("stress: ASPO", "aspo", 3, *STRESS),
        _arm("stress: ASPO, no caps", "aspo", 3, *STRESS, *NO_CAP),
        _arm("stress: DAPO", "dapo", 3, *STRESS),
        _arm("stress: DAPO, no dual clip", "ppo_clip", 3, *STRESS, "ppo_clip.clip_high=0.28"),
        _arm("stress: GRPO without IS", "grpo_without_is", 3, *STRESS),
    ),
}


# --- running ------------------------------------------------------------------------------------


def folder_of(out: Path, arm: Arm, seed: int) -> Path:
    """Where a run is kept."""
    name = "".join(c if c.isalnum() else "-" for c in arm.name.lower())
    return out / f"{name}-{seed}"


def train(out: Path, arm: Arm, seed: int, core: int) -> None:
    """Train, or go on, on one core."""
    folder = folder_of(out, arm, seed)
    if (folder / "model" / "config.json").exists():
        return
    settings = (*BASE, *arm.settings, f"Run.seed={seed}", f"Run.folder={str(folder)!r}")
    command = [sys.executable, "-m", "aspo_jax.train", "--config", "countdown_cpu"]
    command += itertools.chain.from_iterable(("--set", setting) for setting in settings)
    with (out / f"{folder.name}.log").open("a") as log:
        subprocess.run(
            command,
            stdout=log,
            stderr=log,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )


def run(out: Path, arms: Sequence[Arm], jobs: int) -> None:
    """Every run of the arms, ``jobs`` at once, seeds first: what is there can be compared early."""
    out.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    order = [(arm, seed) for seed in range(5) for arm in arms if seed < arm.seeds]
    free = list(cores)
    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:

        def one(arm: Arm, seed: int) -> None:
            core = free.pop()
            try:
                train(out, arm, seed, core)
            finally:
                free.append(core)
            print(f"{arm.name}, seed {seed}: there", file=sys.stderr, flush=True)

        for done in [pool.submit(one, *each) for each in order]:
            done.result()


# --- reading ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The log of a finished run: metric -> values, by iteration."""

    rows: list[dict[str, Any]]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations and values, where there is one."""
        rows = [row for row in self.rows if row.get(metric) is not None]
        return (
            np.array([row["iteration"] for row in rows]),
            np.array([row[metric] for row in rows], float),
        )

    def last(self, metric: str) -> float:
        """The last value."""
        return float(self.curve(metric)[1][-1])

    def late(self, metric: str) -> float:
        """The mean over the last iterations."""
        return float(self.curve(metric)[1][-LATE:].mean())


def read(out: Path, arms: Sequence[Arm]) -> dict[str, dict[int, Run]]:
    """Arm -> seed -> finished run."""
    found: dict[str, dict[int, Run]] = {}
    for arm in arms:
        for seed in range(arm.seeds):
            folder = folder_of(out, arm, seed)
            if (folder / "model" / "config.json").exists():
                rows = list(read_metrics(folder / "metrics.jsonl"))
                found.setdefault(arm.name, {})[seed] = Run(rows)
    return found


def spike(run: Run) -> float:
    """The largest gradient norm of an update over the median of the iterations' means."""
    norms = [run.curve(f"update/grad_norm{which}")[1] for which in ("_max", "")]
    return float(norms[0].max() / np.median(norms[1]))


FIGURES: dict[str, Callable[[Run], float]] = {
    "avg@16": lambda run: run.last("evaluate/avg"),
    "pass@16": lambda run: run.last("evaluate/pass_any"),
    "distinct right": lambda run: run.last("evaluate/distinct_right"),
    "entropy": lambda run: run.late("update/old_entropy"),
    "clip share": lambda run: run.late("update/clip_share"),
    "KL, 1e-3": lambda run: 1e3 * run.late("update/ratio_kl"),
    "gradient spike": spike,
}


def figures_table(runs: Mapping[str, Mapping[int, Run]]) -> str:
    """Mean and standard error over seeds of each figure."""
    body = []
    for name, seeds in runs.items():
        cells = [name, str(len(seeds))]
        for figure in FIGURES.values():
            x = np.array([figure(run) for run in seeds.values()])
            error = x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")
            cells.append(f"{x.mean():.3g} +- {error:.1g}")
        body.append(cells)
    return table(["rule", "seeds", *FIGURES], body)


# --- the claims ---------------------------------------------------------------------------------


Runs = Mapping[str, Mapping[int, Run]]  # arm -> seed -> run


class Claim(NamedTuple):
    """What the paper says, as something that is positive if it holds, seed by seed.

    difference: what is compared with what, in words.
    by_seed: of the runs.
    """

    words: str
    difference: str
    by_seed: Callable[[Runs], np.ndarray]


def _above(words: str, more: str, less: str, figure: str | Callable[[Run, Run], float]) -> Claim:
    """That a figure of one rule is above that of another; a function sees both runs of a seed."""

    def by_seed(runs: Runs) -> np.ndarray:
        ours, theirs = runs.get(more, {}), runs.get(less, {})
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if isinstance(figure, str):
            return np.array([FIGURES[figure](a) - FIGURES[figure](b) for a, b in pairs])
        return np.array([figure(a, b) - figure(b, a) for a, b in pairs])

    return Claim(words, f"{more} - {less}", by_seed)


def entropy_at_equal_reward(run: Run, other: Run) -> float:
    """Smoothed entropy where the smoothed training reward first reaches what both runs reach."""
    rewards = [smooth(each.curve("rollout/reward_mean")[1]) for each in (run, other)]
    level = min(x.max() for x in rewards)
    return float(smooth(run.curve("update/old_entropy")[1])[int(np.argmax(rewards[0] >= level))])


def early(run: Run, other: Run) -> float:
    """Held-out score at a quarter of the run."""
    x, y = run.curve("evaluate/avg")
    return float(y[int(np.argmax(x >= ITERATIONS // 4))])


def _ratio_gap(runs: Runs) -> np.ndarray:
    """By how much positive responses' mean ratio is above negative ones' in DAPO."""
    signs = [f"update/response_ratio_{sign}" for sign in ("positive", "negative")]
    return np.array([x.late(signs[0]) - x.late(signs[1]) for x in runs.get("DAPO", {}).values()])


CLAIMS = (
    _above("ASPO ends higher than DAPO (Tables 1 to 4)", "ASPO", "DAPO", "avg@16"),
    _above("without IS is better than with it (Table 4)", "GRPO without IS", "DAPO", "avg@16"),
    _above("ASPO ends higher than without IS (Table 4)", "ASPO", "GRPO without IS", "avg@16"),
    _above(
        "response-mean IS is better than token IS (Table 4)",
        "DAPO, response-mean IS",
        "DAPO",
        "avg@16",
    ),
    _above("ASPO has the higher pass@k", "ASPO", "DAPO", "pass@16"),
    _above("ASPO is slower at first (Fig. 5)", "DAPO", "ASPO", early),
    _above(
        "ASPO keeps more entropy at equal reward (Fig. 2)", "ASPO", "DAPO", entropy_at_equal_reward
    ),
    _above(
        "without IS keeps more entropy at equal reward (Fig. 2)",
        "GRPO without IS",
        "DAPO",
        entropy_at_equal_reward,
    ),
    _above("DAPO clips more (Fig. 2)", "DAPO", "ASPO", "clip share"),
    _above("DAPO moves farther within a step (KL, Fig. 2)", "DAPO", "ASPO", "KL, 1e-3"),
    Claim(
        "right answers have the larger mean ratio in DAPO (Fig. 3)",
        "ratio of A > 0 - of A < 0",
        _ratio_gap,
    ),
    _above(
        "the gradient spikes without the soft cap (Fig. 8), powers of ten",
        "stress: ASPO, no caps",
        "stress: ASPO",
        lambda run, other: float(np.log10(spike(run))),
    ),
)


def verdict(difference: np.ndarray) -> str:
    """In words, with the mean difference and its 95 % interval."""
    if len(difference) < 2:
        return "not run"
    mean = float(difference.mean())
    half = float(stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference))
    word = "not at this scale"
    if abs(mean) > half:
        word = "reproduced" if mean > 0 else "not reproduced: the other way"
    return f"{word} ({mean:+.3g}, {mean - half:+.3g} to {mean + half:+.3g})"


def claims_table(runs: Runs) -> str:
    """One line per claim."""
    body = []
    for claim in CLAIMS:
        found = claim.by_seed(runs)
        body.append([claim.words, claim.difference, str(len(found)), verdict(found)])
    return table(["claim", "difference", "seeds", "verdict (mean, 95 %)"], body)


# --- the paper's figures --------------------------------------------------------------------------

MAIN = ("ASPO", "DAPO", "GRPO without IS", "DAPO, response-mean IS")
STRESSED = ("stress: ASPO", "stress: DAPO", "stress: ASPO, no caps", "stress: DAPO, no dual clip")
PICTURES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "figure2": (
        MAIN,
        (
            ("evaluate/avg", "held out, avg@16"),
            ("update/old_entropy", "entropy, nats"),
            ("update/clip_share_positive", "clip share, A > 0"),
            ("update/ratio_kl", "KL to the old policy, nats"),
        ),
    ),
    "figure5": (
        MAIN[:2],
        (
            ("rollout/reward_mean", "training reward"),
            ("update/old_entropy", "entropy, nats"),
            ("rollout/response_length", "response, tokens"),
        ),
    ),
    "figure8": (
        STRESSED,
        (
            ("update/grad_norm_max", "largest gradient norm of a step"),
            ("update/surrogate", "surrogate"),
            ("evaluate/avg", "held out, avg@16"),
        ),
    ),
}


def draw(runs: Runs, name: str, path: Path) -> None:
    """Mean over seeds, with the range from the lowest to the highest, of each rule."""
    names, panels = PICTURES[name]
    figure = Figure(figsize=(4.2 * len(panels), 3.9), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for (metric, unit), ax in zip(panels, figure.subplots(1, len(panels)), strict=True):
        for arm, colour in zip(names, COLOURS, strict=False):
            if arm in runs:
                _curve(ax, runs[arm], metric, colour, arm)
        plain(ax, 10)
        ax.set_title(unit, loc="left", fontsize=12, color=INK)
        ax.set_xlabel("iteration", fontsize=11, color=INK)
        if metric == "update/grad_norm_max":
            ax.set_yscale("log")
    handles, labels = ax.get_legend_handles_labels()
    place = "outside upper center"
    figure.legend(handles, labels, loc=place, ncols=len(labels), fontsize=12, frameon=False)
    canvas.print_png(str(path))


def _curve(ax: Any, seeds: Mapping[int, Run], metric: str, colour: str, label: str) -> None:
    curves = [run.curve(metric) for run in seeds.values()]
    x = curves[0][0]
    is_as_it_is = metric.startswith(("evaluate", "update/grad_norm"))  # few points; spikes
    values = np.array([y if is_as_it_is else smooth(y) for _, y in curves])
    ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    ax.plot(x, values.mean(0), color=colour, linewidth=2.2, label=label)


def main() -> None:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--report", action="store_true")
    a = parser.parse_args()
    arms = [arm for part in a.only or PARTS for arm in PARTS[part]]
    if not a.report:
        run(a.out, arms, a.jobs)
    runs = read(a.out, [arm for part in PARTS.values() for arm in part])
    print(header("The paper's claims", "python benchmarks/dynamics.py", ("jax", "jaxlib")))
    print(figures_table(runs), "\n")
    print(claims_table(runs))
    for name, (arms_of, _) in PICTURES.items():
        if any(arm in runs for arm in arms_of):
            draw(runs, name, a.out / f"{name}.png")


if __name__ == "__main__":
    main()
