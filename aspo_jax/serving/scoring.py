"""Log-probabilities of prompts, by the forward pass that the trainer scores with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aspo_jax.head import Head, logits
from aspo_jax.model import Model
from aspo_jax.serving.seam import PromptScore

SHORTEST, STEP = 128, 4  # lengths to which prompts are padded: 128, 512, 2,048, ...


def make_scorer(
    model: Model, head: Head, window: int, listed: int
) -> Callable[[Any, Sequence[int], int], PromptScore]:
    """(params, tokens, top) -> log-probability of every token but the first, at temperature 1.

        log softmax(hidden . weight^T)_y

    over the whole vocabulary. A prompt's own length decides the shape in which it is computed.

    head: of which the chunk is used. listed: most of the likeliest ids that may be asked for.
    """
    head = Head(1.0, np.ones(model.config.vocab_size, bool), head.chunk)

    def score_prompt(params: Any, token_1T: Array, target_T: Array, is_listed: Array) -> Any:
        T = token_1T.shape[1]
        segment_1T = (token_1T >= 0).astype(jnp.int32)
        hidden_1TD, _ = model.apply(
            params, jnp.maximum(token_1T, 0), jnp.arange(T)[None], segment_1T
        )
        weight_VD = model.unembedding(params)

        def of_chunk(xs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            hidden_cD, target_c = xs
            logp_cV = jax.nn.log_softmax(logits(head, weight_VD, hidden_cD))
            own_c = jnp.take_along_axis(logp_cV, target_c[:, None], axis=-1)[:, 0]
            shape = (target_c.shape[0], listed)
            top_ck, id_ck = jax.lax.cond(
                is_listed,
                lambda: jax.lax.top_k(logp_cV, listed),
                lambda: [jnp.zeros(shape), jnp.zeros(shape, jnp.int32)],
            )
            return own_c, id_ck, top_ck

        c = min(SHORTEST, T)
        arrays = (hidden_1TD.reshape(-1, c, hidden_1TD.shape[-1]), target_T.reshape(-1, c))
        return jax.lax.map(of_chunk, arrays)

    jitted = jax.jit(score_prompt)

    def score(params: Any, tokens: Sequence[int], top: int) -> PromptScore:
        own = np.asarray(tokens, np.int32)
        count, T = len(own) - 1, padded(len(own) - 1, window)
        token_1T = np.full((1, T), -1, np.int32)
        target_T = np.zeros(T, np.int32)
        token_1T[0, :count], target_T[:count] = own[:-1], own[1:]
        found = jax.device_get(jitted(params, token_1T, target_T, np.bool_(top > 0)))
        logp_T, id_Tk, top_Tk = (x.reshape(T, *x.shape[2:])[:count] for x in found)
        pairs = zip(id_Tk[:, :top].tolist(), top_Tk[:, :top].tolist(), strict=True)
        return PromptScore(logp_T.tolist(), [list(zip(*pair, strict=True)) for pair in pairs])

    return score


def padded(count: int, window: int) -> int:
    """The length in which so many tokens are computed."""
    T = SHORTEST
    while count > T:
        T *= STEP
    return min(T, -(-window // SHORTEST) * SHORTEST)
