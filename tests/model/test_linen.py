"""The network as a Flax module: the same parameters, the same logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from toy import CONFIG, random_params

from aspo_jax.model import build_model
from aspo_jax.model.linen import Decoder

TOKEN_BT = jnp.array([[3, 5, 8, 2], [7, 1, 4, 6]])


def test_its_parameters_are_the_functions_own_and_so_are_its_logits():
    model = build_model(CONFIG)
    variables: Any = jax.jit(Decoder(model).init)(jax.random.key(0), TOKEN_BT)
    own = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, own)

    params = random_params(model)
    position_BT, one_BT = np.tile(np.arange(4), (2, 1)), np.ones((2, 4), np.int32)
    hidden_BTD, _ = model.apply(params, TOKEN_BT, position_BT, one_BT)
    expected_BTV = hidden_BTD @ model.unembedding(params).T
    np.testing.assert_array_equal(Decoder(model).apply({"params": params}, TOKEN_BT), expected_BTV)


def test_flax_code_trains_it():
    module: Any = Decoder(build_model(CONFIG))
    params = module.init(jax.random.key(0), TOKEN_BT)["params"]

    def loss(params):
        logits_BTV = module.apply({"params": params}, TOKEN_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, TOKEN_BT[:, 1:]).mean()

    step = jax.jit(jax.value_and_grad(loss))
    before, gradient = step(params)
    assert step(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))[0] < before
