"""Sampling speed beside tunix's vanilla sampler and transformers' `generate`, on one CPU.

    python benchmarks/sampler.py [--rounds 3] [--tunix-python PATH] [--torch-python PATH]

A Qwen2-shaped network of 27 M random weights (8 layers, width 512, 8 query and 2 key heads, V
8,192), float32, 32 rows at once in every system. The schedule, made from one seed, says how long
every answer is, so that all systems make the same tokens; no one draws a stop id. Workloads:

- ragged: 8 prompts of 32 to 64 tokens x 16 samples, lengths log-normal with mean 64, at most 256;
- equal: 32 prompts of 64 tokens, 128 tokens each;
- prompts: the ragged prompts with one token each, which is nearly all prefill.

Rivals run in processes (and environments) of their own; rounds are interleaved, the order rotates;
compilation comes first and is reported apart. "Useful" tokens are those of the schedule.

Bound: the time that the machine needs for the useful work of the same steps, prompts read once,
every row always busy: per step the larger of FLOP / (rate of float32 matrix products, best block,
measured in the same run) and (weights + keys and values read) / (measured memory bandwidth).

Then, ours alone: sharing a prompt in its group, pages that are fewer than the rows could fill, and
types (float32, bfloat16, int8 pages): log-probabilities against the trainer's forward pass, and
how many answers differ between 32 rows and 16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from machine import header, peak_mib, table
from main_job import matmul_peak
from rivals import Rival
from train_step import SHAPE

from aspo_jax import runtime
from aspo_jax.head import Head
from aspo_jax.learner import forward
from aspo_jax.model import Model, ModelConfig, build_model, save_model
from aspo_jax.planning.flops import attention_flops, causal_pairs, head_flops, layer_weights
from aspo_jax.rows import BatchShape, answered, fill
from aspo_jax.sampler import TRAIN, Completion, Limits, PagedSampler, Request, make_publish
from aspo_jax.sampler.widths import WORTH

PAD, STOP = 0, 1
ROWS, PROMPT, CAP, GROUP = 32, 64, 256, 16
# A run's sampler reads as many prompts at once as fill its rows, in groups or alone.
LIMITS = Limits(PROMPT, CAP, ROWS, (STOP,), prompts=ROWS // GROUP)
ALONE = LIMITS._replace(prompts=ROWS)

Schedule = list[tuple[list[int], int]]  # prompt, length of the answer
Seconds = Callable[[Schedule], float]


def schedules() -> dict[str, Schedule]:
    """The workloads by name."""
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return rng.integers(2, SHAPE.vocab_size, length).tolist()

    prompts = [prompt(int(n)) for n in rng.integers(PROMPT // 2, PROMPT, 8, endpoint=True)]
    lengths = np.exp(rng.normal(np.log(CAP / 4) - 0.5, 1.0, len(prompts) * GROUP))
    lengths = np.clip(np.round(lengths), 1, CAP).astype(int).tolist()
    asked = [tokens for tokens in prompts for _ in range(GROUP)]
    return {
        "ragged": list(zip(asked, lengths, strict=True)),
        "equal": [(prompt(PROMPT), 128) for _ in range(ROWS)],
        "prompts": [(tokens, 1) for tokens in asked],
    }


# --- ours -------------------------------------------------------------------------------------


def requests(schedule: Schedule) -> list[Request]:
    """One request per answer, its length as its limit."""
    return [
        Request(tokens, (TRAIN, number // GROUP, 0, number % GROUP), max_tokens=length)
        for number, (tokens, length) in enumerate(schedule)
    ]


class Ours:
    """A network with a sampler over it; ``published``: another's weights, to be shared."""

    def __init__(
        self,
        params: Any,
        limits: Limits = LIMITS,
        dtype: str = "float32",
        shape: ModelConfig = SHAPE,
        published: Any = None,
    ):
        mesh = runtime.make_mesh(data=1)
        self.model: Model = build_model(shape, dtype=jnp.dtype(dtype), mesh=mesh)
        layered = build_model(shape, dtype=jnp.dtype(dtype), mesh=mesh, is_stacked=False)
        is_allowed_V = np.arange(shape.vocab_size) > STOP
        self.head = Head(1.0, is_allowed_V, mesh=mesh)
        publish = make_publish(layered, mesh, mesh, dtype)
        self.sampler = PagedSampler(layered, self.head, limits, mesh, seed=0, publish=publish)
        if published is None:
            self.sampler.start(params)
        else:
            self.sampler.params = published

    def draw(self, schedule: Schedule) -> list[Completion]:
        """The completions, in the order of the schedule."""
        got = sorted(self.sampler.sample(requests(schedule)), key=lambda c: c.request)
        assert [len(c.tokens_T) for c in got] == [length for _, length in schedule]
        return got

    def seconds(self, schedule: Schedule) -> float:
        start = time.perf_counter()
        self.draw(schedule)
        return time.perf_counter() - start


# --- rivals -----------------------------------------------------------------------------------


def timer(rival: Rival) -> Seconds:
    return lambda schedule: rival.ask(schedule)["seconds"]


@contextlib.contextmanager
def rivals(params: Any, pythons: dict[str, tuple[str, str]]) -> Iterator[dict[str, Rival]]:
    """The systems that are installed; each gets the same weights and task."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        save_model(folder, params, SHAPE, lambda _: None, eos_token_id=STOP)
        task = {"rows": ROWS, "prompt": PROMPT, "cap": CAP, "pad": PAD, "stop": STOP}
        more = {"threads": os.cpu_count(), "forbidden": [PAD, STOP]}
        (folder / "task.json").write_text(json.dumps(task | more))
        started = {who: Rival(script, folder, python) for who, (python, script) in pythons.items()}
        try:
            yield started
        finally:
            for rival in started.values():
                rival.close()


# --- the machine's bound ----------------------------------------------------------------------


class Machine(NamedTuple):
    """Rates of float32 products (FLOP/s) and of reading memory (bytes/s)."""

    flops: float
    bandwidth: float


def measure_machine() -> Machine:
    x = jnp.ones(2**26)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(x))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(total(x))
        best = min(best, time.perf_counter() - start)
    return Machine(max(matmul_peak().values()), x.nbytes / best)


def bound(schedule: Schedule, machine: Machine, weight_bytes: float) -> float:
    """Seconds for the useful work at the machine's rates, prompts once, 32 rows always busy."""
    prompts = {tuple(tokens) for tokens, _ in schedule}
    prefill = sum(
        2.0 * layer_weights(SHAPE) * len(p) + attention_flops(SHAPE, causal_pairs(len(p)))
        for p in prompts
    )
    tokens = sum(length for _, length in schedule)
    pairs = sum(n * len(p) + causal_pairs(n) for p, n in schedule)
    decode = (2.0 * layer_weights(SHAPE) + head_flops(SHAPE, 1)) * tokens
    decode += attention_flops(SHAPE, pairs)
    per_pair = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4
    traffic = tokens / ROWS * weight_bytes + per_pair * pairs
    return prefill / machine.flops + max(decode / machine.flops, traffic / machine.bandwidth)


# --- tables -----------------------------------------------------------------------------------


def race(
    systems: dict[str, Seconds], workloads: dict[str, Schedule], rounds: int
) -> tuple[dict[str, float], dict[tuple[str, str], list[float]]]:
    """Seconds of the first (compiling) run of all workloads, and of every later round."""
    names, first, taken = list(systems), {}, {}
    for name in names:
        first[name] = sum(systems[name](schedule) for schedule in workloads.values())
    for i in range(rounds):
        shift = i % len(names)
        for workload, schedule in workloads.items():
            for name in names[shift:] + names[:shift]:
                taken.setdefault((name, workload), []).append(systems[name](schedule))
    return first, taken


def speed_table(
    taken: dict[tuple[str, str], list[float]],
    workload: str,
    schedule: Schedule,
    limit: float,
    ours: str,
) -> str:
    """Useful tokens per second, ratio of ours to each, prefill share and share of the bound."""
    tokens = sum(length for _, length in schedule)
    body = []
    for (name, of), seconds in taken.items():
        if of != workload:
            continue
        ratio = statistics.median(
            x / y for x, y in zip(seconds, taken[ours, workload], strict=True)
        )
        share = [limit / x for x in seconds]
        prefill = statistics.median(taken[name, "prompts"]) / statistics.median(seconds)
        body.append(
            [
                name,
                f"{tokens / statistics.median(seconds):,.0f}",
                f"{tokens / min(seconds):,.0f}",
                f"{ratio:.2f}",
                f"{prefill:.0%}" if workload == "ragged" else "-",
                f"{statistics.median(share):.0%}",
                f"{max(share):.0%}",
            ]
        )
    head = [workload, "tokens/s, median", "fastest round", "x time of ours, median"]
    head += ["prefill share", "of the bound, median", "fastest"]
    return table(head, body)


def sharing_table(shared: Ours, alone: Ours, schedule: Schedule, rounds: int) -> str:
    """Seconds to read the prompts once per group and once per sample."""
    apart = [([n % 97 + 2, *tokens[1:]], 1) for n, (tokens, _) in enumerate(schedule)]
    seconds: dict[str, list[float]] = {"once per group": [], "once per sample": []}
    for _ in range(rounds + 1):
        for name, who, what in zip(seconds, (shared, alone), (schedule, apart), strict=True):
            seconds[name].append(prefill_seconds(who, what))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)][1:]
    body = [[name, f"{statistics.median(x[1:]):.3f}"] for name, x in seconds.items()]
    body.append(["ratio, median of rounds", f"{statistics.median(ratios):.1f}"])
    return table(["prompts read", "prefill, seconds"], body)


def prefill_seconds(who: Ours, schedule: Schedule) -> float:
    """Seconds inside the prefill program while the schedule is sampled."""
    real, spent = who.sampler.prefill, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        cache = jax.block_until_ready(real(*arguments))
        spent += time.perf_counter() - start
        return cache

    who.sampler.prefill = timed
    try:
        who.draw([(tokens, 1) for tokens, _ in schedule])
    finally:
        who.sampler.prefill = real
    return spent


def pages_table(params: Any, schedule: Schedule, rounds: int) -> str:
    """Speed, and sequences drawn again, with pages for all rows at full length and with fewer."""
    full = ROWS * LIMITS.row_pages
    shares = (1.0, 0.6, 0.4, 0.25)
    systems = {
        share: Ours(params, LIMITS._replace(cache_tokens=int(full * share) * LIMITS.page))
        for share in shares
    }
    taken: dict[float, list[float]] = {share: [] for share in shares}
    for who in systems.values():
        who.seconds(schedule)
    for _ in range(rounds):
        for share, who in systems.items():
            taken[share].append(who.seconds(schedule))
    tokens = sum(length for _, length in schedule)
    page_mib = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * LIMITS.page * 4 / 2**20
    body = []
    for share, who in systems.items():
        stats = who.sampler.stats
        again = stats.tokens / tokens - 1
        body.append(
            [
                f"{share:.0%}",
                f"{int(full * share) * page_mib:,.0f}",
                f"{tokens / statistics.median(taken[share]):,.0f}",
                f"{stats.preempted}",
                f"{again:.1%}",
            ]
        )
    head = ["pages, of full length", "cache, MiB", "tokens/s", "preempted", "tokens again"]
    return table(head, body)


def types_table(params: Any, schedule: Schedule) -> str:
    """Per type: gap to the trainer's forward pass, and answers that 32 and 16 rows draw apart."""
    body = []
    for dtype, cache in (("float32", None), ("float32", "int8"), ("bfloat16", None)):
        limits = LIMITS._replace(cache_type=cache)
        who = Ours(params, limits, dtype)
        got = who.draw(schedule)
        other = Ours(params, limits._replace(slots=ROWS // 2), dtype).draw(schedule)
        gap_n = gaps(who, params, schedule, got)
        apart = [bool((a.tokens_T != b.tokens_T).any()) for a, b in zip(got, other, strict=True)]
        diverged = sum(apart) / sum(len(c.tokens_T) for c in got)
        body.append(
            [
                f"{dtype}, pages {cache or dtype}",
                f"{gap_n.mean():.1e}",
                f"{gap_n.max():.1e}",
                f"{(np.abs(np.expm1(gap_n)) > 0.2).mean():.2%}",
                f"{np.mean(apart):.0%}",
                f"{diverged:.1e}",
            ]
        )
    head = ["types", "mean gap, nats", "largest", "ratio outside 1 +- 0.2"]
    head += ["answers that differ, 32 and 16 rows", "first differences per token"]
    return table(head, body)


def gaps(who: Ours, params: Any, schedule: Schedule, got: Sequence[Completion]) -> np.ndarray:
    """|sampler's - trainer's log-probability| of every token."""
    examples = [
        answered(prompt, c.tokens_T, c.policy_logp_T, 1.0, 0)
        for (prompt, _), c in zip(schedule, got, strict=True)
    ]
    rows: Any = fill(examples, BatchShape(1, len(examples) // 4, 4, PROMPT + CAP)).rows
    score = jax.jit(lambda params, part: forward(who.model, who.head, params, part)[0])
    found = []
    for m in range(len(examples) // 4):
        part = jax.tree.map(lambda x: x[m], rows)  # noqa: B023
        is_response = part.is_response_BT
        if is_response.any():
            gap = np.abs(np.asarray(score(params, part)) - part.sampler_logp_BT)
            found.append(gap[is_response])
    return np.concatenate(found)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sampling speed.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tunix-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    a = parser.parse_args()
    command = f"python benchmarks/sampler.py --rounds {a.rounds}"
    print(header("Sampler", command, ("jax", "jaxlib", "numpy")), flush=True)
    params = build_model(SHAPE).init(jax.random.key(0))
    workloads = schedules()
    ours, alone = Ours(params), Ours(params, ALONE)
    # A run looks for programs of fewer rows when they will pay; here they are compiled at once.
    ours.sampler.widths.thin_steps = WORTH

    def own_seconds(schedule: Schedule) -> float:
        is_shared = len({tuple(tokens) for tokens, _ in schedule}) < len(schedule)
        return (ours if is_shared else alone).seconds(schedule)

    machine = measure_machine()
    pythons = {
        "tunix, vanilla sampler": (a.tunix_python, "sampler_tunix_worker.py"),
        "transformers, generate": (a.torch_python, "sampler_torch_worker.py"),
    }
    with rivals(params, pythons) as found:
        for name, rival in found.items():
            print(f"{name}: {rival.versions or 'left out, ' + str(rival.missing)}\n", flush=True)
        present = {name: rival for name, rival in found.items() if rival.versions}
        systems = {"aspo_jax": own_seconds} | {n: timer(r) for n, r in present.items()}
        first, taken = race(systems, workloads, a.rounds)
        peaks = {n: r.ask(workloads["prompts"])["peak_mib"] for n, r in present.items()}
    peaks["aspo_jax"] = peak_mib()
    again = measure_machine()
    machine = Machine(max(machine.flops, again.flops), max(machine.bandwidth, again.bandwidth))
    size = 4.0 * sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{size / 4e6:.1f} M parameters; machine: {machine.flops / 1e9:.0f} GFLOP/s float32, "
        f"{machine.bandwidth / 1e9:.1f} GB/s.\n"
    )
    for workload in ("ragged", "equal"):
        limit = bound(workloads[workload], machine, size)
        print(speed_table(taken, workload, workloads[workload], limit, "aspo_jax"), "\n")
    compiling = {
        name: first[name] - sum(statistics.median(taken[name, w]) for w in workloads)
        for name in systems
    }
    body = [[name, f"{compiling[name]:.1f}", f"{peaks[name]:,.0f}"] for name in systems]
    print(table(["system", "compiling, seconds", "peak memory of the process, MiB"], body), "\n")
    ours.draw(workloads["ragged"])
    stats = ours.sampler.stats
    tokens = sum(length for _, length in workloads["ragged"])
    print(
        f"Ragged: {tokens:,} tokens in {stats.steps} steps and {stats.calls} calls of the decode "
        f"program ({stats.calls / tokens:.3f} a token); rows busy "
        f"{stats.busy_tokens / max(stats.busy_steps, 1) / ROWS:.1%} until the queue is empty "
        f"({stats.busy_steps} steps), {stats.tokens / stats.steps / ROWS:.1%} in all; "
        f"{stats.prefilled} prompt tokens read.\n"
    )
    print(sharing_table(ours, alone, workloads["prompts"], a.rounds), "\n")
    print(pages_table(params, workloads["ragged"], a.rounds), "\n")
    print(types_table(params, workloads["ragged"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
