"""Log-probability and entropy of a 151,936-word vocabulary: chunked against plain, with gradients.

    python benchmarks/logprobs.py [--tokens 34816] [--timed-tokens 2048] [--chunk 512] [--rounds 5]

Both compute log pi(y) and the entropy of every position, and the gradient of a function of both
with respect to hidden states and projection. Plain is what one writes first: logits of all
positions, `jax.nn.log_softmax`, autodiff. Memory: the compiler's temporaries for one row of
``tokens`` at width 1,536 (Qwen 1.5B), bfloat16 hidden states, nothing executed. Time: at width 512
and ``timed-tokens``, float32, interleaved rounds, median of the ratios; values and gradients are
compared first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import header, table

from aspo_jax.head import Head, logits, logp_and_entropy

V = 151_936
ALLOWED = np.arange(V) < 151_665  # rows behind the tokenizer are out of the softmax


def plain(head: Head, weight_VD: Any, hidden_BTD: Any, target_BT: Any):
    """The definition, [B, T, V] at once."""
    B, T, D = hidden_BTD.shape
    z_NV = logits(head, weight_VD, hidden_BTD.reshape(B * T, D))
    logp_NV = jax.nn.log_softmax(z_NV, axis=-1)
    logp_N = jnp.take_along_axis(logp_NV, target_BT.reshape(-1, 1), axis=-1)[:, 0]
    entropy_N = -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1)
    return logp_N.reshape(B, T), entropy_N.reshape(B, T)


def make(program: Any, chunk: int) -> Any:
    """(weight, hidden, target) -> (value, gradients), jitted."""
    head = Head(1.0, ALLOWED, chunk)

    def scalar(weight_VD, hidden_BTD, target_BT):
        logp_BT, entropy_BT = program(head, weight_VD, hidden_BTD, target_BT)
        return jnp.mean(logp_BT) + 0.1 * jnp.mean(entropy_BT)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1)))


PROGRAMS = {"plain": plain, "chunked": logp_and_entropy}


def temporaries(tokens: int, chunk: int) -> dict[str, int]:
    """Bytes of temporaries at full width, by the compiler."""
    D = 1536
    shapes = (
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )
    return {
        name: make(program, chunk).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for name, program in PROGRAMS.items()
    }


def timed(tokens: int, chunk: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, after checking that both say the same."""
    rng, D = np.random.default_rng(0), 512
    arrays = (
        jnp.asarray(rng.standard_normal((V, D)) * D**-0.5, jnp.float32),
        jnp.asarray(rng.standard_normal((1, tokens, D)), jnp.float32),
        jnp.asarray(rng.integers(0, 151_000, (1, tokens))),
    )
    programs = {name: make(program, chunk) for name, program in PROGRAMS.items()}
    results = [program(*arrays) for program in programs.values()]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        gap = float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(one)))
        if gap > 1e-4:
            raise RuntimeError(f"plain and chunked differ by {gap:.1e}")
    del results
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            taken[name].append(time.perf_counter() - start)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description="Chunked log-probabilities against plain ones.")
    parser.add_argument("--tokens", type=int, default=34_816)
    parser.add_argument("--timed-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    print(header("Log-probabilities", "python benchmarks/logprobs.py", ("jax", "jaxlib")))
    memory = temporaries(a.tokens, a.chunk)
    taken = timed(a.timed_tokens, a.chunk, a.rounds)
    ratio = [c / p for p, c in zip(taken["plain"], taken["chunked"], strict=True)]
    rows = [
        [name, f"{memory[name] / 2**30:.2f}", f"{statistics.median(taken[name]):.2f}"]
        for name in PROGRAMS
    ]
    share, times = memory["plain"] / memory["chunked"], statistics.median(ratio)
    rows.append(["ratio", f"1 / {share:.1f}", f"{times:.2f}"])
    memory_title = f"temporaries, GiB: {a.tokens:,} tokens, width 1,536"
    print(table(["", memory_title, f"s: {a.timed_tokens:,} tokens, width 512"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
