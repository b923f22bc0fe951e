"""Resident memory of a training run, phase by phase, beside what `aspo_jax.plan` says of it.

    python benchmarks/memory.py MODEL_FOLDER [--iterations 3] [--set Section.field=value ...]

A real run on the CPU: the weights of a Hugging Face folder in float32, 4 prompts x 4 samples of at
most 24 tokens, AdamW, a checkpoint and an evaluation after every second iteration. The reward is
half luck, so that every iteration has something to learn. The plan is of the same config for
``cpu:1``. The run is a process of its own: its peaks are its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30
CONFIG = """
Data.source = 'files'
Data.train_path = '{folder}/prompts.jsonl'
Data.eval_path = '{folder}/prompts.jsonl'
Model.path = '{model}'
Sampler.max_prompt_tokens = 256
Sampler.max_response_tokens = 24
Sampler.slots = 16
Sampler.page = 16
Objective.name = 'aspo'
Objective.aggregate = 'token_mean'
Reward.functions = ('memory:score',)
Optim.learning_rate = 1e-6
Train.iterations = {iterations}
Train.prompts_per_step = 4
Train.samples_per_prompt = 4
Train.prompts_per_minibatch = 4
Train.row_tokens = 288
Train.rows_per_microbatch = 2
Evaluate.every = 2
Evaluate.prompts = 4
Evaluate.samples = 2
Checkpoint.every = 2
Run.folder = '{folder}/run'
Runtime.compilation_cache = None
"""


def score(prompt: str, completion: str, answer: object) -> float:
    """A reward that says nothing, for kind 'custom'."""
    return float(len(completion) % 2)


def resident(key: str) -> float:
    """GiB of this process, VmRSS now or VmHWM at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def observed(out: Path, argv: list[str]) -> int:
    """`aspo_jax.train` with the resident memory of each phase of each iteration noted."""
    from aspo_jax import train
    from aspo_jax.run import metrics

    phases: list[dict[str, float | str]] = []
    timed = metrics.Clock.__call__

    @contextlib.contextmanager
    def noted(self: metrics.Clock, phase: str) -> Iterator[None]:
        outside = resident("VmHWM")
        forget_peak()
        before = resident("VmRSS")
        with timed(self, phase):
            yield
        phases.append(
            {"phase": phase, "outside": outside, "before": before, "peak": resident("VmHWM")}
        )
        out.write_text(json.dumps(phases))

    metrics.Clock.__call__ = noted  # type: ignore[method-assign]
    return train.main(argv)


def planned(argv: list[str]) -> float:
    """GiB of the program that needs most, by the plan."""
    from aspo_jax.config import read_config
    from aspo_jax.parts import FACTORIES
    from aspo_jax.plan import plan

    return plan(read_config(argv, FACTORIES), "cpu:1").worst.needed / GIB


def main(argv: list[str]) -> int:
    from machine import header, table

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args(argv)
    sets = [word for text in a.set for word in ("--set", text)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"prompt": f"What is {n} + {3 * n}?", "answer": str(4 * n), "kind": "custom"}
            for n in range(1, 33)
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = CONFIG.format(folder=folder, model=a.model.resolve(), iterations=a.iterations)
        (folder / "memory.gin").write_text(text)
        flags = ["--config", str(folder / "memory.gin"), *sets]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, __file__, "--observe", str(folder / "phases.json"), *flags],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
            stdout=sys.stderr,
            check=True,
        )
        phases = json.loads((folder / "phases.json").read_text())
        plan_gib = planned(flags)
    peak = max(max(p["peak"], p["outside"]) for p in phases)
    print(header("Memory of a run", f"python benchmarks/memory.py {a.model.name}", ("jax",)))
    cells = [
        [str(p["phase"]), *(f"{p[key]:.2f}" for key in ("outside", "before", "peak"))]
        for p in phases
    ]
    print(table(["phase", "peak since the last", "resident before", "peak in it"], cells))
    print(f"\npeak {peak:.2f} GiB, planned {plan_gib:.2f} GiB: {plan_gib / peak - 1:+.1%}")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--observe":
        sys.exit(observed(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
