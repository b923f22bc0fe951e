"""What a run needs of a chip, by formula: memory part by part, arithmetic, traffic.

Lower bounds, known before anything is compiled; `aspo_jax.plan` sets what the compiler says beside
them. A part names the settings that make it smaller.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aspo_jax.build import build_shape
from aspo_jax.head import chunk_tokens
from aspo_jax.model import ModelConfig
from aspo_jax.model.decoder import REMAT
from aspo_jax.model.sharding import is_on_host, row_shards
from aspo_jax.planning.flops import (
    attention_flops,
    causal_pairs,
    forward_flops,
    head_flops,
    layer_weights,
)
from aspo_jax.planning.programs import DECODE, PREFILL, SCORE, UPDATE, Programs
from aspo_jax.planning.topology import Chip


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

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds of one call: "compute", or "memory" for weights, activations, cache."""
        return {"compute": self.flops / chip.flops, "memory": self.traffic / chip.bandwidth}


class Budget(NamedTuple):
    """One program: what lies in memory anyway, what it adds for sure, and its work.

    arguments: names of the parts that the program is given; the others lie beside it.
    remedy: what makes its other temporaries smaller.
    """

    held: Sequence[Part]
    arguments: Collection[str]
    added: Sequence[Part]
    work: Work
    remedy: str

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
    """Bytes per device of a tree of shapes with shardings; NumPy arrays have none."""

    def of(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def offloaded_bytes(of: Programs) -> int:
    """Bytes per chip of the training state that lie in the host's memory, where that is another."""
    moved = list(filter(is_on_host, jax.tree.leaves(of.state)))
    return 0 if of.platform == "cpu" else shard_bytes(moved)


PROCESS, PROCESS_BYTES = "Python, libraries and compiled programs", 0.9 * 2**30  # as measured
WEIGHTS, OPTIMIZER, REFERENCE = "weights, float32", "optimizer state", "reference policy, bfloat16"
FETCHED = "optimizer state, beyond what the backward pass keeps"
TEACHER, ADAPTER, FROZEN = "teacher", "adapter, float32", "frozen weights"
ROWS, PUBLISHED, CACHE = "rows of the mini-batches", "weights for sampling", "key-value cache"
MORE_CHIPS = "raise Runtime.fsdp (more chips) or Runtime.tensor"


def held_parts(of: Programs) -> list[Part]:
    """What lies in memory all through an iteration, per chip."""
    rows = of.batch.minibatches * shard_bytes((of.minibatch.rows, of.minibatch.old))
    parts = [
        *_weights(of),
        Part(OPTIMIZER, shard_bytes(of.state.opt_state) - offloaded_bytes(of), _smaller_state(of)),
        Part(ROWS, rows, "lower Train.prompts_per_step"),
    ]
    if of.platform == "cpu":  # the memory is the process's own too
        parts.append(Part(PROCESS, PROCESS_BYTES / of.local.size, ""))
    if of.has_reference and of.frozen is None:
        remedy = f"drop the KL penalty (Objective.penalties), or {MORE_CHIPS}"
        parts.append(Part(REFERENCE, shard_bytes(of.reference), remedy))
    if of.teacher is not None:
        remedy = f"take a smaller teacher (Teacher.path), or {MORE_CHIPS}"
        parts.append(Part(TEACHER, shard_bytes(of.teacher), remedy))
    return parts


def _weights(of: Programs) -> list[Part]:
    trained = shard_bytes(of.state.params)
    if of.frozen is None:
        return [Part(WEIGHTS, trained, _smaller(of))]
    return [
        Part(ADAPTER, trained, _smaller(of)),
        Part(FROZEN, shard_bytes(of.frozen), f"set Lora.weights to 'int8', or {MORE_CHIPS}"),
    ]


def _less_published(of: Programs) -> str:
    """What makes the weights for sampling smaller."""
    unmerged = of.frozen is not None and of.config.lora.is_merged
    return f"{'set Lora.is_merged to False, or ' if unmerged else ''}raise Runtime.tensor"


def _smaller(of: Programs) -> str:
    """What makes the training state smaller."""
    less = "train adapters alone (Lora.rank)" if of.frozen is None else "lower Lora.rank"
    return f"{less}, or {MORE_CHIPS}"


def _smaller_state(of: Programs) -> str:
    """What makes the optimizer's state on the chips smaller."""
    is_all = of.platform == "cpu" or offloaded_bytes(of)
    return f"{'' if is_all else 'set Optim.offload to True, or '}{_smaller(of)}"


def budgets(of: Programs) -> dict[str, Budget]:
    """The budget of every program.

    The work is that of the worst case: every row full with one sequence, every slot at its last
    position.
    """
    held, rows = held_parts(of), "Train.rows_per_microbatch or Train.head_chunk"
    # The sampler's weights are released for the update.
    copied = 0 if of.shares_weights else shard_bytes(of.weights)
    published = {ADAPTER, FROZEN} if of.shares_weights else {PUBLISHED}
    sampling = [*held, Part(PUBLISHED, copied, _less_published(of))]
    slots = of.config.sampler.slots
    fewer = f"lower Sampler.slots, now {slots}, or Sampler.cache_tokens"
    cache = [Part(CACHE, shard_bytes(of.cache), fewer)]
    work = {**_training_work(of), **_sampling_work(of)}
    programs = {
        UPDATE: (
            {WEIGHTS, ADAPTER, FROZEN, OPTIMIZER},
            _update_parts(of),
            f"Train.row_tokens, {rows}",
        ),
        SCORE: (
            {WEIGHTS, ADAPTER, FROZEN, REFERENCE, TEACHER},
            [_logits(of, of.teacher_shape)],
            rows,
        ),
        PREFILL: (published, cache, "Sampler.slots or Sampler.max_prompt_tokens"),
        DECODE: (published, cache, "Sampler.slots"),
    }
    return {
        name: Budget(
            sampling if given is published else held, given, added, work[name], f"lower {remedy}"
        )
        for name, (given, added, remedy) in programs.items()
        if name in of.by_name
    }


def _rows_per_chip(of: Programs) -> int:
    return of.batch.rows // row_shards(of.mesh)


def chip_tokens(of: Programs) -> int:
    """Tokens of a micro-batch on each chip, empty slots included."""
    return _rows_per_chip(of) * of.batch.row_tokens


def _kept(of: Programs) -> float:
    """Bytes per chip that a micro-batch keeps for the backward pass."""
    shape, remat, tensor = of.shape, REMAT[of.config.model.remat], of.mesh.shape["tensor"]
    mixed = shape.heads * shape.head_dim / tensor
    keys = 2 * shape.kv_heads * shape.head_dim / tensor
    wide = 2 * shape.intermediate_size / tensor
    products = 2 * shape.hidden_size + mixed + keys + wide
    # of a token, in each layer
    features = shape.hidden_size + remat.keeps_attention * mixed + remat.keeps_products * products
    features += remat.keeps_products * _adapted_features(of) / tensor
    return shape.layers * chip_tokens(of) * features * jnp.dtype(of.config.model.dtype).itemsize


def _pairs(of: Programs) -> list[dict[str, Any]]:
    """The adapters of all matrices; none where all weights are trained."""
    return [] if of.frozen is None else list(of.state.params["layers"].values())


def _adapted_features(of: Programs) -> int:
    """What a layer's adapters make of a token: both products of each."""
    return sum(math.prod(pair["b"].shape[1:]) // pair["b"].shape[1] for pair in _pairs(of))


def _adapter_weights(of: Programs) -> int:
    return sum(math.prod(x.shape) for pair in _pairs(of) for x in pair.values())


def _update_parts(of: Programs) -> list[Part]:
    fewer = (
        "rows_per_microbatch" if _rows_per_chip(of) > 1 else "row_tokens (or raise Runtime.fsdp)"
    )
    remedy = f"lower Train.{fewer}"
    if REMAT[of.config.model.remat].keeps_attention:
        remedy = f"set Model.remat to 'full', or {remedy}"
    backward = [Part("kept of each layer for the backward pass", _kept(of), remedy), _logits(of)]
    # When they are free, all that was in the host's memory is here at once.
    more = max(0.0, offloaded_bytes(of) - sum(part.bytes for part in backward))
    return [
        Part("gradients, float32", shard_bytes(of.state.params), _smaller(of)),
        *backward,
        Part(FETCHED, more, _smaller(of)),
    ]


def _logits(of: Programs, other: ModelConfig | None = None) -> Part:
    """Of the network or another one, whichever has the larger vocabulary."""
    chunk = chunk_tokens(of.config.train.head_chunk, chip_tokens(of))
    vocabulary = max(each.vocab_size for each in (of.shape, other) if each)
    size = 4.0 * chunk * vocabulary / of.mesh.shape["tensor"]
    return Part("logits of one chunk, float32", size, "lower Train.head_chunk")


def cache_bytes(of: Programs) -> float:
    """The pages of one sequence of full length, on each chip that shares them."""
    pages = of.cache.key_EKYXSC.shape[3]  # of each part of the devices
    return shard_bytes(of.cache) / pages * of.limits.row_pages


# --- arithmetic and traffic -------------------------------------------------------------------


def _training_work(of: Programs) -> dict[str, Work]:
    shape, chips, remat = of.shape, of.mesh.size, REMAT[of.config.model.remat]
    # Several hosts leave room for more rows than there are sequences to fill them.
    microbatches = build_shape(of.config, of.batch.sequences, 1).microbatches
    rows, length = microbatches * of.batch.rows, of.batch.row_tokens
    tokens, pairs = rows * length, rows * causal_pairs(length)
    adapters = 2.0 * _adapter_weights(of) * tokens
    frozen = forward_flops(shape, tokens, 0) if of.frozen else 0.0
    forward = forward_flops(shape, tokens, pairs) + adapters
    # What the backward pass computes again: by `Model.remat`, and the logits always.
    products = 0.0 if remat.keeps_products else 2.0 * layer_weights(shape) * tokens
    attention = 0.0 if remat.keeps_attention else attention_flops(shape, pairs)
    again = products + attention + head_flops(shape, tokens)
    read_once = one_pass(of, shape) * microbatches
    scored = [shape] * ((of.config.train.old_logp == "score") + of.has_reference)
    scored += [of.teacher_shape] if of.teacher_shape else []
    flops = adapters + sum(forward_flops(each, tokens, pairs) for each in scored)
    read = sum(one_pass(of, each) for each in scored) * microbatches
    state = shard_bytes((of.state.params, of.state.opt_state))
    # Weights are read forward, again, and twice backward; the rest is written and read.
    traffic = 4 * read_once + 2 * microbatches * _kept(of) + 2 * state
    updates = of.config.train.epochs * of.batch.minibatches
    return {
        # Frozen matrices have no gradient: a third of their three passes is left out.
        UPDATE: Work((3 * forward - frozen + again) / chips, traffic, updates),
        SCORE: Work(flops / chips, read, of.batch.minibatches),
    }


def one_pass(of: Programs, shape: ModelConfig) -> float:
    """Bytes per chip of a network's matrices as they are multiplied, read once."""
    size = jnp.dtype(of.config.model.dtype).itemsize
    is_int8 = shape == of.shape and of.config.frozen_dtype == "int8"
    layers = layer_weights(shape) * (1 if is_int8 else size)
    return (layers + size * shape.vocab_size * shape.hidden_size) / of.mesh.shape["tensor"]


def _sampling_work(of: Programs) -> dict[str, Work]:
    shape, t, s, chips = of.shape, of.config.train, of.config.sampler, of.mesh.size
    prompt, longest = s.max_prompt_tokens - 1, s.max_prompt_tokens + s.max_response_tokens
    waves = math.ceil(t.prompts_per_step * t.samples_per_prompt / s.slots)
    weights, per_sequence = shard_bytes(of.weights), cache_bytes(of)
    # Prompts are read once each, and by every host some of them at once.
    together = of.limits.together(of.limits.buckets[-1], row_shards(of.local))
    together *= chips // of.local.size
    share = of.local.shape["tensor"] / chips  # of a sequence that a chip holds

    def layers(tokens: float, pairs: float) -> float:
        return 2.0 * layer_weights(shape) * tokens + attention_flops(shape, pairs)

    read = together * layers(prompt, causal_pairs(prompt)) / chips
    step = s.slots * (layers(1, longest) + head_flops(shape, 1)) / chips
    filled = per_sequence * prompt / longest * together * share
    held = per_sequence * s.slots * share
    return {
        PREFILL: Work(read, weights + filled, math.ceil(t.prompts_per_step / together)),
        DECODE: Work(step, weights + held, waves * s.max_response_tokens),
    }
