"""A real model on one CPU: loading, compiling, the first token, sampling beside transformers.

    python benchmarks/width.py MODEL_FOLDER [--rounds 3] [--slots 32 16] [--torch-python PATH]

The weights of a Hugging Face folder in float32, as many threads as cores in both systems, 8 prompts
of 48 to 96 tokens x 4 samples. The schedule, made from one seed, says how long every answer is, and
nobody heeds an eos:

- ragged: lengths log-normal, 2 to 192, mean 41;
- equal: 48 tokens each;
- first: one token each, nearly all prefill.

`generate` gets the 32 answers as one batch, and in batches of 8 sorted by their lengths, which
nobody knows outside a benchmark. Ours gets them in their order, one system per number of slots.
Rounds are interleaved, the order rotates. On a machine that is shared the ratios of CPU seconds say
more than those of seconds. Programs are those of a training run, compiled without a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from machine import header, peak_mib, table
from rivals import Rival
from sampler import Ours, Schedule

from aspo_jax import runtime
from aspo_jax.config import Config
from aspo_jax.library import configure, load, sample
from aspo_jax.model import load_params, read_model_config
from aspo_jax.parts import build_limits
from aspo_jax.planning.programs import programs

PROMPTS, GROUP, PROMPT, CAP = 8, 4, 96, 192
PAD, STOP = 0, 1  # of both systems; in no prompt
SETTINGS = (
    *("Sampler.max_prompt_tokens=96", "Sampler.max_response_tokens=192"),
    *("Train.prompts_per_step=8", "Train.samples_per_prompt=4", "Train.prompts_per_minibatch=8"),
    *("Train.row_tokens=288", "Train.rows_per_microbatch=4"),
)
SLOTS = [16, 32]


def schedules(vocab_size: int) -> dict[str, Schedule]:
    """The workloads by name."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(PROMPT // 2, PROMPT, PROMPTS, endpoint=True)
    prompts = [rng.integers(2, vocab_size, int(n)).tolist() for n in sizes]
    lengths = np.exp(rng.normal(np.log(60) - 0.5, 1.0, PROMPTS * GROUP))
    ragged = np.clip(np.round(lengths), 1, CAP).astype(int).tolist()
    asked = [tokens for tokens in prompts for _ in range(GROUP)]
    return {
        "ragged": list(zip(asked, ragged, strict=True)),
        "equal": [(tokens, 48) for tokens in asked],
        "first": [(tokens, 1) for tokens in asked],
    }


# --- who samples --------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of a workload: wall-clock and CPU seconds, the latter of all threads."""

    seconds: float
    cpu: float

    def __add__(self, other: Any) -> Cost:
        return Cost(*map(sum, zip(self, other, strict=True)))


System = Callable[[Schedule], Cost]


def ours(folder: Path, slots: list[int]) -> tuple[dict[str, System], str]:
    """Our sampler by number of slots, over one copy of the weights; what making it took."""
    shape, start = read_model_config(folder), time.perf_counter()
    params = jax.block_until_ready(load_params(folder, shape))
    loaded = time.perf_counter()
    samplers = []
    for n in slots:
        limits = build_limits(configured(folder, n), runtime.make_mesh(data=1), 1, (STOP,))
        published = samplers[0].sampler.params if samplers else None
        samplers.append(Ours(params, limits, shape=shape, published=published))
    again = time.perf_counter()
    samplers[0].sampler.start(params)
    jax.block_until_ready(samplers[0].sampler.params)
    note = (
        f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.0f} M parameters, loaded in "
        f"{loaded - start:.1f} s; the sampler's copy of the layers is made in "
        f"{time.perf_counter() - again:.1f} s."
    )
    return {
        f"aspo_jax, {n} slots": measured(who) for n, who in zip(slots, samplers, strict=True)
    }, note


def measured(who: Ours) -> System:
    def cost(schedule: Schedule) -> Cost:
        worked = time.process_time()
        return Cost(who.seconds(schedule), time.process_time() - worked)

    return cost


def configured(folder: Path, slots: int) -> Config:
    """A training run on 8 prompts x 4 samples."""
    settings = (f"Model.path={str(folder)!r}", f"Sampler.slots={slots}", *SETTINGS)
    return configure("countdown_cpu", *settings)


@contextlib.contextmanager
def transformers(folder: Path, python: str) -> Iterator[Rival]:
    """`generate` over the same folder."""
    with tempfile.TemporaryDirectory() as name:
        for file in folder.resolve().iterdir():
            Path(name, file.name).symlink_to(file)
        task = {"rows": PROMPTS * GROUP, "pad": PAD, "stop": STOP, "forbidden": None}
        Path(name, "task.json").write_text(json.dumps(task | {"threads": os.cpu_count()}))
        rival = Rival("sampler_torch_worker.py", Path(name), python)
        try:
            yield rival
        finally:
            rival.close()


def in_batches(rival: Rival, rows: int) -> System:
    """`generate` in batches of answers of like length."""

    def cost(schedule: Schedule) -> Cost:
        total, by_length = Cost(0.0, 0.0), sorted(schedule, key=lambda one: one[1])
        for i in range(0, len(by_length), rows):
            answer = rival.ask(by_length[i : i + rows])
            total += Cost(answer["seconds"], answer["cpu_seconds"])
        return total

    return cost


def race(
    systems: dict[str, System], workloads: dict[str, Schedule], rounds: int
) -> dict[tuple[str, str], list[Cost]]:
    """What each workload cost each system, round by round; compiling comes before."""
    names, taken = list(systems), {}
    for name in names:
        systems[name](workloads["first"])
    for i in range(rounds):
        shift = i % len(names)
        for workload, schedule in workloads.items():
            for name in names[shift:] + names[:shift]:
                cost = systems[name](schedule)
                print(f"{workload}, {name}: {cost}", file=sys.stderr, flush=True)
                taken.setdefault((name, workload), []).append(cost)
    return taken


# --- programs and the first token, each in a process of its own --------------------------------


def child(*argv: str) -> dict[str, float]:
    """What this file prints with these arguments, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *argv], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compile_programs(folder: str) -> dict[str, float]:
    """CPU seconds, tracing included, of each program of a training run."""
    config = configured(Path(folder), SLOTS[0])
    mesh, found = runtime.make_mesh(data=1), {}
    shape = read_model_config(folder)
    for name, program in programs(config, shape, mesh, mesh, "cpu").by_name.items():
        start = time.process_time()
        program.lower().compile()
        found[name] = time.process_time() - start
    return found


def first_token(folder: str, cache: str) -> dict[str, float]:
    """Wall-clock seconds of a process from its imports to the first token of one prompt."""
    start = time.perf_counter()
    model = load(folder, f"Runtime.compilation_cache={cache!r}")
    loaded = time.perf_counter()
    sample(model, ["Write a function that adds two numbers."], max_tokens=1)
    first = time.perf_counter()
    sample(model, ["Write a function that adds three numbers."], max_tokens=1)
    again = time.perf_counter() - first
    return {
        "load": loaded - start,
        "first token": first - loaded,
        "again": again,
        "cpu": time.process_time(),
        "mib": peak_mib(),
    }


# --- tables ---------------------------------------------------------------------------------------


def speed_table(
    taken: dict[tuple[str, str], list[Cost]], workloads: dict[str, Schedule], mine: str
) -> str:
    """Useful tokens per second by workload, and how much more time and CPU time than ``mine``."""
    body = []
    for name in dict.fromkeys(name for name, _ in taken):
        cells = [name]
        for workload in ("ragged", "equal"):
            tokens = sum(length for _, length in workloads[workload])
            costs, base = taken[name, workload], taken[mine, workload]
            ratios = [
                statistics.median(x[k] / y[k] for x, y in zip(costs, base, strict=True))
                for k in range(len(Cost._fields))
            ]
            cells.append(f"{tokens / statistics.median(x.seconds for x in costs):.1f}")
            cells += [f"{ratio:.2f}" for ratio in ratios]
        first = statistics.median(x.seconds for x in taken[name, "first"])
        body.append([*cells, f"{first:.2f}"])
    head = [
        f"{what}{x}"
        for what in ("ragged", "equal")
        for x in (", tokens/s", ", x time", ", x CPU time")
    ]
    return table(["system", *head, "32 first tokens, seconds"], body)


def report_start(folder: Path) -> None:
    """Print what a process pays before it samples."""
    compiled = child("--compile", str(folder))
    body = [[name, f"{seconds:.1f}"] for name, seconds in compiled.items()]
    print(table(["program", "compiling, CPU seconds"], body), "\n", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        starts = [child("--first", str(folder), cache) for _ in range(2)]
    body = [
        [name, *(f"{found[key]:.1f}" for key in ("load", "first token", "again"))]
        for name, found in zip(("cold", "warm"), starts, strict=True)
    ]
    head = ["compilation cache", "loading, seconds", "to the first token then", "of a next prompt"]
    print(table(head, body), "\n", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    a = parser.parse_args(argv)
    command = f"python benchmarks/width.py {a.model.name} --rounds {a.rounds}"
    print(header(f"Real width: {a.model.name}", command, ("jax", "jaxlib")), flush=True)
    report_start(a.model)
    workloads = schedules(read_model_config(a.model).vocab_size)
    systems, note = ours(a.model, a.slots)
    print(note, "\n", flush=True)
    with transformers(a.model, a.torch_python) as rival:
        print(f"transformers: {rival.versions or rival.missing}\n", flush=True)
        if rival.versions:
            systems["transformers, one batch"] = in_batches(rival, PROMPTS * GROUP)
            systems["transformers, sorted, 8 at once"] = in_batches(rival, 8)
        taken = race(systems, workloads, a.rounds)
    print(speed_table(taken, workloads, f"aspo_jax, {a.slots[0]} slots"))
    lengths = [length for _, length in workloads["ragged"]]
    print(f"\nragged: {len(lengths)} answers, {sum(lengths)} tokens, longest {max(lengths)}.")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--compile":
        print(json.dumps(compile_programs(sys.argv[2])))
    elif sys.argv[1] == "--first":
        print(json.dumps(first_token(*sys.argv[2:])))
    else:
        sys.exit(main(sys.argv[1:]))
