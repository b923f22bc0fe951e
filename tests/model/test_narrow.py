"""Float32 weights in a bfloat16 computation: read as before, gradients never rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from aspo_jax.model import build_model, narrow
from aspo_jax.model.decoder import REMAT

LEAST = 2.0**-12  # beside 1, lost in bfloat16 and kept in float32
CONFIG = toy.CONFIG


def _gradient(rows: int, remat: str, mesh=None):
    """Of a loss of a bfloat16 network with float32 weights; rows over the mesh's devices."""
    model = build_model(CONFIG, dtype=jnp.bfloat16, remat=remat, mesh=mesh)
    params = toy.random_params(model)
    if mesh is not None:
        params = jax.device_put(params, model.shardings(mesh))
    token_BT = jnp.arange(rows * 16).reshape(rows, 16) % CONFIG.vocab_size
    position_BT = jnp.broadcast_to(jnp.arange(16), token_BT.shape)

    def loss(params):
        hidden_BTD, _ = model.apply(params, token_BT, position_BT, jnp.ones_like(token_BT))
        return jnp.square(hidden_BTD.astype(jnp.float32)).sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", REMAT)
def test_no_gradient_is_rounded_to_the_type_of_the_computation(remat):
    def check(path, x):
        rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.any(np.asarray(x != rounded)), jax.tree_util.keystr(path)

    gradient = _gradient(4, remat)
    jax.tree_util.tree_map_with_path(check, {**gradient, "head": gradient["norm"]})


def test_nor_is_it_where_four_devices_share_it():
    mesh = toy.toy_mesh(fsdp=4)
    shared, whole = _gradient(4, "full", mesh), _gradient(4, "full")

    def check(path, x, y):
        gap = np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(y).max()
        assert gap < 1e-3, f"{jax.tree_util.keystr(path)}: {gap}"

    jax.tree_util.tree_map_with_path(check, shared, whole)


def test_the_gradients_are_exact_where_bfloat16_would_not_be():
    """Two tokens, of which one adds to the other's what bfloat16 has no room for beside it."""
    x_BD = jnp.array([[1.0], [LEAST]], jnp.bfloat16)
    one, kernel = jnp.ones((2, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.float32)
    _, pull = jax.vjp(lambda kernel: narrow.product(x_BD, kernel, 1), kernel)
    assert pull(one)[0].item() == 1 + LEAST
    _, pull = jax.vjp(lambda bias: narrow.plus(x_BD, bias), jnp.ones(1, jnp.float32))
    assert pull(x_BD)[0].item() == 1 + LEAST
    _, pull = jax.vjp(lambda table: narrow.rows(table, jnp.array([0, 0]), jnp.bfloat16), kernel)
    assert pull(x_BD)[0].item() == 1 + LEAST


def test_weights_of_the_same_type_and_integers_are_read_as_they_are():
    for kind in (jnp.bfloat16, jnp.int8):
        assert not narrow.is_wider(jnp.ones((2, 2), kind), jnp.bfloat16)
    assert narrow.is_wider(jnp.ones((2, 2), jnp.float32), jnp.bfloat16)
    assert not narrow.is_wider(jnp.ones((2, 2), jnp.float32), jnp.float32)
