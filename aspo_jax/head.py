"""Hidden state -> distribution over the vocabulary: one truth for sampler and trainer.

    z = hidden . weight^T / temperature,  z_v = -1e30 for ids that must never be sampled
    log pi(y) = z_y - logsumexp(z),       H = -sum_v pi_v log pi_v

The model's own logits stay those of `transformers`; temperature and vocabulary mask live here only.
The trainer's side works in chunks of tokens with its own gradient, so a [tokens, V] array exists
neither forward nor backward: at most [chunk, V], and on a mesh [chunk, V / tensor] on each device,
of which only statistics of each token cross devices.
"""

from __future__ import annotations

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
    chunk: tokens per chunk of the vocabulary projection, on each device.
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
    head: Head, weight_VD: Array, hidden_BTD: Array, target_BT: Array
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy (nats) at each position, both differentiable.

    Gradients, with p = softmax(z):  d logp / dz = onehot(y) - p,  dH / dz_v = -p_v (log p_v + H).

    Args:
        head: temperature, vocabulary mask, chunk size and mesh.
        weight_VD: vocabulary projection.
        hidden_BTD: final hidden states; B a multiple of the mesh's data x fsdp.
        target_BT: token ids. A forbidden id gets a log-probability near -1e30.

    Returns:
        logp_BT, entropy_BT in float32.
    """

    @jax.custom_vjp
    def both(weight_VD, hidden_BTD):
        return forward(weight_VD, hidden_BTD)[0]

    def forward(weight_VD, hidden_BTD):
        logp_BT, entropy_BT, lse_BT = _on_mesh(head, _forward, "vbb", "bbb")(
            weight_VD.astype(hidden_BTD.dtype), hidden_BTD, target_BT
        )
        return (logp_BT, entropy_BT), (weight_VD, hidden_BTD, entropy_BT, lse_BT)

    def backward(saved, grads):
        weight_VD, hidden_BTD, entropy_BT, lse_BT = saved
        weight_grad_VD, hidden_grad_BTD = _on_mesh(head, _backward, "vbbbbbb", "wb")(
            weight_VD.astype(hidden_BTD.dtype), hidden_BTD, target_BT, entropy_BT, lse_BT, *grads
        )
        return weight_grad_VD.astype(weight_VD.dtype), hidden_grad_BTD

    both.defvjp(forward, backward)
    return both(weight_VD, hidden_BTD)


def square_mass(head: Head, weight_VD: Array, hidden_BTD: Array) -> Array:
    """``sum_v pi_v^2`` at each position, float32 [B, T]: 1 where one id is certain.

    A pass over the vocabulary of its own, without a gradient.
    """
    weight_VD = weight_VD.astype(hidden_BTD.dtype)
    return _on_mesh(head, _squares, "vb", "b")(weight_VD, hidden_BTD)[0]


class _Shard(NamedTuple):
    """What one device needs to know of the others."""

    head: Head  # of its part of the vocabulary, as everywhere below
    first: Any  # id of its first vocabulary row
    over_vocabulary: Callable[[Any], Any]  # sums over the devices that hold the other parts
    largest: Callable[[Array], Array]  # the maximum over them
    over_rows: Callable[[Array], Array]  # sums [V, D] over the devices that hold other rows


def _on_mesh(head: Head, program: Callable, inputs: str, outputs: str) -> Callable:
    """``program(shard, *arrays)`` on every device; arrays are split by vocabulary (v) or rows (b).

    The gradient of the projection (w) is split as the projection itself is, over fsdp too. Not
    left to the compiler, which may gather [chunk, V] logits, or reduce the gradient of the
    projection once per chunk.
    """
    mesh, allowed_V = head.mesh, jnp.asarray(head.is_allowed_V)
    if mesh is None or mesh.size == 1:
        same = _Shard(head, 0, *[lambda x: x] * 3)
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


def _chunks(head: Head, x_BTd: Array) -> Array:
    """[B, T, ...] -> [n, c, ...]: n chunks of c tokens, zeros behind the end."""
    tokens = x_BTd.shape[0] * x_BTd.shape[1]
    c = min(head.chunk, tokens)
    x_Nd = x_BTd.reshape(tokens, *x_BTd.shape[2:])
    x_Nd = jnp.pad(x_Nd, ((0, -tokens % c), *[(0, 0)] * (x_Nd.ndim - 1)))
    return x_Nd.reshape(-1, c, *x_BTd.shape[2:])


def _rows(x_ncd: Array, like_BT: Array) -> Array:
    """The inverse of `_chunks`."""
    x_Nd = x_ncd.reshape(-1, *x_ncd.shape[2:])[: like_BT.size]
    return x_Nd.reshape(*like_BT.shape, *x_ncd.shape[2:])


def _forward(shard: _Shard, weight_VD, hidden_BTD, target_BT):
    """logp, entropy and logsumexp of each position."""

    def body(_, xs):
        hidden_cD, target_c = xs
        z_cV = logits(shard.head, weight_VD, hidden_cD)
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
        return None, (z_target_c - lse_c, jnp.log(mass_c) - weighted_c / mass_c, lse_c)

    chunks = (_chunks(shard.head, hidden_BTD), _chunks(shard.head, target_BT))
    return tuple(_rows(x_nc, target_BT) for x_nc in jax.lax.scan(body, None, chunks)[1])


def _squares(shard: _Shard, weight_VD, hidden_BTD):
    """The squared probabilities of each position, summed."""

    def body(_, hidden_cD):
        z_cV = logits(shard.head, weight_VD, hidden_cD)
        e_cV = jnp.exp(z_cV - shard.largest(jnp.max(z_cV, axis=-1))[:, None])
        mass_c, square_c = shard.over_vocabulary((e_cV.sum(-1), jnp.square(e_cV).sum(-1)))
        return None, square_c / jnp.square(mass_c)

    chunks = _chunks(shard.head, hidden_BTD)
    return (_rows(jax.lax.scan(body, None, chunks)[1], hidden_BTD[..., 0]),)


def _backward(
    shard: _Shard,
    weight_VD,
    hidden_BTD,
    target_BT,
    entropy_BT,
    lse_BT,
    logp_grad_BT,
    entropy_grad_BT,
):
    """Gradients of the projection, float32 [V, D], and of the hidden states."""
    head, dtype = shard.head, hidden_BTD.dtype

    def body(weight_grad_VD, xs):
        hidden_cD, target_c, entropy_c, lse_c, logp_grad_c, entropy_grad_c = xs
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
        return weight_grad_VD, shard.over_vocabulary(hidden_grad_cD).astype(dtype)

    arrays = (hidden_BTD, target_BT, entropy_BT, lse_BT, logp_grad_BT, entropy_grad_BT)
    weight_grad_VD, hidden_grad_ncD = jax.lax.scan(
        body, jnp.zeros(weight_VD.shape, jnp.float32), tuple(_chunks(head, x) for x in arrays)
    )
    return shard.over_rows(weight_grad_VD), _rows(hidden_grad_ncD, target_BT)
