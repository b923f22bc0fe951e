"""Pictures of runs, and of what objectives do to a token.

python -m aspo_jax.plot RUN [RUN ...] --out comparison.png
python -m aspo_jax.plot weights --objectives aspo,ppo_clip,cispo --out pictures --set aspo.cap=2

A run in a folder of that name is ``./weights``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.paths import path_argument
from aspo_jax.run.figures import dynamics
from aspo_jax.run.folder import METRICS
from aspo_jax.run.metrics import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs or rules named on the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["weights"]:
        from aspo_jax.atlas import command as weights  # takes seconds to import

        return weights.main(words[1:])
    parser = CommandParser(
        "plot",
        "Draw the training dynamics of one or several runs into one picture; "
        "`weights` in place of a run: the token weights of objectives, see `weights --help`.",
    )
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="PNG",
        help="overwritten if it exists (default: comparison.png, or the next free number of it)",
    )
    parser.add_argument("--labels", metavar="A,B", help="one name per run (default: the folders')")
    a = parser.parse_args(words)

    def command() -> int:
        print(draw(a.runs, a.labels, a.out or _free(Path("comparison.png"))))
        return 0

    return run_command(command)


class PlotError(UserError):
    """What was asked for cannot be drawn."""


def draw(runs: Sequence[Path], labels: str | None, out: Path) -> Path:
    """Draw run folders (or metrics.jsonl files) into ``out``.

    Raises:
        PlotError: a folder without metrics, or labels that do not match the runs.
    """
    names = labels.split(",") if labels else [run.resolve().name for run in runs]
    if len(names) != len(runs):
        raise PlotError(f"--labels names {len(names)} runs, but {len(runs)} are given")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise PlotError(f"two runs are both called {repeated[0]!r}; name them with --labels")
    if not out.parent.is_dir():
        raise PlotError(f"--out {out}: the folder {out.parent} does not exist")
    dynamics({name: read_metrics(_file(run)) for name, run in zip(names, runs, strict=True)}, out)
    return out


def _free(path: Path) -> Path:
    """The path, or path_2, path_3, ...: the first that does not exist."""
    numbered = (path.with_stem(f"{path.stem}_{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _file(run: Path) -> Path:
    path = run / METRICS if run.is_dir() else run
    if not path.is_file():
        raise PlotError(f"no {path}; expected a run folder written by aspo_jax.train")
    return path


if __name__ == "__main__":
    sys.exit(main())
