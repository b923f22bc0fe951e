"""Score a model on suites of problems: avg@k, pass@k, maj@k, with intervals and every sample.

    python -m aspo_jax.evaluate models/Qwen2.5-1.5B-Instruct --suite math --data-folder data
    python -m aspo_jax.evaluate runs/my_run --data questions.jsonl --grader math --samples 8
    python -m aspo_jax.evaluate --regrade evals/my_model-math --set Reward.timeout_s=30

What is in the folder of an evaluation: `aspo_jax.scoring.results`. A command that was killed goes
on when it is given again, to the same report. docs/evaluation.md has the protocol of every suite.

Exit status: 0 done, 75 stopped by a signal with all chunks saved, 2 a mistake that is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aspo_jax import runtime
from aspo_jax.config.suites import Flags, Suite, file_suite, read_suite, suites
from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.paths import path_argument
from aspo_jax.run.console import Console
from aspo_jax.run.stop import EXIT_SAVED, Interrupted, StopRequest
from aspo_jax.scoring.regrading import regrade
from aspo_jax.scoring.running import plan, run, show

# Flags that stand for a setting of all sets.
SHORT = {
    "samples": "answers per prompt: the k of avg@k",
    "temperature": "sampling temperature; 0: always the likeliest token",
    "max-response-tokens": "longest response",
    "limit": "ask only the first so many prompts of each set; the score is then not the set's",
    "seed": "of the random draws",
    "grader": "which grader judges every answer: math, code, exact, ...",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what the command line names; returns the exit status."""
    parser = _parser()
    a = parser.parse_args(argv)
    sources = [a.suite, a.data, a.regrade]
    if sum(x is not None for x in sources) != 1:
        parser.error("expected one of --suite, --data and --regrade")
    if (a.model is None) != (a.regrade is not None):
        parser.error("expected MODEL_OR_RUN" if a.model is None else "--regrade needs no model")
    status = run_command(lambda: _regrade(a) if a.regrade else _evaluate(a))
    return runtime.leave(status) if status == 2 else status


def _parser() -> CommandParser:
    parser = CommandParser("evaluate", __doc__)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_OR_RUN",
        help="a Hugging Face folder, a name on the hub, or a run folder",
    )
    parser.add_argument("--suite", metavar="NAME", help=f"{', '.join(suites())}, or a .gin file")
    parser.add_argument("--data", type=path_argument, metavar="FILE", help="problems of one's own")
    parser.add_argument(
        "--data-folder", default="data", metavar="DIR", help="where the files of a suite are"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="SET", help="of the suite; may be repeated"
    )
    for name, meaning in SHORT.items():
        parser.add_argument(f"--{name}", metavar=name.rpartition("-")[2].upper(), help=meaning)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="Section.field=value",
        help="Suite.top_p=1.0, math500.samples=1, Model.dtype=bfloat16, Reward.workers=8, ...",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--checkpoint", type=int, metavar="N", help="step of a run; else the newest"
    )
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="evals/MODEL-SUITE")
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="prompts that are saved together, what a kill costs"
    )
    parser.add_argument(
        "--regrade", type=path_argument, metavar="DIR", help="grade the samples in there again"
    )
    return parser


def _flags(a: argparse.Namespace) -> Flags:
    """Everything that sets something, with where it stands."""
    given = [(f"--{n}", getattr(a, n.replace("-", "_"))) for n in SHORT]
    flags = [
        (flag, f"Suite.{flag[2:].replace('-', '_')}={value}")
        for flag, value in given
        if value is not None
    ]
    flags += [("--dtype", f"Model.dtype={a.dtype}")] if a.dtype else []
    flags += [("--only", f"Suite.sets={tuple(a.only)!r}")] if a.only else []
    return [*flags, *((f"--set #{i}", text) for i, text in enumerate(a.set, start=1))]


def _suite(a: argparse.Namespace) -> Suite:
    if a.data is not None:
        return file_suite(a.data, _flags(a))
    return read_suite(a.suite, _flags(a))


def _evaluate(a: argparse.Namespace) -> int:
    if a.chunk is not None and a.chunk < 1:
        raise UserError(f"--chunk {a.chunk}: expected 1 or more")
    console = Console()
    with StopRequest() as stop:
        try:
            with stop.interruptible():
                p = plan(a.model, a.checkpoint, _suite(a), a.data_folder)
                console = Console(is_quiet=not runtime.is_main())
                out = a.out or Path("evals") / f"{p.model.name}-{p.suite.name}"
                compilations = runtime.compilations(console.compiling, console.compiled)
                with console, compilations:
                    run(p, out, console, a.chunk)
        except Interrupted:
            console.note("stopped; the same command goes on after the last chunk that was saved")
            return EXIT_SAVED
    if runtime.is_main():
        show(out, console)
    return 0


def _regrade(a: argparse.Namespace) -> int:
    graders = {"grader"}
    wrong = [n for n in SHORT if n not in graders and getattr(a, n.replace("-", "_")) is not None]
    if wrong or a.only or a.dtype or a.out or a.checkpoint is not None:
        raise UserError(
            "--regrade changes verdicts alone, of all samples in a folder: only --grader and "
            "--set Reward.field=value may stand beside it"
        )
    flags = [(place, text) for place, text in _flags(a) if place != "--grader"]
    regrade(a.regrade, file_suite("stored", flags), a.grader)
    show(a.regrade, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
