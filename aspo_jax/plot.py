"""Compare runs: ``python -m aspo_jax.plot RUN [RUN ...] --out comparison.png``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aspo_jax.figures import dynamics
from aspo_jax.metrics import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aspo_jax.plot",
        description="Draw the training dynamics of one or several runs into one picture.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", default="comparison.png", metavar="PNG", help="(%(default)s)")
    parser.add_argument("--labels", metavar="A,B", help="one name per run (default: the folders')")
    arguments = parser.parse_args(argv)
    try:
        out = draw([Path(run) for run in arguments.runs], arguments.labels, Path(arguments.out))
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def draw(runs: Sequence[Path], labels: str | None, out: Path) -> Path:
    """Draw run folders (or metrics.jsonl files) into ``out``.

    Raises ValueError for a folder without metrics, or labels that do not match the runs.
    """
    names = labels.split(",") if labels else [run.resolve().name for run in runs]
    if len(names) != len(runs):
        raise ValueError(f"--labels names {len(names)} runs, but {len(runs)} are given")
    if len(set(names)) < len(names):
        raise ValueError(f"two runs are both called {_repeated(names)!r}; name them with --labels")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    dynamics({name: read_metrics(_file(run)) for name, run in zip(names, runs, strict=True)}, out)
    return out


def _file(run: Path) -> Path:
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"no {path}; expected a run folder written by aspo_jax.train")
    return path


def _repeated(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


if __name__ == "__main__":
    sys.exit(main())
