"""What a smaller type costs an exported model, in greedy texts and log-probabilities.

A step at a learning rate of 1e-6 is smaller than the rounding of most weights to bfloat16: the
export can lose what was learned, and only its answers tell. So the held-out prompts are answered
with the trained weights and with the rounded ones, by the run's own sampler.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax.config import Config
from aspo_jax.inputs import held_out_prompts
from aspo_jax.model.sharding import row_shards
from aspo_jax.parts import build_peers, build_sampler
from aspo_jax.policy import Policy
from aspo_jax.rollout import draw
from aspo_jax.sampler import EVALUATE, EVERYTHING, Completion

PROMPTS, TOKENS = 16, 64  # held-out prompts that are answered, and the longest answer


class Cost(NamedTuple):
    """Of one type against float32, over all processes.

    texts, equal: greedy texts, and how many of them are the same.
    mean, largest: difference of the log-probabilities (nats) of the tokens up to where two texts
        part; nan if no two begin alike.
    """

    texts: int
    equal: int
    mean: float
    largest: float

    def line(self, dtype: str) -> str:
        """For a person."""
        gap = f"differ by {self.mean:.2g} nats on average (largest {self.largest:.2g})"
        if math.isnan(self.mean):
            gap = "cannot be compared"
        return (
            f"export in {dtype}: {self.equal} of {self.texts} greedy texts equal, up to where "
            f"they part log-probabilities {gap}; Run.export_dtype = 'float32' keeps the trained "
            "model"
        )


def rounding_cost(config: Config, policy: Policy, params: Any, dtype: str) -> Cost:
    """Answer the first held-out prompts with ``params`` and with what is left of them in ``dtype``.

    Several processes call it together; each answers its share.
    """
    peers = build_peers()
    mesh: Any = policy.head.mesh
    prompts = held_out_prompts(config, policy.tokenizer)[:PROMPTS]
    own = prompts[peers.index :: peers.count]
    sampler = build_sampler(_small(config, mesh), policy, mesh).drawing(0.0, EVERYTHING)
    exact = draw(sampler, params, own, 1, domain=EVALUATE)
    rounded = draw(sampler, round_to(params, dtype), own, 1, domain=EVALUATE)
    pairs = list(zip(exact, rounded, strict=True))
    equal = sum(np.array_equal(a.tokens_T, b.tokens_T) for a, b in pairs)
    gap_n = np.concatenate([np.zeros(0, np.float32), *(_gap(a, b) for a, b in pairs)])
    mine = [len(own), equal, gap_n.size, gap_n.sum(), gap_n.max(initial=0.0)]
    every = peers.gather(np.array(mine, np.float32))
    texts, equal, tokens, total, _ = every.sum(axis=0)
    if not tokens:
        return Cost(int(texts), int(equal), math.nan, math.nan)
    return Cost(int(texts), int(equal), float(total / tokens), float(every[:, -1].max()))


def round_to(params: Any, dtype: str) -> Any:
    """The weights with the precision of ``dtype``, in the type that they have."""
    # XLA may drop a cast there and back again; this operation it may not.
    kind = jnp.finfo(dtype)
    cut = jax.jit(lambda x: jax.lax.reduce_precision(x, kind.nexp, kind.nmant))
    return jax.tree.map(cut, params)


def _small(config: Config, mesh: Any) -> Config:
    """The config with a sampler for a few short answers."""
    shards = row_shards(mesh)
    sampler = dataclasses.replace(
        config.sampler,
        slots=math.ceil(PROMPTS / shards) * shards,
        cache_tokens=None,
        max_response_tokens=min(TOKENS, config.sampler.max_response_tokens),
    )
    return dataclasses.replace(config, sampler=sampler)


def _gap(a: Completion, b: Completion) -> np.ndarray:
    """Differences of log-probabilities (nats) of the tokens that both begin with."""
    shorter = min(len(a.tokens_T), len(b.tokens_T))
    is_equal_T = a.tokens_T[:shorter] == b.tokens_T[:shorter]
    common = int(np.logical_and.accumulate(is_equal_T).sum())
    return np.abs(a.policy_logp_T[:common] - b.policy_logp_T[:common])
