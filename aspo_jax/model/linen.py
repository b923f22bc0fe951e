"""The network as a Flax Linen module, for code that speaks Flax; the trainer calls its functions.

module = Decoder(build_model(config))
logits_BTV = module.apply({"params": load_params(folder, config)}, token_BT)
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.model.decoder import Model


class Decoder(nn.Module):
    """A language model of any family that is read, whose params are those of `Model.init`.

    model: the functions, from `build_model`.
    """

    model: Model

    @nn.compact
    def __call__(
        self, token_BT: Array, position_BT: Array | None = None, segment_BT: Array | None = None
    ) -> Array:
        """Logits [B, T, V]. None: each row is one sequence that begins at position 0."""
        model, shape = self.model, token_BT.shape
        names = jax.eval_shape(model.init, jax.random.key(0))
        params = {n: self.param(n, lambda key, n=n: model.init(key)[n]) for n in names}
        if position_BT is None:
            position_BT = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        segment_BT = jnp.ones(shape, jnp.int32) if segment_BT is None else segment_BT
        hidden_BTD, _ = model.apply(params, token_BT, position_BT, segment_BT)
        return hidden_BTD @ model.unembedding(params).T.astype(hidden_BTD.dtype)
