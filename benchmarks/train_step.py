"""Tokens/s of one optimizer update: ours, tunix and TRL, on one network and the same sequences.

    python benchmarks/train_step.py [--rounds 5] [--tunix-python PATH] [--trl-python PATH]

The network: Qwen2, 8 layers, width 512, 26.8 M parameters, vocabulary 8,192; float32, two threads.
The objective: GRPO (clip 0.2, sequence mean, no KL), AdamW behind a clip of the global norm.

- padded: 8 sequences of 512 tokens, no padding in them.
- ragged: 32 sequences, prompts of 64 tokens, response lengths log-normal with a mean of a quarter
  of the 448 at most. Useful tokens only are counted. Ours packs them into rows, tunix too
  (`tunix_worker.py`), TRL cannot and pads (`trl_step_worker.py`).

Every contender updates the same weights towards the same old log-probabilities with the same
advantages; loss and gradient norm of the first update are compared before anything is timed.
Rounds are interleaved and the order rotates; reported are medians, and medians of the ratios within
a round. The bound: 6 N FLOP a token (N: weights of all matrix products, the tied output layer
included) at the rate of the model's own products in jax, each timed alone, in every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from machine import header, table
from rivals import Rival

from aspo_jax.head import Head
from aspo_jax.learner import Goal, build_learner
from aspo_jax.losses import grpo, sequence_mean
from aspo_jax.model import ModelConfig, build_model, choose_attention, save_model
from aspo_jax.optimizers import adamw, clipped, learning_rate_schedule
from aspo_jax.rows import BatchShape, Example, answered, fill
from aspo_jax.runtime import make_mesh
from aspo_jax.structs import Mean, Minibatch

SEED, PROMPT, ROW = 0, 64, 512
ROWS, TRL_ROWS = 1, 4  # of a micro-batch
PAD, EOS = 0, 1
CLIP = 0.2
OPTIMIZER = {
    "learning_rate": 1e-6,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
SHAPE = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    layers=8,
    heads=8,
    kv_heads=2,
    head_dim=64,
)


class Sequences(NamedTuple):
    """N prompts of one length and their responses, padded behind."""

    prompt_NP: np.ndarray
    response_NR: np.ndarray
    is_response_NR: np.ndarray
    advantage_N: np.ndarray

    @property
    def tokens(self) -> int:
        return self.prompt_NP.size + int(self.is_response_NR.sum())

    def examples(self) -> list[Example]:
        lengths = self.is_response_NR.sum(axis=1)
        return [
            answered(prompt.tolist(), response[:length], 0.0, float(advantage), n)
            for n, (prompt, response, length, advantage) in enumerate(
                zip(self.prompt_NP, self.response_NR, lengths, self.advantage_N, strict=True)
            )
        ]


def draw(count: int, is_ragged: bool) -> Sequences:
    """Random tokens; log-normal lengths, evenly spaced quantiles: mean R / 4, log spread 0.8."""
    rng, R = np.random.default_rng(SEED), ROW - PROMPT
    length_N = np.full(count, R)
    if is_ragged:
        quantile = rng.permutation((np.arange(count) + 0.5) / count)
        normal = np.array([statistics.NormalDist().inv_cdf(q) for q in quantile])
        length_N = np.exp(np.log(R / 4) - 0.8**2 / 2 + 0.8 * normal).clip(8, R).astype(int)
    is_response_NR = np.arange(R) < length_N[:, None]
    response_NR = rng.integers(EOS + 1, SHAPE.vocab_size, (count, R))
    return Sequences(
        rng.integers(EOS + 1, SHAPE.vocab_size, (count, PROMPT)).astype(np.int32),
        np.where(is_response_NR, response_NR, PAD).astype(np.int32),
        is_response_NR,
        rng.normal(0, 1, count).astype(np.float32),
    )


LAYOUTS = {"padded": (8, False), "ragged": (32, True)}


# --- ours -------------------------------------------------------------------------------------


class Ours:
    """The update of `aspo_jax.learner` on packed rows; ``old_logp`` of each sequence for rivals."""

    def __init__(self, params: Any, old_params: Any, sequences: Sequences):
        mesh = make_mesh()
        attention = choose_attention(
            "cpu", head_dim=64, row_tokens=ROW, packed=True, dtype=jnp.float32, mesh=mesh
        )
        model = build_model(SHAPE, attention=attention, mesh=mesh)
        o = OPTIMIZER
        rate, (b1, b2) = learning_rate_schedule(o["learning_rate"], 0), o["betas"]
        optimizer = clipped(
            adamw(rate, model.axes(), b1=b1, b2=b2, eps=o["eps"], weight_decay=o["weight_decay"]),
            o["clip_norm"],
        )
        head = Head(1.0, np.ones(SHAPE.vocab_size, bool), mesh=mesh)
        goal = Goal(grpo(clip_low=CLIP, clip_high=CLIP), sequence_mean)
        self.learner = build_learner(model, head, goal, optimizer, mesh)
        examples = sequences.examples()
        shape = BatchShape(1, -(-len(examples) // ROWS), ROWS, ROW)
        host = fill(examples, shape)
        self.rows = int(host.count) * ROWS
        part = self.learner.place(host)
        old = self.learner.old_policy(old_params, None, part)
        self.part = dataclasses.replace(part, old=old)
        self.state = self.learner.init(jax.tree.map(jnp.copy, params))
        self.first = self._update()

    def _update(self) -> dict[str, float]:
        self.state, report = self.learner.step(self.state, self.part)
        jax.block_until_ready(self.state)
        loss, norm = (cast(Mean, report[name]) for name in ("surrogate", "grad_norm"))
        return {
            "loss": (loss.total / loss.count).item(),
            "grad_norm": (norm.total / norm.count).item(),
        }

    def seconds(self) -> float:
        start = time.perf_counter()
        self._update()
        return time.perf_counter() - start


def old_logp(part: Minibatch, sequences: Sequences) -> np.ndarray:
    """Old log-probability of every response token, [N, R], found by the group number."""
    assert part.old
    out_NR = np.zeros(sequences.response_NR.shape, np.float32)
    rows = part.rows
    where = np.asarray(rows.is_response_BT)
    group, position = (np.asarray(x)[where] for x in (rows.group_id_BT, rows.response_position_BT))
    out_NR[group, position] = np.asarray(part.old.old_logp_BT)[where]
    return out_NR


# --- the machine --------------------------------------------------------------------------------


def products() -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the network's matrix products."""
    c = SHAPE
    D, F, V, Y = c.hidden_size, c.intermediate_size, c.vocab_size, c.layers
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return [(D, q, Y), (D, kv, 2 * Y), (q, D, Y), (D, F, 2 * Y), (F, D, Y), (D, V, 1)]


class Bound:
    """Tokens/s if an update were nothing but its matrix products, forward and backward."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        rng = np.random.default_rng(SEED)

        def array(*shape: int):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        self.arguments = [
            (array(tokens, m), array(m, n), array(tokens, n), count) for m, n, count in products()
        ]
        forward = jax.jit(lambda x, w, g: x @ w)
        of_inputs = jax.jit(lambda x, w, g: g @ w.T)
        of_weights = jax.jit(lambda x, w, g: x.T @ g)
        self.programs: list[Callable] = [forward, of_inputs, of_weights]
        self.seconds()

    def seconds(self) -> float:
        total = 0.0
        for *arrays, count in self.arguments:
            for program in self.programs:
                start = time.perf_counter()
                program(*arrays).block_until_ready()
                total += count * (time.perf_counter() - start)
        return total

    def flops(self) -> float:
        return 6.0 * self.tokens * sum(m * n * count for m, n, count in products())


# --- the race -----------------------------------------------------------------------------------


def write_task(folder: Path, params: Any, arrays: dict[str, tuple[Sequences, np.ndarray]]) -> None:
    save_model(folder, params, SHAPE, lambda _: None, eos_token_id=EOS)
    for name, (s, old_NR) in arrays.items():
        np.savez(
            folder / f"{name}.npz",
            prompt=s.prompt_NP,
            response=s.response_NR,
            is_response=s.is_response_NR,
            advantage=s.advantage_N,
            old_logp=old_NR,
        )
    task = {
        "layouts": {"padded": {"tunix_budget": None}, "ragged": {"tunix_budget": ROW}},
        "optimizer": OPTIMIZER,
        "clip": CLIP,
        "rows": TRL_ROWS,
        "pad": PAD,
        "eos": EOS,
    }
    (folder / "task.json").write_text(json.dumps(task))


def compare(name: str, ours: dict[str, float], theirs: dict[str, Any], who: str) -> str:
    """One line; raises where equal work gave another gradient."""
    gap = max(abs(theirs[key] - ours[key]) / abs(ours[key]) for key in ours)
    if gap > 1e-3 and (who, name) != ("tunix", "ragged"):
        raise RuntimeError(f"{name}: ours {ours}, {who} {theirs}; nothing to compare")
    # tunix averages its packed rows as if each held one sequence: the same work, another gradient.
    loss, norm = (f"{ours[key]:.5g} and {theirs[key]:.5g}" for key in ("loss", "grad_norm"))
    return f"{name}, ours and {who}: loss {loss}, gradient norm {norm}"


def race(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    names, taken = list(contenders), {name: [] for name in contenders}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(contenders[name]())
    return taken


def result(layout: str, tokens: int, taken: dict[str, list[float]], bound: list[float]) -> str:
    """A table: tokens/s, ratio of ours to each, and share of the bound (seconds per token)."""
    rows = []
    for who, seconds in taken.items():
        speed = tokens / statistics.median(seconds)
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], seconds, strict=True))
        share = statistics.median(b * tokens / s for b, s in zip(bound, seconds, strict=True))
        rows.append([who, f"{speed:,.0f}", f"{ratio:.2f}", f"{share:.0%}"])
    head = [f"{layout}: {tokens:,} useful tokens an update", "tokens/s", "ours is faster, x"]
    return table([*head, "share of the bound"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of one update beside tunix and TRL.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tunix-python", default=sys.executable, help="with google-tunix")
    parser.add_argument("--trl-python", default=sys.executable, help="with trl and torch")
    a = parser.parse_args()
    print(header("Train step", "python benchmarks/train_step.py", ("jax", "jaxlib")))
    model = build_model(SHAPE)
    params = jax.jit(model.init)(jax.random.key(SEED))
    noise = jax.jit(model.init)(jax.random.key(SEED + 1))
    before = jax.tree.map(lambda x, n: x + 0.02 * n, params, noise)
    sequences = {name: draw(*how) for name, how in LAYOUTS.items()}
    ours = {name: Ours(params, before, s) for name, s in sequences.items()}
    arrays = {name: (s, old_logp(ours[name].part, s)) for name, s in sequences.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "task"
        write_task(folder, params, arrays)
        rivals = {
            "tunix": Rival("tunix_worker.py", folder, a.tunix_python),
            "TRL": Rival("trl_step_worker.py", folder, a.trl_python),
        }
        for who, rival in rivals.items():
            print(f"- {who}: {rival.missing or rival.versions}")
        present = {who: rival for who, rival in rivals.items() if rival.versions}
        for name, s in sequences.items():
            for who, rival in present.items():
                print(f"- {compare(name, ours[name].first, rival.ask(name, 1), who)}", flush=True)
            bound = Bound(2 * ROW)
            contenders: dict[str, Callable[[], float]] = {"ours": ours[name].seconds}
            contenders |= {
                who: lambda rival=rival, name=name: rival.ask(name, 1)["seconds"][0]
                for who, rival in present.items()
            }
            taken = race({"bound": bound.seconds, **contenders}, a.rounds)
            per_token = [x / bound.tokens for x in taken.pop("bound")]
            rate = bound.flops() / bound.tokens / statistics.median(per_token)
            print(
                f"\n{name}: bound {1 / statistics.median(per_token):,.0f} tokens/s at "
                f"{rate / 1e9:.0f} GFLOP/s; ours in {ours[name].rows} rows of {ROW}\n"
            )
            print(result(name, s.tokens, taken, per_token), flush=True)
        for rival in rivals.values():
            rival.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
