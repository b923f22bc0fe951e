"""Cost of an objective and its aggregation: loss and gradient with respect to log pi, per token.

    python benchmarks/losses.py [--rows 64] [--tokens 1024] [--rounds 30] [--repeats 10]

Contenders, on the same float32 arrays made from one seed:

- ours: `policy_loss` of this library, jitted, once with all its metrics and once the loss alone;
- plain: PPO-clip with a masked token mean written straight in jnp, jitted; no metrics;
- TRL: `GRPOTrainer._compute_loss` in eager torch, as TRL runs it, with its metrics, in a second
  process (`trl_worker.py`). Left out with a note where it is absent: `pip install trl torch`.

A token is a slot of the [rows, tokens] array, padding included. Rounds are interleaved: in each
round every contender runs ``repeats`` times and its median counts; the order rotates. Reported are
the median and the fastest round, the median of the per-round ratios to the plain loss, and the
ratio of the fastest rounds (the one to trust where the machine is shared). Compilation comes first
and is not counted. Before timing, gradients of equal objectives are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import header, table
from rivals import Rival

from aspo_jax.losses import (
    Aggregate,
    Objective,
    Tokens,
    archer2,
    aspo,
    dapo,
    grpo,
    policy_loss,
    ppo_clip,
    sequence_mean,
    token_mean,
)

SEED = 0
PLAIN = "plain jnp PPO-clip, token mean"
TRL = {"TRL GRPO loss, `grpo`": "grpo", "TRL GRPO loss, `dapo`": "dapo"}
OURS: dict[str, tuple[Objective, Aggregate, str]] = {
    "`ppo_clip`, `token_mean`": (ppo_clip(), token_mean, "padded"),
    "`grpo`, `sequence_mean`": (grpo(), sequence_mean, "padded"),
    "`dapo`, `token_mean`": (dapo(), token_mean, "padded"),
    "`aspo`, `sequence_mean`": (aspo(), sequence_mean, "padded"),
    "`aspo`, `sequence_mean`, packed rows": (aspo(), sequence_mean, "packed"),
    "`archer2`, `sequence_mean`": (archer2(), sequence_mean, "padded"),
    "`archer2`, `sequence_mean`, packed rows": (archer2(), sequence_mean, "packed"),
}
Seconds = Callable[[int], float]  # repeats -> median seconds of one call


# --- inputs -----------------------------------------------------------------------------------


def draw(rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities some updates apart, one answer per row, a quarter to all of it long."""
    rng = np.random.default_rng(SEED)
    shape = (rows, tokens)
    old_logp = -rng.exponential(0.6, shape)
    length = rng.integers(tokens // 4, tokens, rows, endpoint=True)
    arrays = {
        "logp": np.minimum(old_logp + rng.normal(0, 0.15, shape), 0),
        "old_logp": old_logp,
        "entropy": rng.gamma(1.0, 0.6, shape),
        "advantage": np.broadcast_to(rng.normal(0, 1, (rows, 1)), shape),
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {
        "is_response": np.arange(tokens) < length[:, None]
    }


def padded(arrays: dict[str, np.ndarray]) -> Tokens:
    return Tokens(**{f"{name}_BT": jnp.asarray(x) for name, x in arrays.items()})


def packed(tokens: Tokens) -> Tokens:
    """The same arrays with eight answers a row, each advantage constant over its answer."""
    rows, length = tokens.logp_BT.shape
    number_T = np.arange(length) * 8 // length
    advantage = np.random.default_rng(SEED).normal(0, 1, (rows, 8))[:, number_T]
    return dataclasses.replace(
        tokens,
        sequence_id_BT=jnp.broadcast_to(jnp.asarray(number_T + 1, jnp.int32), (rows, length)),
        advantage_BT=jnp.asarray(advantage, jnp.float32),
        is_response_BT=jnp.ones((rows, length), bool),
    )


# --- contenders -------------------------------------------------------------------------------


def plain_loss(logp_BT, tokens: Tokens):
    """PPO-clip as one would write it by hand."""
    ratio_BT = jnp.exp(logp_BT - tokens.old_logp_BT)
    clipped_BT = jnp.clip(ratio_BT, 0.8, 1.2)
    gain_BT = jnp.minimum(ratio_BT * tokens.advantage_BT, clipped_BT * tokens.advantage_BT)
    mask_BT = tokens.is_response_BT
    return -jnp.sum(jnp.where(mask_BT, gain_BT, 0)) / jnp.sum(mask_BT)


def our_loss(objective: Objective, aggregate: Aggregate, with_metrics: bool):
    """``(logp, tokens) -> (loss, metrics)``; without metrics the compiler drops their cost."""

    def loss(logp_BT, tokens: Tokens):
        tokens = dataclasses.replace(tokens, logp_BT=logp_BT)
        value, metrics = policy_loss(objective, tokens, aggregate=aggregate)
        return value, metrics if with_metrics else {}

    return loss


def timer(call: Callable[[], Any]) -> Seconds:
    """Compile by calling once, then time single calls."""
    jax.block_until_ready(call())

    def seconds(repeats: int) -> float:
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return seconds


def our_contenders(tokens: dict[str, Tokens]) -> dict[tuple[str, bool], Seconds]:
    """(name, with metrics) -> timer, the plain loss among them."""
    step = jax.jit(jax.value_and_grad(plain_loss))
    contenders = {(PLAIN, False): timer(lambda: step(tokens["padded"].logp_BT, tokens["padded"]))}
    for name, (objective, aggregate, layout) in OURS.items():
        for with_metrics in (True, False):
            loss = our_loss(objective, aggregate, with_metrics)
            jitted = jax.jit(jax.value_and_grad(loss, has_aux=True))

            def call(jitted=jitted, data=tokens[layout]):
                return jitted(data.logp_BT, data)

            contenders[name, with_metrics] = timer(call)
    return contenders


@contextlib.contextmanager
def rival(arrays: dict[str, np.ndarray]) -> Iterator[Rival]:
    """TRL in a second process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "inputs.npz")
        np.savez(path, allow_pickle=False, **arrays)
        opponent = Rival("trl_worker.py", path)
        try:
            yield opponent
        finally:
            opponent.close()


# --- agreement and rounds ---------------------------------------------------------------------


def agreement(tokens: Tokens, opponent: Rival) -> list[str]:
    """Largest gradient difference between equal objectives, relative to the largest gradient."""

    def ours(objective: Objective, aggregate: Aggregate) -> np.ndarray:
        loss = our_loss(objective, aggregate, with_metrics=False)
        return np.asarray(jax.grad(loss, has_aux=True)(tokens.logp_BT, tokens)[0])

    pairs = {
        "plain = `ppo_clip`, `token_mean`": (
            ours(ppo_clip(), token_mean),
            np.asarray(jax.grad(plain_loss)(tokens.logp_BT, tokens)),
        )
    }
    if opponent.versions:
        for loss_type, mine in (
            ("grpo", ours(grpo(), sequence_mean)),
            ("dapo", ours(dapo(), token_mean)),
        ):
            theirs = np.load(opponent.ask(loss_type, 0)["gradient"])
            pairs[f"TRL `{loss_type}` = ours of that name"] = (mine, theirs)
    lines = []
    for name, (mine, theirs) in pairs.items():
        gap = np.abs(mine - theirs).max() / np.abs(mine).max()
        if not gap < 1e-4:
            raise RuntimeError(f"{name}: gradients differ by {gap:.1e}; nothing to compare")
        lines.append(f"{name}: {gap:.0e}")
    return lines


def race(contenders: dict[Any, Seconds], rounds: int, repeats: int) -> dict[Any, list[float]]:
    """Seconds per contender and round; the order rotates from round to round."""
    names = list(contenders)
    taken: dict[Any, list[float]] = {name: [] for name in names}
    for seconds in contenders.values():
        seconds(repeats)
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(contenders[name](repeats))
    return taken


def result_table(taken: dict[tuple[str, bool], list[float]], slots: int) -> str:
    """One row per contender: ns per token, median and fastest round, and the ratio to plain."""

    def row(key: tuple[str, bool]) -> list[str]:
        mine, base = taken[key], taken[PLAIN, False]
        ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        median, fastest = (1e9 * x / slots for x in (statistics.median(mine), min(mine)))
        cells = [f"{median:.2f}", f"{fastest:.2f}", f"{ratio:.2f}", f"{min(mine) / min(base):.2f}"]
        return [key[0], "all" if key[1] else "none", *cells]

    head = ["objective, aggregation", "metrics", "ns/token, median", "ns/token, fastest round"]
    head += ["x plain, median", "x plain, fastest rounds"]
    return table(head, [row(key) for key in sorted(taken, key=lambda key: key[1])])


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of the losses per token.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    a = parser.parse_args()
    packages = ("jax", "jaxlib", "numpy", "torch", "trl")
    print(header("Losses", "python benchmarks/losses.py", packages))
    arrays = draw(a.rows, a.tokens)
    one = padded(arrays)
    contenders = our_contenders({"padded": one, "packed": packed(one)})
    with rival(arrays) as opponent:
        if opponent.missing:
            print(f"TRL is left out ({opponent.missing}); for it: pip install trl torch\n")
        else:
            contenders |= {
                (name, True): lambda repeats, kind=kind: opponent.ask(kind, repeats)["seconds"]
                for name, kind in TRL.items()
            }
        equal = "; ".join(agreement(one, opponent))
        taken = race(contenders, a.rounds, a.repeats)
    fill = arrays["is_response"].mean()
    print(
        f"{a.rows} rows x {a.tokens} tokens, float32, {fill:.0%} response tokens (packed: 100 %, "
        f"8 answers a row); {a.rounds} rounds x {a.repeats} calls. Equal objectives, largest "
        f"difference of a gradient relative to the largest gradient: {equal}.\n"
    )
    print(result_table(taken, a.rows * a.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
