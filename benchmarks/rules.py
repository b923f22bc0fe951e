"""What every objective costs: its loss, its gradient and all its metrics, per token.

    python benchmarks/rules.py [--rows 16] [--tokens 1024] [--rounds 7] [--update-us 24]

Packed rows with eight answers each and every field of `Tokens` given, float32, jitted; rounds are
interleaved. Where a rule must know its whole mini-batch, `prepare` is in the time, but not the
forward pass that comes before it (docs/own_objective.md says what that costs). ``--update-us``:
what an update takes per token, for the column of shares; 24 microseconds is the embedded default's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from losses import draw, packed, padded, race, timer
from machine import header, table

from aspo_jax.losses import OBJECTIVES, Tokens, policy_loss, sequence_mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
drawn = importlib.import_module("atlas").rules  # with settings where a rule has no defaults


def with_every_field(tokens: Tokens) -> Tokens:
    """Other policies near the old one, eight answers of two prompts a row."""
    rng = np.random.default_rng(1)
    shape, old_BT = tokens.logp_BT.shape, tokens.old_logp_BT
    names = ("sampler_logp_BT", "ref_logp_BT", "teacher_logp_BT")
    number_BT = np.asarray(tokens.sequence_id_BT) - 1
    row_B1 = np.arange(shape[0])[:, None]
    position_T = jnp.arange(shape[1], dtype=jnp.int32) % (shape[1] // 8)
    made: dict[str, Any] = {
        name: jnp.minimum(old_BT + rng.normal(0, 0.05, shape).astype(np.float32), 0)
        for name in names
    }
    return dataclasses.replace(
        tokens,
        **made,
        old_entropy_BT=tokens.entropy_BT,
        old_square_BT=jnp.exp(2 * old_BT),
        position_BT=jnp.broadcast_to(position_T, shape),
        group_id_BT=jnp.asarray(row_B1 * 2 + number_BT // 4, jnp.int32),
    )


def main() -> None:
    """Race all rules and print their cost."""
    parser = argparse.ArgumentParser(description="Cost of every objective per token.")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--update-us", type=float, default=24.0)
    a = parser.parse_args()
    tokens = with_every_field(packed(padded(draw(a.rows, a.tokens))))

    def contender(objective: Any) -> Any:
        def loss(logp_BT, tokens):
            own = dataclasses.replace(tokens, logp_BT=logp_BT)
            return policy_loss(objective, own, aggregate=sequence_mean)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return timer(lambda: step(tokens.logp_BT, tokens))

    known = drawn()
    objectives = {name: known[name].objective for name in OBJECTIVES}
    taken = race({n: contender(o) for n, o in objectives.items()}, a.rounds, 5)
    slots = a.rows * a.tokens
    body = []
    for name, seconds in sorted(taken.items(), key=lambda item: statistics.median(item[1])):
        ns = 1e9 * statistics.median(seconds) / slots
        is_coupled = "yes" if objectives[name].prepare else ""
        body.append([f"`{name}`", f"{ns:.0f}", f"{ns / a.update_us / 10:.2f} %", is_coupled])
    print(header("Every rule", "python benchmarks/rules.py", ("jax", "jaxlib")))
    print(table(["rule", "ns/token", "of an update", "asks its mini-batch"], body))


if __name__ == "__main__":
    main()
