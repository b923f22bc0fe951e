"""Where the time of the main job goes, and how near its update comes to the machine's peak.

    python benchmarks/main_job.py [--config countdown_cpu] [--iterations 12] [--set NAME=VALUE]...

Runs the real `aspo_jax.train` in a process of its own with a fresh run folder and an empty
compilation cache; the warm start comes from the user's cache or is made first. Evaluation and
checkpoints come every 5 iterations here. All medians leave out the first two iterations.

Share of peak. The update's useful work, counted for real tokens only (no padding, nothing that the
backward pass computes again):

    FLOP = 6 Y (D C (H + 2 K) + H C D + 3 D F) tokens + 6 V D responses + 12 Y H C pairs

with Y layers, width D, H query and K key heads of width C, feed-forward F, vocabulary V;
"responses" are the tokens that the policy chose, for of others no logits are computed; "pairs" are
the (query, visible key) pairs, L (L + 1) / 2 for a sequence of L tokens; all times the epochs. 6 is
2 forward and 4 backward per weight; 12 is 3 times (2 for scores and 2 for values). Norms, biases,
softmax, rotary embedding, loss and optimizer count as no work but their time counts. The peak is
the rate of square float32 matrix products (512, 1024, 2048) in jax on all cores, the best of 5
blocks of 10 calls each (median call of a block), just before and just after the run. Linux.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from machine import header, table

from aspo_jax.config import Config, read_config
from aspo_jax.model import ModelConfig, read_model_config
from aspo_jax.parts import FACTORIES
from aspo_jax.planning.flops import forward_flops, head_flops
from aspo_jax.run.metrics import read_metrics

FIRST = 2  # iterations before this one are warm-up
PHASES = ("sample", "grade", "score", "update")
EVERY = 5


class Observed(NamedTuple):
    """What the run left: its log, the observer's figures and the shape of its model."""

    config: Config
    rows: list[dict[str, Any]]
    figures: dict[str, Any]
    model: ModelConfig
    start: str


def matmul_peak() -> dict[int, float]:
    """Size -> FLOP per second of a float32 matrix product: best block, median call of a block."""
    product = jax.jit(jnp.matmul)
    rates = {}
    for size in (512, 1024, 2048):
        x, y = jax.random.normal(jax.random.key(0), (2, size, size))
        jax.block_until_ready(product(x, y))
        blocks = [statistics.median(timed(product, x, y) for _ in range(10)) for _ in range(5)]
        rates[size] = 2 * size**3 / min(blocks)
    return rates


def timed(product, x: jax.Array, y: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(product(x, y))
    return time.perf_counter() - start


def run_job(config_name: str, iterations: int, settings: list[str]) -> Observed:
    """Run the job in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder, "run"), Path(folder, "observed.json")
        bindings = {
            "Run.folder": str(run),
            "Runtime.compilation_cache": str(Path(folder, "xla")),
            "Train.iterations": str(iterations),
            "Evaluate.every": str(EVERY),
            "Checkpoint.every": str(EVERY),
        }
        argv = ["--config", config_name]
        for setting in (*(f"{name}={value}" for name, value in bindings.items()), *settings):
            argv += ["--set", setting]
        script = Path(__file__).with_name("observed_train.py")
        done = subprocess.run(
            [sys.executable, str(script), str(out), *argv], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"the run failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return Observed(
            read_config(argv, FACTORIES),
            read_metrics(run / "metrics.jsonl"),
            json.loads(out.read_text()),
            read_model_config(run / "model"),
            start=_start(done.stdout),
        )


def _start(output: str) -> str:
    """Where the run's first weights came from, as it said itself."""
    if "warm start: found" in output:
        return "warm start from the cache"
    return "warm start included" if "warm start: held-out" in output else "from a given model"


def measured(job: Observed) -> list[dict[str, Any]]:
    """The log's lines of whole iterations after the warm-up."""
    rows = [row for row in job.rows if "seconds/iteration" in row]
    return rows[FIRST:]


def phase_table(job: Observed) -> str:
    """Median seconds per phase and its median share of the iterations without evaluation."""
    rows = [row for row in measured(job) if "seconds/evaluate" not in row]
    lines = []
    for phase in PHASES:
        seconds = [row[f"seconds/{phase}"] for row in rows]
        lines.append((phase, seconds))
    other = [
        row["seconds/iteration"]
        - sum(row.get(f"seconds/{phase}", 0.0) for phase in (*PHASES, "save"))
        for row in rows
    ]
    lines.append(("rest (prompts, packing, log)", other))
    whole = [row["seconds/iteration"] for row in rows]
    lines.append(("iteration", whole))
    body = [
        [
            name,
            f"{statistics.median(seconds):.4f}",
            f"{statistics.median(s / w for s, w in zip(seconds, whole, strict=True)):.1%}",
        ]
        for name, seconds in lines
    ]
    for phase in ("evaluate", "save"):
        seconds = [row[f"seconds/{phase}"] for row in measured(job) if f"seconds/{phase}" in row]
        if seconds:
            body.append([f"{phase}, each time", f"{statistics.median(seconds):.4f}", "-"])
    return table(["phase", "seconds, median", "share of an iteration"], body)


def speed_table(job: Observed, peak: float) -> str:
    """Throughput and the update's share of peak, medians over the iterations."""
    train = job.config.train
    samples = train.prompts_per_step * train.samples_per_prompt
    rows = measured(job)
    work = job.figures["work"][FIRST:]
    if not all(done["tokens"] for done in work):
        raise SystemExit("an iteration had nothing to train on: start from a warmer model")
    sampled = [samples * row["rollout/response_length"] / row["seconds/sample"] for row in rows]
    trained, processed, rates, fill = [], [], [], []
    for row, done in zip(rows, work, strict=True):
        seconds = row["seconds/update"]
        trained.append(train.epochs * done["responses"] / seconds)
        processed.append(train.epochs * done["tokens"] / seconds)
        unread = head_flops(job.model, done["tokens"] - done["responses"])
        flops = 3 * (forward_flops(job.model, done["tokens"], done["pairs"]) - unread)
        rates.append(train.epochs * flops / seconds)
        fill.append(done["tokens"] / done["slots"])
    rate = statistics.median(rates)
    body = [
        ["sampled response tokens / s", f"{statistics.median(sampled):,.0f}"],
        ["trained response tokens / s, all epochs", f"{statistics.median(trained):,.0f}"],
        ["trained tokens / s, prompts included", f"{statistics.median(processed):,.0f}"],
        ["useful GFLOP / s of the update", f"{rate / 1e9:.1f}"],
        ["measured float32 matmul peak, GFLOP / s", f"{peak / 1e9:.1f}"],
        ["share of peak, useful work, median", f"{rate / peak:.1%}"],
        ["share of peak, useful work, fastest update", f"{max(rates) / peak:.1%}"],
        ["share of computed slots that hold a token", f"{statistics.median(fill):.1%}"],
        ["peak resident memory of the trainer, MiB", f"{job.figures['memory_mib']:,.0f}"],
    ]
    return table(["quantity", "value"], body)


def compile_table(job: Observed) -> str:
    """Programs compiled, by the iteration in which it happened."""
    last = len(job.figures["work"])
    names = {0: "start, first evaluation, iteration 0", 1: "iteration 1"}
    names |= dict.fromkeys(range(2, last), f"iterations 2 to {last - 1}")
    names[last] = "after the last update (saving, last evaluation, export)"
    counts: Counter[str] = Counter(dict.fromkeys(names.values(), 0))
    seconds: Counter[str] = Counter()
    for iteration, taken in job.figures["compiles"]:
        counts[names[iteration]] += 1
        seconds[names[iteration]] += taken
    body = [[name, str(n), f"{seconds[name]:.2f}"] for name, n in counts.items()]
    return table(["when", "programs compiled", "seconds"], body)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time per phase of the main job.")
    parser.add_argument("--config", default="countdown_cpu")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="passed on to the run"
    )
    a = parser.parse_args()
    if a.iterations < FIRST + 3:
        parser.error(f"--iterations {a.iterations}: expected at least {FIRST + 3}")
    words = ["--config", a.config, "--iterations", str(a.iterations)]
    words += [word for setting in a.set for word in ("--set", setting)]
    command = f"python benchmarks/main_job.py {shlex.join(words)}"
    print(header("Main job", command, ("jax", "jaxlib", "numpy")), flush=True)
    before = matmul_peak()
    job = run_job(a.config, a.iterations, a.set)
    after = matmul_peak()
    best = {size: max(before[size], after[size]) for size in before}
    rates = ", ".join(f"{size}: {rate / 1e9:.1f}" for size, rate in best.items())
    spent = job.figures["seconds"]
    print(f"Whole run {spent:.1f} s ({job.start}; nothing compiled beforehand).")
    print(f"Matrix products, GFLOP/s by size: {rates}.\n")
    print(phase_table(job), speed_table(job, max(best.values())), compile_table(job), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
