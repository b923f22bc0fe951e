"""What a run needs of a chip, by formula: memory part by part, arithmetic, traffic.

Lower bounds, known before anything is compiled; `aspo_jax.plan` sets what the compiler says beside
them. A part names the settings that make it smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aspo_jax.config import Config
from aspo_jax.model import ModelConfig
from aspo_jax.planning.flops import (
    attention_flops,
    causal_pairs,
    forward_flops,
    head_flops,
    layer_weights,
)
from aspo_jax.planning.programs import DECODE, PREFILL, SCORE, UPDATE, Programs


class Part(NamedTuple):
    """Something that lies in a chip's memory: bytes, and what makes it smaller, if anything."""

    name: str
    bytes: float
    remedy: str


class Work(NamedTuple):
    """One call of a program: FLOP and bytes of memory traffic per chip; calls per iteration."""

    flops: float
    traffic: float
    calls: int


class Budget(NamedTuple):
    """One program: what lies in memory anyway, what it adds for sure, and its work.

    arguments: names of the parts that the program is given; the others lie beside it.
    """

    held: Sequence[Part]
    arguments: frozenset[str]
    added: Sequence[Part]
    work: Work

    @property
    def beside(self) -> float:
        """Bytes in memory that the program does not know of."""
        return sum(part.bytes for part in self.held if part.name not in self.arguments)

    @property
    def least(self) -> float:
        """Bytes that are needed whatever the compiler does."""
        return sum(part.bytes for part in (*self.held, *self.added))


class Capacity(NamedTuple):
    """Room for sampled sequences: how many at once on all chips, of how many tokens each."""

    sequences: int
    tokens: int
    bytes_per_sequence: float


def shard_bytes(tree: Any) -> int:
    """Bytes per device of a tree of shapes with shardings."""

    def of(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return sum(map(of, jax.tree.leaves(tree)))


PROCESS, PROCESS_BYTES = "Python, libraries and compiled programs", 0.9 * 2**30  # as measured
WEIGHTS, MOMENTS, REFERENCE = "weights, float32", "moments of AdamW", "reference policy, bfloat16"
ROWS, PUBLISHED, CACHE = "rows of the mini-batches", "weights for sampling", "key-value cache"
MORE_CHIPS = "raise Runtime.fsdp (more chips) or Runtime.tensor"


def held_parts(config: Config, programs: Programs) -> list[Part]:
    """What lies in memory all through an iteration, per chip."""
    params, reference, _ = programs.by_name[SCORE].arguments
    state, minibatch = programs.by_name[UPDATE].arguments
    weights = shard_bytes(params)
    parts = [
        Part(WEIGHTS, weights, MORE_CHIPS),
        Part(MOMENTS, shard_bytes(state.opt_state), MORE_CHIPS),
        Part(
            ROWS,
            programs.batch.minibatches * shard_bytes((minibatch.rows, minibatch.old)),
            "lower Train.prompts_per_step",
        ),
    ]
    if programs.platform == "cpu":  # the memory is the process's own too
        parts.append(Part(PROCESS, PROCESS_BYTES / programs.local.size, ""))
    if programs.has_reference:
        remedy = f"drop the KL penalty (Objective.penalties), or {MORE_CHIPS}"
        parts.append(Part(REFERENCE, shard_bytes(reference), remedy))
    return parts


def budgets(config: Config, shape: ModelConfig, programs: Programs) -> dict[str, Budget]:
    """The budget of every program."""
    held, mesh = held_parts(config, programs), programs.mesh
    weights = shard_bytes(programs.by_name[DECODE].arguments[0])
    sampling = [*held, Part(PUBLISHED, weights, "raise Runtime.tensor")]  # released for the update
    given = {
        UPDATE: {WEIGHTS, MOMENTS},
        SCORE: {WEIGHTS, REFERENCE},
        PREFILL: {PUBLISHED},
        DECODE: {PUBLISHED},
    }
    added = {
        UPDATE: _update_parts(config, shape, programs, mesh),
        SCORE: _head_parts(config, shape, mesh),
        PREFILL: _sampling_parts(config, programs),
        DECODE: _sampling_parts(config, programs),
    }
    work = _work(config, shape, programs, mesh)
    return {
        name: Budget(
            sampling if name in (PREFILL, DECODE) else held,
            frozenset(given[name]),
            added[name],
            work[name],
        )
        for name in programs.by_name
    }


def _rows_per_chip(config: Config, mesh: Any) -> int:
    return config.train.rows_per_microbatch // (mesh.shape["data"] * mesh.shape["fsdp"])


def _kept(config: Config, shape: ModelConfig, mesh: Any) -> float:
    """Bytes per chip that a micro-batch keeps for the backward pass."""
    tokens = _rows_per_chip(config, mesh) * config.train.row_tokens
    features = _kept_per_token(config, shape, mesh.shape["tensor"])
    return shape.layers * tokens * features * jnp.dtype(config.model.dtype).itemsize


def _kept_per_token(config: Config, shape: ModelConfig, tensor: int) -> float:
    """Features of a token that each layer keeps for the backward pass; see `Model.remat`."""
    mixed = shape.heads * shape.head_dim / tensor
    if config.model.remat == "full":
        return shape.hidden_size
    if config.model.remat == "attention":
        return shape.hidden_size + mixed
    keys = 2 * shape.kv_heads * shape.head_dim / tensor
    wide = 2 * shape.intermediate_size / tensor
    return 3 * shape.hidden_size + 2 * mixed + keys + wide


def _update_parts(config: Config, shape: ModelConfig, programs: Programs, mesh: Any) -> list[Part]:
    rows, weights = _rows_per_chip(config, mesh), shard_bytes(programs.by_name[SCORE].arguments[0])
    fewer = "Train.rows_per_microbatch" if rows > 1 else "Train.row_tokens (or raise Runtime.fsdp)"
    remedy = f"lower {fewer}"
    if config.model.remat != "full":
        remedy = f"set Model.remat to 'full', or {remedy}"
    return [
        Part("gradients, float32", weights, MORE_CHIPS),
        Part("kept of each layer for the backward pass", _kept(config, shape, mesh), remedy),
        *_head_parts(config, shape, mesh),
    ]


def _head_parts(config: Config, shape: ModelConfig, mesh: Any) -> list[Part]:
    rows, tensor = _rows_per_chip(config, mesh), mesh.shape["tensor"]
    chunk = min(config.train.head_chunk, rows * config.train.row_tokens)
    return [
        Part(
            "logits of one chunk, float32",
            4.0 * chunk * shape.vocab_size / tensor,
            "lower Train.head_chunk",
        )
    ]


def cache_bytes(programs: Programs, local: Any) -> float:
    """The pages of one sequence of full length, on each chip that shares them."""
    _, cache, rows, *_ = programs.by_name[DECODE].arguments
    parts, _, _, pages = cache.key_EKYXSC.shape[:4]
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return total / (parts * pages) * rows.table_JN.shape[0] / local.shape["tensor"]


def _sampling_parts(config: Config, programs: Programs) -> list[Part]:
    cache = programs.by_name[DECODE].arguments[1]
    remedy = f"lower Sampler.slots, now {config.sampler.slots}, or Sampler.cache_tokens"
    return [Part(CACHE, shard_bytes(cache), remedy)]


# --- arithmetic and traffic -------------------------------------------------------------------


def _recomputed_flops(config: Config, shape: ModelConfig, tokens: float, pairs: float) -> float:
    """FLOP of what the backward pass computes again: by `Model.remat`, and the logits always."""
    layers = {
        "full": 2.0 * layer_weights(shape) * tokens + attention_flops(shape, pairs),
        "attention": 2.0 * layer_weights(shape) * tokens,
        "dots": 0.0,
    }
    return layers[config.model.remat] + head_flops(shape, tokens)


def _work(config: Config, shape: ModelConfig, programs: Programs, mesh: Any) -> dict[str, Work]:
    """The worst case: every row full with one sequence, every slot at its last position."""
    return {
        **_training_work(config, shape, programs, mesh),
        **_sampling_work(config, shape, programs),
    }


def _training_work(
    config: Config, shape: ModelConfig, programs: Programs, mesh: Any
) -> dict[str, Work]:
    batch, t, s = programs.batch, config.train, config.sampler
    # Several hosts leave room for more rows than there are sequences to fill them.
    per_row = t.row_tokens // (s.max_prompt_tokens + s.max_response_tokens - 1)
    rows = math.ceil(t.prompts_per_minibatch * t.samples_per_prompt / per_row)
    microbatches = math.ceil(rows / batch.rows)
    tokens, pairs = rows * batch.row_tokens, rows * causal_pairs(batch.row_tokens)
    forward, chips = forward_flops(shape, tokens, pairs), mesh.size
    again = _recomputed_flops(config, shape, tokens, pairs)
    policies = 2 if programs.has_reference else 1
    matrices = layer_weights(shape) + shape.vocab_size * shape.hidden_size
    size = jnp.dtype(config.model.dtype).itemsize
    one_pass = size * matrices / mesh.shape["tensor"] * microbatches
    state = 3 * shard_bytes(programs.by_name[SCORE].arguments[0])
    kept = microbatches * _kept(config, shape, mesh)
    # Weights are read forward, again, and twice backward; the rest is written and read.
    traffic = 4 * one_pass + 2 * kept + 2 * state
    updates = t.epochs * batch.minibatches
    return {
        UPDATE: Work((3 * forward + again) / chips, traffic, updates),
        SCORE: Work(policies * forward / chips, policies * one_pass, batch.minibatches),
    }


def _sampling_work(config: Config, shape: ModelConfig, programs: Programs) -> dict[str, Work]:
    t, s, chips = config.train, config.sampler, programs.mesh.size
    prompt, longest = s.max_prompt_tokens - 1, s.max_prompt_tokens + s.max_response_tokens
    waves = math.ceil(t.prompts_per_step * t.samples_per_prompt / s.slots)
    weights = shard_bytes(programs.by_name[DECODE].arguments[0])
    # Prompts are read once each, and by every host some of them at once.
    together = programs.by_name[PREFILL].arguments[2].shape[0] * chips // programs.local.size
    per_sequence = cache_bytes(programs, programs.local)
    per_chip = s.slots * programs.local.shape["tensor"] / chips

    def layers(tokens: float, pairs: float) -> float:
        return 2.0 * layer_weights(shape) * tokens + attention_flops(shape, pairs)

    read = together * layers(prompt, causal_pairs(prompt)) / chips
    step = s.slots * (layers(1, longest) + head_flops(shape, 1)) / chips
    filled = per_sequence * prompt / longest * together * per_chip / s.slots
    return {
        PREFILL: Work(read, weights + filled, math.ceil(t.prompts_per_step / together)),
        DECODE: Work(step, weights + per_sequence * per_chip, waves * s.max_response_tokens),
    }
