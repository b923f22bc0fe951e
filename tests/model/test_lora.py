"""Adapters: what they are made of, and what a network with them computes."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import CONFIG, bits, in_int8, random_adapter, random_params, toy_model

from aspo_jax.model import Lora, build_model, merge, parameter_axes, trained_part
from aspo_jax.model.lora import adapter_axes, attach, init_adapter, is_adapted
from aspo_jax.optimizers import is_matrix, muon_dimensions

LORA = Lora(rank=3, alpha=5.0)  # a scale that is no power of two
KEY = jax.random.key(0)
TOKEN_BT = np.random.RandomState(0).randint(0, CONFIG.vocab_size, (2, 9))
POSITION_BT = np.broadcast_to(np.arange(9), (2, 9))
ATTENTION, MLP = {"q", "k", "v", "o"}, {"gate", "up", "down"}


FROZEN = ["float32", "int8"]


def frozen_weights(model, kind: str) -> Any:
    params = random_params(model)
    return in_int8(params, model.config) if kind == "int8" else params


def logits(model, params):
    hidden_BTD, _ = model.apply(params, TOKEN_BT, POSITION_BT, np.ones_like(TOKEN_BT))
    return hidden_BTD @ model.unembedding(params).T.astype(hidden_BTD.dtype)


@pytest.mark.parametrize(
    ("targets", "dtype", "kind"),
    [
        ("attention", "float32", "float32"),
        ("all", "float32", "float32"),
        ("all", "bfloat16", "float32"),
        ("all", "float32", "int8"),
        ("attention", "bfloat16", "int8"),
    ],
)
def test_a_new_adapter_changes_nothing(targets, dtype, kind):
    model, frozen = build_model(CONFIG, dtype=jnp.dtype(dtype)), frozen_weights(toy_model(), kind)
    lora = LORA._replace(targets=targets)
    adapted = attach(init_adapter(CONFIG, lora, KEY), frozen, lora.scale)
    look = jax.jit(functools.partial(logits, model))
    assert is_adapted(adapted) and not is_adapted(frozen)
    if kind == "int8" and dtype == "float32":
        # A CPU rounds the product with a step and the sum after it once, and adapters are a sum.
        np.testing.assert_allclose(look(adapted), look(frozen), rtol=0, atol=1e-5)
    else:
        assert np.array_equal(look(adapted), look(frozen))
    moved = look(attach(random_adapter(lora, CONFIG), frozen, lora.scale))
    assert np.abs(np.asarray(moved - look(frozen), np.float32)).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "targets"), [("float32", "all"), ("int8", "all"), ("int8", "mlp")]
)
def test_merged_and_unmerged_answer_alike(kind, targets):
    model, lora = toy_model(qkv_bias=False, qk_norm=True), LORA._replace(targets=targets)
    frozen, look = frozen_weights(model, kind), jax.jit(functools.partial(logits, model))
    adapted = attach(random_adapter(lora, model.config), frozen, lora.scale)
    merged, unmerged = (jax.nn.log_softmax(look(params)) for params in (merge(adapted), adapted))
    np.testing.assert_allclose(merged, unmerged, atol=1e-5)
    assert jax.tree.structure(merge(adapted)) == jax.tree.structure(random_params(model))


@pytest.mark.parametrize("kind", FROZEN)
def test_gradients_are_those_through_the_merged_matrices(kind):
    model = toy_model()
    frozen = frozen_weights(model, kind)
    adapter = random_adapter(LORA, CONFIG)

    def value(whole, adapter):
        return jnp.sin(logits(model, whole(adapter, frozen, LORA.scale))).sum()

    def formed(adapter, frozen, scale):
        """W + scale a b, by its own formula: heads side by side."""
        layers = dict(merge(frozen)["layers"])
        for name, pair in adapter["layers"].items():
            kernel = layers[name]["kernel"]
            a_YDr = pair["a"].reshape(len(kernel), -1, LORA.rank)
            product = a_YDr @ pair["b"].reshape(len(kernel), LORA.rank, -1)
            whole = kernel + scale * product.reshape(kernel.shape)
            layers[name] = layers[name] | {"kernel": whole}
        return frozen | {"layers": layers}

    got, expected = (
        jax.jit(jax.grad(functools.partial(value, whole)))(adapter) for whole in (attach, formed)
    )
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(x - y).max() < 1e-5 * np.abs(y).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("targets", "names"), [("attention", ATTENTION), ("mlp", MLP), ("all", ATTENTION | MLP)]
)
def test_targets_follow_from_the_axes(targets, names):
    lora = LORA._replace(targets=targets)
    adapter, axes = init_adapter(CONFIG, lora, KEY), adapter_axes(CONFIG, lora)
    layers, kernels = adapter["layers"], parameter_axes(CONFIG)["layers"]
    assert layers.keys() == axes["layers"].keys() == names and adapter.keys() == {"layers"}
    for name, pair in axes["layers"].items():
        kernel = kernels[name]["kernel"]
        joined = tuple(axis for axis in (*pair["a"], *pair["b"][1:]) if axis != "rank")
        assert joined == kernel  # the shards of a matrix and its adapter meet
        assert pair["a"][-1] == pair["b"][1] == "rank"
    assert layers["q"]["b"].shape == (2, 3, 4, 4) if "q" in names else True


def test_first_values():
    wide = CONFIG.__class__(**{**vars(CONFIG), "hidden_size": 64, "intermediate_size": 128})
    lora = Lora(rank=16, alpha=1.0)
    layers = init_adapter(wide, lora, KEY)["layers"]
    for name, reads in (("q", 64), ("o", 16), ("down", 128)):
        a, b = np.asarray(layers[name]["a"]), np.asarray(layers[name]["b"])
        bound = 1 / math.sqrt(reads)
        assert not b.any() and bound * 0.9 < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    # Other targets change no draw, and no two draws are one.
    part = init_adapter(wide, lora._replace(targets="mlp"), KEY)["layers"]
    assert bits(part) == bits({name: layers[name] for name in part})
    assert not np.array_equal(layers["gate"]["a"], layers["up"]["a"])
    assert not np.array_equal(layers["q"]["a"][0], layers["q"]["a"][1])


def test_the_scale():
    assert Lora(16, 32.0).scale == 2.0
    assert Lora(16, 32.0, is_rank_stabilised=True).scale == 8.0


def test_optimizers_take_an_adapter_for_matrices():
    axes = adapter_axes(CONFIG, LORA)["layers"]
    assert all(is_matrix(x) for pair in axes.values() for x in pair.values())
    cases = {("q", "a"): ((1,), (2,)), ("q", "b"): ((1,), (2, 3)), ("o", "a"): ((1, 2), (3,))}
    cases |= {("o", "b"): ((1,), (2,)), ("down", "a"): ((1,), (2,)), ("down", "b"): ((1,), (2,))}
    for (name, part), (reads, writes) in cases.items():
        found: Any = muon_dimensions(axes[name][part])
        assert (found.reduction_axis, found.output_axis) == (reads, writes)


def test_without_adapters_everything_is_trained():
    model = toy_model()
    part, params = trained_part(model, None), random_params(model)
    assert part.whole(params, None) is params and part.axes == model.axes()
    assert part.split(params) == (params, None)


@pytest.mark.parametrize("kind", FROZEN)
def test_what_is_put_together_comes_apart(kind):
    model, adapter = toy_model(), random_adapter(LORA, CONFIG)
    part, frozen = trained_part(model, LORA), frozen_weights(model, kind)
    assert bits(part.split(part.whole(adapter, frozen))) == bits((adapter, frozen))
