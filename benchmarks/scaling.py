"""How the update grows: with the length of a row, and with the number of devices.

    python benchmarks/scaling.py [--longest 32768] [--rounds 2]

Lengths: one sequence in one row of 1k to ``longest`` tokens, a small Qwen2 (2 layers, width 128,
two heads of 64, vocabulary 8,192), float32, remat "full": seconds and temporaries per token, with
the chunked attention and, up to 4k tokens, the dense one. Devices: the same update compiled for
meshes of 1 to 8 simulated devices; memory of each device, and the collectives of the compiled
program. Simulated devices share the cores, so nothing is timed there.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from machine import header, table

from aspo_jax.head import Head
from aspo_jax.learner import Goal, Learner, build_learner
from aspo_jax.losses import aspo, sequence_mean
from aspo_jax.model import Model, ModelConfig, build_model, choose_attention
from aspo_jax.model.sharding import MESH_AXES
from aspo_jax.rows import BatchShape, answered, fill
from aspo_jax.structs import Minibatch

SHAPE = ModelConfig(
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=256,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=64,
)
DENSE_UP_TO = 4096
MESHES = ((1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2), (8, 1, 1), (1, 8, 1), (2, 2, 2))


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def build(sizes: tuple[int, ...], tokens: int, attention: str) -> tuple[Model, Learner]:
    mesh = mesh_of(sizes)
    chosen = choose_attention(
        "cpu",
        head_dim=SHAPE.head_dim,
        row_tokens=tokens,
        packed=True,
        dtype=np.float32,
        mesh=mesh,
        name=attention,
    )
    model = build_model(SHAPE, attention=chosen, mesh=mesh, remat="full")
    head = Head(1.0, np.ones(SHAPE.vocab_size, bool), chunk=512, mesh=mesh)
    goal = Goal(aspo(), sequence_mean)
    return model, build_learner(model, head, goal, optax.adamw(1e-6), mesh)


def part_of(rows: int, tokens: int) -> Minibatch:
    """One full sequence a row."""
    rng = np.random.default_rng(0)
    examples = [
        answered(
            rng.integers(2, SHAPE.vocab_size, 64).tolist(),
            rng.integers(2, SHAPE.vocab_size, tokens - 63),
            logp_T=-9.0,
            advantage=(-1.0) ** row,
            group=row,
        )
        for row in range(rows)
    ]
    return fill(examples, BatchShape(1, 1, rows, tokens))


def compiled(sizes: tuple[int, ...], rows: int, tokens: int, attention: str = "chunked") -> Any:
    """(compiled step, its state, its mini-batch)."""
    model, learner = build(sizes, tokens, attention)
    state = learner.init(jax.jit(model.init)(jax.random.key(0)))
    part = learner.place(part_of(rows, tokens))
    part = learner.with_old(state.params, None, part)
    return learner.step.lower(state, part).compile(), state, part


def seconds(program: Any, state: Any, part: Minibatch, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, _ = program(state, part)
        jax.block_until_ready(state)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def by_length(longest: int, rounds: int) -> str:
    lines, tokens = [], 1024
    while tokens <= longest:
        for attention in ("chunked", "dense") if tokens <= DENSE_UP_TO else ("chunked",):
            program, state, part = compiled((1, 1, 1), 1, tokens, attention)
            temporaries = program.memory_analysis().temp_size_in_bytes
            each = seconds(program, state, part, rounds) / tokens
            cells = [f"{1e3 * each:.3f}", f"{temporaries / tokens / 1024:.1f}"]
            lines.append([f"{tokens:,}", attention, *cells, f"{temporaries / 2**20:,.0f}"])
        tokens *= 2
    head = ["tokens a row", "attention", "ms a token", "temporaries, KiB a token"]
    return table([*head, "temporaries, MiB"], lines)


def collectives(text: str) -> str:
    """Kinds of collectives and how often each stands in the compiled program."""
    kinds = Counter(
        re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    )
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def by_devices() -> str:
    lines = []
    for sizes in MESHES:
        program, *_ = compiled(sizes, rows=8, tokens=1024)
        memory = program.memory_analysis()
        mib = [x / 2**20 for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
        name = " x ".join(map(str, sizes))
        found = collectives(program.as_text())
        lines.append([name, str(int(np.prod(sizes))), *(f"{x:.1f}" for x in mib), found])
    head = ["data x fsdp x tensor", "devices", "arguments, MiB each", "temporaries, MiB each"]
    return table([*head, "collectives (a loop's body counted once)"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The update over row lengths and devices.")
    parser.add_argument("--longest", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=2)
    a = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    print(header("Scaling", "python benchmarks/scaling.py", ("jax", "jaxlib")))
    print(f"8 rows of 1,024 tokens:\n\n{by_devices()}\n", flush=True)
    print(by_length(a.longest, a.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
