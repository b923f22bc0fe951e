"""What share of an iteration waits for its prompts: read, rendered, tokenized.

    python benchmarks/prompts.py [--iterations 12] [--model FOLDER] [--tokenizer FOLDER]...

Runs the real `aspo_jax.train` twice in fresh folders: the embedded default (from ``--model``, if
it is given, in place of a warm start), and what it left on a file of 1,000 rows with the same
puzzles. Medians of `seconds/data` and `seconds/iteration`, the
first two iterations left out. Then, for each tokenizer (a Hugging Face folder), the time of steps
of 64 chat prompts of about 80 words, from a file of 1,000 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from machine import header, table

from aspo_jax.data import CountdownSource, CountdownSpec, load_tokenizer, prompts
from aspo_jax.run.metrics import read_metrics

ROWS, FIRST, STEP, STEPS = 1000, 2, 64, 20


def puzzles(split: Literal["train", "held_out"], seed: int, count: int) -> list[dict]:
    """Rows of a data file."""
    made = CountdownSource(CountdownSpec(), seed, split, count)
    return [{key: made[i][key] for key in ("prompt", "answer", "kind")} for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, *settings: str) -> tuple[float, float]:
    """Train; medians of the seconds of a wait for prompts and of an iteration."""
    settings = (f"Run.folder='{folder}'", "Evaluate.prompts=16", *settings)
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "aspo_jax.train", *words], check=True)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "seconds/data" in row][FIRST:]
    data, whole = (statistics.median(row[f"seconds/{x}"] for row in rows) for x in SECONDS)
    return data, whole


SECONDS = ("data", "iteration")


def shares(iterations: int, *start: str) -> list[list[str]]:
    """Of the default, and of a file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = write(folder / "train.jsonl", puzzles("train", 0, ROWS))
        held_out = write(folder / "held_out.jsonl", puzzles("held_out", 1, 16))
        short = f"Train.iterations={iterations}"
        of_file = ("Data.source='files'", f"Data.train_path='{train}'")
        of_file += (f"Data.eval_path='{held_out}'", f"Model.path='{folder / 'puzzles' / 'model'}'")
        found = {
            "puzzles, the default": run(folder / "puzzles", short, *start),
            f"a file of {ROWS:,} rows": run(folder / "file", short, *of_file),
        }
    return [
        [name, f"{data * 1000:.1f}", f"{whole:.2f}", f"{data / whole:.2%}"]
        for name, (data, whole) in found.items()
    ]


def tokenizing(folder: str) -> list[str]:
    """Milliseconds of a step of long prompts."""
    words = [f"word{i % 97} {i % 1000}" for i in range(40)]
    rows = [
        {"id": str(i), "prompt": f"Problem {i}. " + " ".join(words), "answer": "1", "kind": "math"}
        for i in range(ROWS)
    ]
    tokenizer = load_tokenizer(folder)
    stream = prompts(rows, tokenizer=tokenizer, seed=0, shuffle=True, prompts_per_step=STEP)
    seconds, tokens = [], 0
    for _ in range(STEPS):
        start = time.perf_counter()
        step = next(stream)
        seconds.append(time.perf_counter() - start)
        tokens += sum(len(prompt.tokens) for prompt in step)
    many = f"{tokens / STEP / STEPS:.0f}"
    return [Path(folder).name, many, f"{statistics.median(seconds[1:]) * 1000:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--model", type=Path, help="a folder that a run of the default left")
    parser.add_argument("--tokenizer", action="append", default=[])
    a = parser.parse_args()
    found = shares(a.iterations, *([f"Model.path='{a.model}'"] if a.model else []))
    command = f"python benchmarks/prompts.py --iterations {a.iterations}"
    print(header("The wait for prompts", command, ("jax", "grain", "transformers")))
    print(table(["prompts", "wait, ms", "iteration, s", "share"], found))
    if a.tokenizer:
        head = ["tokenizer", "tokens of a prompt", f"step of {STEP} prompts, ms"]
        print("\n" + table(head, [tokenizing(folder) for folder in a.tokenizer]))


if __name__ == "__main__":
    main()
