"""Tokens/s of sampling and of one update at full size, on whatever accelerator is here.

    python benchmarks/accelerator.py [--model Qwen2.5-1.5B] [--tokens 4096] [--rows 4] [--set ...]

Weights and tokens are random: only the shapes are the model's. The config is `aspo_math_1p5b` but
for the sizes given here. One update: rows full of one sequence each, AdamW, the objective of the
config with its reference policy's log-probabilities given. Sampling: as many requests as slots,
then twice as many of ragged lengths. What is timed has run once before; medians of the rounds.

The share of the chip's peak (MFU) counts 6 N FLOP a token and the causal pairs of attention, as
published figures do; what is computed again for want of memory is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from machine import header, table

from aspo_jax.config import Config
from aspo_jax.head import Head
from aspo_jax.learner import build_learner
from aspo_jax.library import configure, start
from aspo_jax.model import ModelConfig
from aspo_jax.parts import build_goal, build_limits, build_optimizer, build_sampling_network
from aspo_jax.planning.flops import causal_pairs, forward_flops
from aspo_jax.planning.programs import read_shape
from aspo_jax.policy import build_network, parameter_count
from aspo_jax.rows import BatchShape, Example, fill
from aspo_jax.sampler import EVALUATE, PagedSampler, Request, make_publish
from aspo_jax.structs import OldPolicy

PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}  # dense bfloat16 FLOP/s, the makers' figures
PROMPT = 256
ROUNDS = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="Qwen2.5-1.5B", help="a shape of configs/shapes")
    parser.add_argument("--tokens", type=int, default=4096, help="of a training row")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--slots", type=int, default=128, help="sequences decoded at once")
    parser.add_argument("--response", type=int, default=1024, help="tokens of a response")
    parser.add_argument("--set", action="append", default=[], help="a setting of the config")
    return parser.parse_args()


def settings(a: argparse.Namespace) -> Config:
    sizes = [
        f"Model.path='{a.model}'",
        f"Train.row_tokens={max(a.tokens, PROMPT + a.response)}",
        f"Train.rows_per_microbatch={a.rows}",
        f"Sampler.slots={a.slots}",
        f"Sampler.max_prompt_tokens={PROMPT}",
        f"Sampler.max_response_tokens={a.response}",
        "Sampler.cache_tokens=None",
        "Runtime.fsdp=-1",
        "Runtime.data=1",
        *a.set,
    ]
    return configure("aspo_math_1p5b", *sizes)


def flops(shape: ModelConfig, lengths: list[int]) -> float:
    """Of one forward pass over sequences of these lengths."""
    return forward_flops(shape, sum(lengths), sum(map(causal_pairs, lengths)))


def median_s(run: Any) -> float:
    """Of the rounds, after one that compiles."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def update_rows(config: Config, shape: ModelConfig, mesh: Any, tokens: int, peak: float) -> list:
    """[what, tokens/s, MFU] of scoring and of an update."""
    t = config.train
    model = build_network(config, shape, mesh, t.row_tokens)
    allowed = np.ones(shape.vocab_size, bool)
    head = Head(temperature=1.0, is_allowed_V=allowed, chunk=t.head_chunk, mesh=mesh)
    optimizer = build_optimizer(config, model.axes())[0]
    learner = build_learner(model, head, build_goal(config), optimizer, mesh)
    params = jax.jit(model.init, out_shardings=model.shardings(mesh))
    state = learner.init(params(jax.random.key(0)))
    rng = np.random.default_rng(0)
    rows = t.rows_per_microbatch
    made = []
    for row in range(rows):
        text = rng.integers(0, shape.vocab_size, tokens + 1).astype(np.int32)
        is_response = np.arange(tokens + 1) >= PROMPT
        logp = np.full(tokens + 1, -1.0, np.float32)
        made.append(Example(text, is_response, logp, (-1.0) ** row, row))
    batch = BatchShape(minibatches=1, microbatches=1, rows=rows, row_tokens=t.row_tokens)
    part = learner.place(fill(made, batch))
    score_s = median_s(lambda: jax.block_until_ready(learner.old_policy(state.params, None, part)))
    old = learner.old_policy(state.params, None, part)
    part = dataclasses.replace(
        part, old=OldPolicy(old.old_logp_BT, old.old_entropy_BT, old.old_logp_BT)
    )

    def update() -> None:
        nonlocal state
        state, report = learner.step(state, part)
        jax.block_until_ready(report)

    update_s = median_s(update)
    once = flops(shape, [tokens] * rows)
    count = parameter_count(state.params)
    print(f"{count:,} parameters, attention {model.attention.name}, {rows} x {tokens} tokens")
    return [
        ["score (forward)", f"{rows * tokens / score_s:,.0f}", f"{once / score_s / peak:.1%}"],
        ["update", f"{rows * tokens / update_s:,.0f}", f"{3 * once / update_s / peak:.1%}"],
    ]


def sampling_rows(config: Config, shape: ModelConfig, mesh: Any) -> list:
    """[what, tokens/s, -] of sampling equal and ragged lengths."""
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
    slots, longest = limits.slots, limits.max_response_tokens
    ragged = np.clip(rng.lognormal(np.log(longest / 4), 0.8, 2 * slots), 16, longest).astype(int)
    rows = []
    for what, lengths in (("sample, equal", [longest] * slots), ("sample, ragged", ragged)):
        requests = [
            Request(
                tuple(rng.integers(1, shape.vocab_size, PROMPT).tolist()),
                (EVALUATE, i, 0, 0),
                max_tokens=int(length),
            )
            for i, length in enumerate(lengths)
        ]
        drawn = []

        def run(requests=requests, drawn=drawn) -> None:
            drawn[:] = [len(c.tokens_T) for c in sampler.sample(requests)]

        seconds = median_s(run)
        rows.append([what, f"{sum(drawn) / seconds:,.0f}", "-"])
    return rows


def main() -> None:
    a = arguments()
    config = settings(a)
    mesh = start(config)
    device = jax.devices()[0].device_kind
    peak = next((flop for name, flop in PEAK.items() if name in device), float("nan"))
    command = f"python benchmarks/accelerator.py --model {a.model} --tokens {a.tokens}"
    print(header(f"Full size on {jax.device_count()} x {device}", command, ("jax",)))
    shape = read_shape(config).config
    rows = update_rows(config, shape, mesh, a.tokens, peak * jax.device_count())
    rows += sampling_rows(config, shape, mesh)
    print(table(["what", "tokens/s", "of the peak (MFU)"], rows))
    used = jax.devices()[0].memory_stats()
    if used:
        print(f"\npeak device memory {used['peak_bytes_in_use'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
