"""Hidden state -> distribution over the vocabulary: one truth for sampler and trainer.

    z = hidden . weight^T / temperature,  z_v = -1e30 for ids that must never be sampled
    log pi(y) = z_y - logsumexp(z),       H = -sum_v pi_v log pi_v

The model's own logits stay those of `transformers`; temperature and vocabulary mask live here only.
The trainer's side works in chunks of tokens with its own gradient, so a [tokens, V] array exists
neither forward nor backward: at most [chunk, V], and on a mesh [chunk, V / tensor] on each device,
of which only statistics of each token cross devices. Only tokens that are read are in the chunks,
as many as there are: prompts and padding cost nothing, and no shape depends on their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from aspo_jax.model.sharding import RULES

FORBIDDEN = -1e30


class Head(NamedTuple):
    """How logits become a distribution.

    temperature: divides the logits, in sampler and trainer alike; a number or a scalar array.
    is_allowed_V: False for ids that can never be sampled (pad and bos unless they end a response,
        rows beyond the tokenizer); they are out of the trainer's softmax too.
    chunk: most tokens per chunk of the vocabulary projection, on each device.
    mesh: rows are split over its data axes and the vocabulary over its tensor axis; None: one
        device.
    """

    temperature: Any
    is_allowed_V: np.ndarray | Array
    chunk: int = 1024
    mesh: Mesh | None = None


def logits(head: Head, weight_VD: Array, hidden_ND: Array) -> Array:
    """Masked logits over temperature, float32 [N, V]; products in the hidden states' type."""
    z_NV = jnp.einsum(
        "nd,vd->nv",
        hidden_ND,
        weight_VD.astype(hidden_ND.dtype),
        preferred_element_type=jnp.float32,
    )
    return jnp.where(head.is_allowed_V, z_NV / head.temperature, FORBIDDEN)


def logp_and_entropy(
    head: Head,
    weight_VD: Array,
    hidden_BTD: Array,
    target_BT: Array,
    is_read_BT: Array | None = None,
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy (nats) at each position, both differentiable.

    Gradients, with p = softmax(z):  d logp / dz = onehot(y) - p,  dH / dz_v = -p_v (log p_v + H).

    Args:
        head: temperature, vocabulary mask, chunk size and mesh.
        weight_VD: vocabulary projection.
        hidden_BTD: final hidden states; B a multiple of the mesh's data x fsdp.
        target_BT: token ids. A forbidden id gets a log-probability near -1e30.
        is_read_BT: False where nobody reads the result, which is 0 then; None: all is read.

    Returns:
        logp_BT, entropy_BT in float32.
    """
    is_read_BT = _all_of(target_BT) if is_read_BT is None else is_read_BT

    @jax.custom_vjp
    def both(weight_VD, hidden_BTD):
        return forward(weight_VD, hidden_BTD)[0]

    def forward(weight_VD, hidden_BTD):
        logp_BT, entropy_BT, lse_BT = _on_mesh(head, _forward, "vbbb", "bbb")(
            weight_VD.astype(hidden_BTD.dtype), hidden_BTD, target_BT, is_read_BT
        )
        return (logp_BT, entropy_BT), (weight_VD, hidden_BTD, entropy_BT, lse_BT)

    def backward(saved, grads):
        weight_VD, hidden_BTD, entropy_BT, lse_BT = saved
        given = hidden_BTD, is_read_BT, target_BT, entropy_BT, lse_BT, *grads
        weight_grad_VD, hidden_grad_BTD = _on_mesh(head, _backward, "vbbbbbbb", "wb")(
            weight_VD.astype(hidden_BTD.dtype), *given
        )
        return weight_grad_VD.astype(weight_VD.dtype), hidden_grad_BTD

    both.defvjp(forward, backward)
    return both(weight_VD, hidden_BTD)


def square_mass(
    head: Head, weight_VD: Array, hidden_BTD: Array, is_read_BT: Array | None = None
) -> Array:
    """``sum_v pi_v^2`` at each position that is read, float32 [B, T]: 1 where one id is certain.

    A pass over the vocabulary of its own, without a gradient.
    """
    weight_VD = weight_VD.astype(hidden_BTD.dtype)
    is_read_BT = _all_of(hidden_BTD[..., 0]) if is_read_BT is None else is_read_BT
    return _on_mesh(head, _squares, "vbb", "b")(weight_VD, hidden_BTD, is_read_BT)[0]


def _all_of(x_BT: Array) -> Array:
    return jnp.ones(x_BT.shape, bool)


class _Shard(NamedTuple):
    """What one device needs to know of the others."""

    head: Head  # of its part of the vocabulary, as everywhere below
    first: Any  # id of its first vocabulary row
    over_vocabulary: Callable[[Any], Any]  # sums over the devices that hold the other parts
    largest: Callable[[Array], Array]  # the maximum over them
    over_rows: Callable[[Array], Array]  # sums [V, D] over the devices that hold other rows
    most: Callable[[Array], Array]  # the maximum over those


def _on_mesh(head: Head, program: Callable, inputs: str, outputs: str) -> Callable:
    """``program(shard, *arrays)`` on every device; arrays are split by vocabulary (v) or rows (b).

    The gradient of the projection (w) is split as the projection itself is, over fsdp too. Not
    left to the compiler, which may gather [chunk, V] logits, or reduce the gradient of the
    projection once per chunk.
    """
    mesh, allowed_V = head.mesh, jnp.asarray(head.is_allowed_V)
    if mesh is None or mesh.size == 1:
        same = _Shard(head, 0, *[lambda x: x] * 4)
        return lambda *arrays: program(same, *arrays)
    vocabulary, rows, width = (RULES[name] for name in ("vocab", "batch", "embed"))
    others = tuple(axis for axis in rows if axis != width)
    specs = {
        "v": PartitionSpec(vocabulary),
        "b": PartitionSpec(rows),
        "w": PartitionSpec(vocabulary, width),
    }

    def over_rows(x_VD: Array) -> Array:
        x_VD = jax.lax.psum_scatter(x_VD, width, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_VD, others)

    def on_device(allowed_v, *arrays):
        shard = _Shard(
            head._replace(is_allowed_V=allowed_v),
            jax.lax.axis_index(vocabulary) * allowed_v.shape[0],
            lambda x: jax.lax.psum(x, vocabulary),
            lambda x: jax.lax.pmax(x, vocabulary),
            over_rows,
            lambda x: jax.lax.pmax(x, rows),
        )
        return program(shard, *arrays)

    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs["v"], *(specs[kind] for kind in inputs)),
        out_specs=tuple(specs[kind] for kind in outputs),
        check_vma=False,
    )
    return lambda *arrays: split(allowed_V, *arrays)


class _Chunks(NamedTuple):
    """The positions that are read, in chunks: the first ``count`` hold all of them.

    place_nc: numbers of positions in [B T], in order; behind the last, numbers of none.
    """

    place_nc: Array
    count: Array

    def take(self, x_BTd: Array, i: Array) -> Array:
        """What chunk i has of an array [B, T, ...]; zeros behind the last."""
        x_Nd = x_BTd.reshape(-1, *x_BTd.shape[2:])
        place = x_Nd.at[self.place_nc[i]]
        return place.get(indices_are_sorted=True, unique_indices=True, mode="fill", fill_value=0)

    def put(self, x_Nd: Array, i: Array, x_cd: Array) -> Array:
        """An array [B T, ...] with the values of chunk i."""
        place = x_Nd.at[self.place_nc[i]]
        return place.set(x_cd, indices_are_sorted=True, unique_indices=True, mode="drop")


def chunk_tokens(largest: int, tokens: int) -> int:
    """Tokens of a chunk where a device has ``tokens`` of them: an eighth, or the largest allowed.

    In fewer and larger chunks the prompts that are left out would save less.
    """
    return min(largest, math.ceil(tokens / 8))


def _chunks(shard: _Shard, is_read_BT: Array) -> _Chunks:
    """As many on every device, since they meet in each."""
    tokens = is_read_BT.size
    c = chunk_tokens(shard.head.chunk, tokens)
    is_read_N = jnp.pad(is_read_BT.reshape(-1), (0, -tokens % c))
    number_N = jnp.arange(len(is_read_N))
    place_N = jnp.sort(jnp.where(is_read_N, number_N, tokens + number_N))
    return _Chunks(place_N.reshape(-1, c), shard.most((is_read_N.sum() + c - 1) // c))


def _forward(shard: _Shard, weight_VD, hidden_BTD, target_BT, is_read_BT):
    """logp, entropy and logsumexp of each position."""
    chunks = _chunks(shard, is_read_BT)

    def body(i, found):
        target_c = chunks.take(target_BT, i)
        z_cV = logits(shard.head, weight_VD, chunks.take(hidden_BTD, i))
        top_c = shard.largest(jnp.max(z_cV, axis=-1))
        below_cV = z_cV - top_c[:, None]
        e_cV = jnp.exp(below_cV)
        is_target_cV = (target_c - shard.first)[:, None] == jnp.arange(z_cV.shape[1])
        mass_c, weighted_c, z_target_c = shard.over_vocabulary(
            (
                jnp.sum(e_cV, axis=-1),
                jnp.sum(e_cV * below_cV, axis=-1),
                jnp.sum(jnp.where(is_target_cV, z_cV, 0.0), axis=-1),
            )
        )
        lse_c = top_c + jnp.log(mass_c)
        made = z_target_c - lse_c, jnp.log(mass_c) - weighted_c / mass_c, lse_c
        return tuple(chunks.put(x_N, i, x_c) for x_N, x_c in zip(found, made, strict=True))

    zeros_N = jnp.zeros(target_BT.size, jnp.float32)
    found = jax.lax.fori_loop(0, chunks.count, body, (zeros_N,) * 3)
    return tuple(x_N.reshape(target_BT.shape) for x_N in found)


def _squares(shard: _Shard, weight_VD, hidden_BTD, is_read_BT):
    """The squared probabilities of each position, summed."""
    chunks = _chunks(shard, is_read_BT)

    def body(i, found_N):
        z_cV = logits(shard.head, weight_VD, chunks.take(hidden_BTD, i))
        e_cV = jnp.exp(z_cV - shard.largest(jnp.max(z_cV, axis=-1))[:, None])
        mass_c, square_c = shard.over_vocabulary((e_cV.sum(-1), jnp.square(e_cV).sum(-1)))
        return chunks.put(found_N, i, square_c / jnp.square(mass_c))

    zeros_N = jnp.zeros(is_read_BT.size, jnp.float32)
    return (jax.lax.fori_loop(0, chunks.count, body, zeros_N).reshape(is_read_BT.shape),)


def _backward(shard: _Shard, weight_VD, hidden_BTD, is_read_BT, *of_tokens):
    """Gradients of the projection, float32 [V, D], and of the hidden states, 0 where unread.

    of_tokens: target, entropy, logsumexp, gradients of logp and entropy, [B, T] each.
    """
    head, dtype, chunks = shard.head, hidden_BTD.dtype, _chunks(shard, is_read_BT)

    def body(i, grads):
        weight_grad_VD, hidden_grad_ND = grads
        hidden_cD = chunks.take(hidden_BTD, i)
        target_c, entropy_c, lse_c, *grads_c = (chunks.take(x_BT, i) for x_BT in of_tokens)
        logp_grad_c, entropy_grad_c = grads_c
        z_cV = logits(head, weight_VD, hidden_cD)
        logp_cV = z_cV - lse_c[:, None]
        p_cV = jnp.exp(logp_cV)
        is_target_cV = (target_c - shard.first)[:, None] == jnp.arange(z_cV.shape[1])
        z_grad_cV = jnp.where(is_target_cV, logp_grad_c[:, None], 0.0) - p_cV * (
            logp_grad_c[:, None] + entropy_grad_c[:, None] * (logp_cV + entropy_c[:, None])
        )
        z_grad_cV = jnp.where(head.is_allowed_V, z_grad_cV / head.temperature, 0.0).astype(dtype)
        hidden_grad_cD = jnp.einsum(
            "cv,vd->cd", z_grad_cV, weight_VD, preferred_element_type=jnp.float32
        )
        weight_grad_VD += jnp.einsum(
            "cv,cd->vd", z_grad_cV, hidden_cD, preferred_element_type=jnp.float32
        )
        hidden_grad_cD = shard.over_vocabulary(hidden_grad_cD).astype(dtype)
        return weight_grad_VD, chunks.put(hidden_grad_ND, i, hidden_grad_cD)

    flat = is_read_BT.size, hidden_BTD.shape[-1]
    zeros = jnp.zeros(weight_VD.shape, jnp.float32), jnp.zeros(flat, dtype)
    weight_grad_VD, hidden_grad_ND = jax.lax.fori_loop(0, chunks.count, body, zeros)
    return shard.over_rows(weight_grad_VD), hidden_grad_ND.reshape(hidden_BTD.shape)
