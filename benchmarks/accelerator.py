"""How close sampling and training at full size come to what the accelerator here can do.

    python benchmarks/accelerator.py [--model Qwen2.5-1.5B] [--rows 4x4096:dots ...]
        [--slots 1 32 ...] [--set ...] [--trace FOLDER]

Weights and tokens are random: only the shapes are the model's. The config is `aspo_math_1p5b` but
for the sizes given here. ``--rows 4x4096:dots``: score and update rows of 4,096 tokens, four of
them in a micro-batch, with that `Model.remat`; each row holds one sequence, then sequences of
log-normal lengths, about eight of them. AdamW in float32, the objective of the config with its
reference policy's log-probabilities given. ``--slots 32``: decode 32 sequences at once, as many
requests of full length, then four times as many of ragged lengths. What is timed has run once
before; medians of the rounds.

The share of the chip's peak (MFU) counts 2 FLOP for each weight and token of a forward pass, 6 of
an update (4 of one that trains adapters, whose frozen matrices have no gradient), and attention's
causal pairs; what is computed again for want of memory is not counted.
The share of the bandwidth's bound is that of the time in which the memory could deliver, at the
maker's figure, the weights once for each step (as many as full slots would need) and each row's
live keys and values once for each of its tokens, with the time that all took, reading of prompts
and the host's work included.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from machine import header, table

from aspo_jax.config import Config
from aspo_jax.head import Head
from aspo_jax.learner import build_learner
from aspo_jax.library import configure, start
from aspo_jax.model import Model, ModelConfig, trained_part
from aspo_jax.parts import build_goal, build_limits, build_optimizer, build_sampling_network
from aspo_jax.planning.flops import causal_pairs, forward_flops, head_flops, layer_weights
from aspo_jax.planning.programs import read_shape
from aspo_jax.planning.topology import CHIPS, Chip
from aspo_jax.policy import build_lora, build_network, parameter_count
from aspo_jax.rows import BatchShape, Example, fill
from aspo_jax.sampler import EVALUATE, PagedSampler, Request, make_publish
from aspo_jax.structs import OldPolicy

PROMPT = 256
MANY = 8  # sequences of a packed row, about


class Case(NamedTuple):
    """Rows of a micro-batch, tokens of each, and what the backward pass keeps."""

    rows: int
    tokens: int
    remat: str


def case(word: str) -> Case:
    sizes, _, remat = word.partition(":")
    rows, _, tokens = sizes.partition("x")
    return Case(int(rows), int(tokens), remat or "full")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="Qwen2.5-1.5B", help="a shape of configs/shapes")
    parser.add_argument("--rows", type=case, nargs="*", default=[Case(4, 4096, "dots")])
    parser.add_argument("--slots", type=int, nargs="*", default=[128], help="decoded at once")
    parser.add_argument("--response", type=int, default=1024, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="a setting of the config")
    parser.add_argument("--trace", help="a folder for traces of what is timed last")
    return parser.parse_args()


def settings(a: argparse.Namespace, rows: Case, slots: int) -> Config:
    sizes = [
        f"Model.path='{a.model}'",
        f"Model.remat='{rows.remat}'",
        f"Train.row_tokens={max(rows.tokens, PROMPT + a.response)}",
        f"Train.rows_per_microbatch={rows.rows}",
        f"Sampler.slots={slots}",
        f"Sampler.max_prompt_tokens={PROMPT}",
        f"Sampler.max_response_tokens={a.response}",
        "Sampler.cache_tokens=None",
        "Runtime.fsdp=-1",
        "Runtime.data=1",
        *a.set,
    ]
    return configure("aspo_math_1p5b", *sizes)


def flops(shape: ModelConfig, lengths: Sequence[int]) -> float:
    """Of one forward pass over sequences of these lengths, logits of their responses."""
    whole = forward_flops(shape, sum(lengths), sum(map(causal_pairs, lengths)))
    return whole - head_flops(shape, sum(map(prompt_of, lengths)))


def prompt_of(length: int) -> int:
    return min(PROMPT, length // 2)


def frozen_weights(model: Model, dtype: str, mesh: Mesh) -> Any:
    """Random ones, of a type that is no int8."""

    def make(key):
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    return jax.jit(make, out_shardings=model.shardings(mesh))(jax.random.key(1))


class Timed(NamedTuple):
    """Seconds: of the first call, which compiles, and the median of the others."""

    first: float
    median: float


def timed(run: Callable[[], None], rounds: int, trace: str | None) -> Timed:
    begin = time.perf_counter()
    run()
    first, seconds = time.perf_counter() - begin, []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    if trace:
        with jax.profiler.trace(trace, create_perfetto_trace=True):
            run()
    return Timed(first, statistics.median(seconds))


def several(tokens: int, rng: np.random.Generator) -> list[int]:
    """Lengths of the sequences that fill a row."""
    lengths, left = [], tokens
    while left >= 16:
        drawn = int(np.clip(rng.lognormal(np.log(tokens / MANY), 0.8), 16, left))
        lengths.append(drawn)
        left -= drawn
    return lengths


def update_rows(a: argparse.Namespace, it: Case, shape: ModelConfig, mesh: Mesh, chip: Chip):
    """Rows of the table: scoring and an update, of rows of one sequence and of several."""
    config = settings(a, it, slots=1)
    t = config.train
    model, lora = build_network(config, shape, mesh, t.row_tokens), build_lora(config)
    trained = trained_part(model, lora)
    allowed = np.ones(shape.vocab_size, bool)
    head = Head(temperature=1.0, is_allowed_V=allowed, chunk=t.head_chunk, mesh=mesh)
    optimizer = build_optimizer(config, trained.axes)[0]
    learner = build_learner(model, head, build_goal(config), optimizer, mesh, lora=lora)
    frozen = frozen_weights(model, config.frozen_dtype, mesh) if lora else None
    params = jax.jit(trained.init, out_shardings=trained.shardings(mesh))
    state = learner.init(params(jax.random.key(0)))
    rng = np.random.default_rng(0)
    batch = BatchShape(1, 1, it.rows, t.row_tokens, model.attention.sequences)
    print(f"{parameter_count(state.params):,} trained parameters, attention {model.attention.name}")
    for what in ("one sequence a row", "packed"):
        row = several(it.tokens, rng) if what == "packed" else [it.tokens]
        lengths = row * it.rows
        made = []
        for number, length in enumerate(lengths):
            text = rng.integers(0, shape.vocab_size, length + 1).astype(np.int32)
            is_response = np.arange(length + 1) > prompt_of(length)
            logp = np.full(length + 1, -1.0, np.float32)
            made.append(Example(text, is_response, logp, (-1.0) ** number, number))
        part = learner.place(fill(made, batch))

        whole = trained.whole(state.params, frozen)
        old = learner.old_policy(whole, None, part)
        given = OldPolicy(old.old_logp_BT, old.old_entropy_BT, old.old_logp_BT)
        scored = dataclasses.replace(part, old=given)

        def score(part=part) -> None:
            whole = trained.whole(state.params, frozen)
            jax.block_until_ready(learner.old_policy(whole, None, part))

        def update(part=scored) -> None:
            nonlocal state
            state, report = learner.step(state, part, frozen)
            jax.block_until_ready(report)

        once = flops(shape, lengths)
        backward = 1 if lora else 2  # frozen matrices have no gradient
        for does, run, passes in (("score", score, 1), ("update", update, 1 + backward)):
            took = timed(run, a.rounds, a.trace and f"{a.trace}/{does}_{it.tokens}")
            share = passes * once / took.median / chip.flops
            yield [
                f"{does}, {it.rows} x {it.tokens:,}, {what}, remat {it.remat}",
                f"{sum(lengths) / took.median:,.0f}",
                f"{share:.1%}",
                f"{took.median * 1e3:,.1f}",
                f"{took.first:.0f}",
            ]


def sampling_rows(a: argparse.Namespace, slots: int, shape: ModelConfig, mesh: Mesh, chip: Chip):
    """Rows of the table: sampling equal lengths, and ragged ones."""
    config = settings(a, Case(1, PROMPT + a.response, "full"), slots)
    model = build_sampling_network(config, shape, mesh)
    allowed = np.ones(shape.vocab_size, bool)
    head = Head(temperature=1.0, is_allowed_V=allowed, chunk=1024, mesh=mesh)
    limits = build_limits(config, mesh, 1, (0,))
    publish = make_publish(model, mesh, mesh, config.model.dtype)
    sampler = PagedSampler(model, head, limits, mesh, seed=0, publish=publish)
    trained = build_network(config, shape, mesh, config.train.row_tokens)
    params = jax.jit(trained.init, out_shardings=trained.shardings(mesh))
    sampler.start(params(jax.random.key(0)))
    rng = np.random.default_rng(1)
    longest = limits.max_response_tokens
    ragged = np.clip(rng.lognormal(np.log(longest / 4), 0.8, 4 * slots), 16, longest).astype(int)
    weights = 2.0 * (layer_weights(shape) + shape.vocab_size * shape.hidden_size)
    of_token = 4.0 * shape.layers * shape.kv_heads * shape.head_dim
    for what, lengths in (("equal", [longest] * slots), ("ragged", ragged)):
        requests = [
            Request(
                tuple(rng.integers(1, shape.vocab_size, PROMPT).tolist()),
                (EVALUATE, i, 0, 0),
                max_tokens=int(length),
            )
            for i, length in enumerate(lengths)
        ]
        drawn: list[int] = []

        def run(requests=requests, drawn=drawn) -> None:
            drawn[:] = [len(c.tokens_T) for c in sampler.sample(requests)]

        took = timed(run, a.rounds, a.trace and f"{a.trace}/decode_{slots}_{what}")
        live = sum(PROMPT * length + causal_pairs(length) for length in drawn)
        least = (weights * sum(drawn) / slots + of_token * live) / chip.bandwidth
        steps = sum(drawn) / slots
        yield [
            f"sample, {slots} slots, {what}",
            f"{sum(drawn) / took.median:,.0f}",
            f"{least / took.median:.1%}",
            f"{took.median / steps * 1e3:.2f} a step",
            f"{took.first:.0f}",
        ]


def main() -> None:
    a = arguments()
    mesh = start(settings(a, Case(1, 2048, "full"), 1))
    device = jax.devices()[0].device_kind
    chip = next((chip for name, chip in CHIPS.items() if name in device.lower()), CHIPS["cpu"])
    count = jax.device_count()
    chip = chip._replace(flops=count * chip.flops, bandwidth=count * chip.bandwidth)
    title = f"{a.model} on {count} x {device}"
    command = f"python benchmarks/accelerator.py {shlex.join(sys.argv[1:])}".strip()
    print(header(title, command, ("jax",)))
    shape = read_shape(settings(a, Case(1, 2048, "full"), 1)).config
    columns = ["what", "tokens/s", "share of the peak, of the bandwidth", "ms", "first call, s"]
    print(table(columns, []), flush=True)
    for it in a.rows:
        show(update_rows(a, it, shape, mesh, chip))
    for slots in a.slots:
        show(sampling_rows(a, slots, shape, mesh, chip))


def show(rows: Any) -> None:
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    used = jax.devices()[0].memory_stats()
    if used:
        print(f"peak device memory so far {used['peak_bytes_in_use'] / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
