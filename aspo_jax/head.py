"""Hidden state -> distribution over the vocabulary: one truth for sampler and trainer.

    z = hidden . weight^T / temperature,  z_v = -1e30 for ids that must never be sampled
    log pi(y) = z_y - logsumexp(z),       H = -sum_v pi_v log pi_v

The model's own logits stay those of `transformers`; temperature and vocabulary mask live here only.
The trainer's side works in chunks of tokens with its own gradient, so a [tokens, V] array exists
neither forward nor backward: at most [chunk, V].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

FORBIDDEN = -1e30


class Head(NamedTuple):
    """How logits become a distribution.

    temperature: divides the logits, in sampler and trainer alike.
    is_allowed_V: False for ids that can never be sampled (pad, bos, rows beyond the tokenizer);
        they are out of the trainer's softmax too.
    chunk: tokens per chunk of the vocabulary projection.
    """

    temperature: float
    is_allowed_V: np.ndarray
    chunk: int = 1024


def logits(head: Head, weight_VD: Array, hidden_ND: Array) -> Array:
    """Masked logits over temperature, float32 [N, V]."""
    # float32 operands, not only float32 accumulation: the sampler's log-probs must equal the
    # trainer's, whatever the activations' type.
    z_NV = hidden_ND.astype(jnp.float32) @ weight_VD.astype(jnp.float32).T
    return jnp.where(head.is_allowed_V, z_NV / head.temperature, FORBIDDEN)


def logp_and_entropy(
    head: Head, weight_VD: Array, hidden_BTD: Array, target_BT: Array
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy (nats) at each position, both differentiable.

    Gradients, with p = softmax(z):  d logp / dz = onehot(y) - p,  dH / dz_v = -p_v (log p_v + H).

    Args:
        head: temperature, vocabulary mask and chunk size.
        weight_VD: vocabulary projection.
        hidden_BTD: final hidden states.
        target_BT: token ids. A forbidden id gets a log-probability near -1e30.

    Returns:
        logp_BT, entropy_BT in float32.
    """
    size, D = target_BT.size, hidden_BTD.shape[-1]
    chunk = min(head.chunk, size)
    padding = -size % chunk
    hidden_JcD = jnp.pad(hidden_BTD.reshape(size, D), ((0, padding), (0, 0))).reshape(-1, chunk, D)
    target_Jc = jnp.pad(target_BT.reshape(size), (0, padding)).reshape(-1, chunk)
    of_chunks = _chunked(head.temperature, head.is_allowed_V)
    outputs = of_chunks(weight_VD, hidden_JcD, target_Jc)
    logp_BT, entropy_BT = (x_Jc.reshape(-1)[:size].reshape(target_BT.shape) for x_Jc in outputs)
    return logp_BT, entropy_BT


def _chunked(temperature: float, is_allowed_V: np.ndarray):
    """(weight_VD, hidden_JcD, target_Jc) -> (logp_Jc, entropy_Jc), one chunk alive at a time."""
    head = Head(temperature, is_allowed_V)

    def log_softmax(weight_VD, hidden_cD):
        z_cV = logits(head, weight_VD, hidden_cD)
        return z_cV - jax.nn.logsumexp(z_cV, axis=-1, keepdims=True)

    @jax.custom_vjp
    def of_chunks(weight_VD, hidden_JcD, target_Jc):
        def body(_, xs):
            hidden_cD, target_c = xs
            logp_cV = log_softmax(weight_VD, hidden_cD)
            logp_c = jnp.take_along_axis(logp_cV, target_c[:, None], axis=-1)[:, 0]
            return None, (logp_c, -jnp.sum(jnp.exp(logp_cV) * logp_cV, axis=-1))

        return jax.lax.scan(body, None, (hidden_JcD, target_Jc))[1]

    def forward(weight_VD, hidden_JcD, target_Jc):
        outputs = of_chunks(weight_VD, hidden_JcD, target_Jc)
        return outputs, (weight_VD, hidden_JcD, target_Jc, outputs[1])

    def backward(saved, grads):
        weight_VD, hidden_JcD, target_Jc, entropy_Jc = saved

        def body(weight_grad_VD, xs):
            hidden_cD, target_c, entropy_c, logp_grad_c, entropy_grad_c = xs
            logp_cV = log_softmax(weight_VD, hidden_cD)
            p_cV = jnp.exp(logp_cV)
            is_target_cV = target_c[:, None] == jnp.arange(weight_VD.shape[0])
            z_grad_cV = logp_grad_c[:, None] * (is_target_cV - p_cV)
            z_grad_cV -= entropy_grad_c[:, None] * p_cV * (logp_cV + entropy_c[:, None])
            z_grad_cV = jnp.where(is_allowed_V, z_grad_cV, 0.0) / temperature
            hidden_grad_cD = z_grad_cV @ weight_VD.astype(jnp.float32)
            weight_grad_VD += z_grad_cV.T @ hidden_cD.astype(jnp.float32)
            return weight_grad_VD, hidden_grad_cD.astype(hidden_cD.dtype)

        weight_grad_VD, hidden_grad_JcD = jax.lax.scan(
            body,
            jnp.zeros(weight_VD.shape, jnp.float32),
            (hidden_JcD, target_Jc, entropy_Jc, *grads),
        )
        return weight_grad_VD.astype(weight_VD.dtype), hidden_grad_JcD, None

    of_chunks.defvjp(forward, backward)
    return of_chunks
