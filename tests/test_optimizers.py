"""Optimizers and rates: their equations, and what of the parameters each of them moves."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from aspo_jax.config.schema import arguments, meanings
from aspo_jax.model import build_model
from aspo_jax.optimizers import (
    OPTIMIZERS,
    adamw,
    clipped,
    learning_rate_schedule,
    muon,
    muon_dimensions,
    sgd,
    warmup_by_iteration,
)

RATE = optax.constant_schedule(0.1)
MODEL = toy.toy_model(tie_embeddings=False)
MATRICES = ("kernel", "embed", "head")


def first_change(optimizer: optax.GradientTransformation, grads: Any, params: Any) -> Any:
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_schedules():
    def rates(*args):
        return [np.asarray(learning_rate_schedule(*args)(i)).item() for i in range(6)]

    np.testing.assert_allclose(rates(0.3, 3), [0.1, 0.2, 0.3, 0.3, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(rates(0.3, 0), 0.3, rtol=1e-6)
    np.testing.assert_allclose(rates(0.4, 2, 4), [0.2, 0.3, 0.2, 0.1, 0, 0], rtol=1e-6)
    warmed = warmup_by_iteration(learning_rate_schedule(0.4, 0), 2, updates_per_iteration=3)
    got = [np.asarray(warmed(i)).item() for i in range(9)]  # three iterations of three updates
    np.testing.assert_allclose(got, [0, 0, 0, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)


def test_clipped_adamw():
    optimizer = clipped(adamw(RATE, ("norm",), b1=0.0, b2=0.0, eps=1.0), 2.0)
    # the gradient (8, 0, 0, 6) has norm 10 and is clipped to (1.6, 0, 0, 1.2); g / (|g| + 1)
    change = first_change(optimizer, jnp.array([8.0, 0, 0, 6.0]), jnp.zeros(4))
    expected = [-0.1 * 1.6 / 2.6, 0, 0, -0.1 * 1.2 / 2.2]
    np.testing.assert_allclose(np.asarray(change), expected, rtol=1e-5)


@pytest.mark.parametrize("family", [{"tie_embeddings": False}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_what_decays(family, decay):
    model = toy.toy_model(**family)
    params = toy.random_params(model)
    optimizer = adamw(RATE, model.axes(), weight_decay=0.5, decay=decay)
    change = first_change(optimizer, jax.tree.map(np.zeros_like, params), params)
    for path, x in jax.tree_util.tree_leaves_with_path(change):
        expected = decay == "all" or path[-1].key in MATRICES
        assert bool(np.abs(x).max() > 0) == expected, path


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    optimizer = sgd(RATE, (), momentum=0.5, nesterov=nesterov)
    state, steps = optimizer.init(jnp.zeros(())), []
    for gradient in (1.0, 2.0):
        change, state = optimizer.update(jnp.asarray(gradient), state)
        steps.append(np.asarray(change).item())
    expected = [-0.15, -0.325] if nesterov else [-0.1, -0.25]  # averages are 1 and 2.5
    np.testing.assert_allclose(steps, expected, rtol=1e-6)
    assert not jax.tree.leaves(sgd(lambda step: 0.1, ()).init(jnp.zeros(3)))[1:]  # a count alone


def test_muon_takes_each_layers_matrices_as_they_are_multiplied():
    def kinds(model):
        leaves = jax.tree_util.tree_leaves_with_path(model.axes(), lambda x: isinstance(x, tuple))
        return {
            "/".join(str(getattr(key, "key", "")) for key in path): muon_dimensions(axes)
            for path, axes in leaves
        }

    stacked, apart = kinds(MODEL), kinds(build_model(MODEL.config, is_stacked=False))
    for name in ("q", "k", "v"):
        assert stacked[f"layers/{name}/kernel"] == ((1,), (2, 3))
        assert apart[f"layers//{name}/kernel"] == ((0,), (1, 2))
    assert stacked["layers/o/kernel"] == ((1, 2), (3,))
    for name in ("gate", "up", "down"):
        assert stacked[f"layers/{name}/kernel"] == ((1,), (2,))
    rest = {name for name, found in stacked.items() if found is None}
    assert rest == {name for name in stacked if not name.endswith("kernel")}
    assert {"embed", "head", "norm", "layers/q/bias", "layers/mlp_norm/scale"} <= rest


def test_an_update_of_muon_is_the_nearest_orthogonal_matrix_and_as_large_as_adams():
    params, grads = toy.random_params(MODEL), toy.random_params(MODEL, seed=1)
    change = first_change(muon(RATE, MODEL.axes()), grads, params)
    inputs = {"q": 16, "o": 16, "gate": 16, "down": 24}
    for name, width in inputs.items():
        gradients = grads["layers"][name]["kernel"].reshape(2, width, -1)
        steps = np.asarray(change["layers"][name]["kernel"]).reshape(2, width, -1)
        for gradient, step in zip(gradients, steps, strict=True):
            scale = 0.1 * 0.2 * max(step.shape) ** 0.5
            sizes = np.linalg.svd(step / scale, compute_uv=False)
            assert sizes.min() > 0.6 and sizes.max() < 1.3, (name, sizes)
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            along = -np.sum(step * (left @ right)) / np.linalg.norm(step)
            assert along > 0.97 * min(step.shape) ** 0.5, name
            assert np.sqrt(np.mean(step**2)) == pytest.approx(0.1 * 0.2, rel=0.3)
    ahead = 1 + 0.9 / 1.9  # of Nesterov's first step; Adam's own is the rate for every element
    for leaf, gradient in ((change["head"], grads["head"]), (change["norm"], grads["norm"])):
        np.testing.assert_allclose(leaf, -0.1 * ahead * np.sign(gradient), rtol=1e-3)


def test_weight_decay_of_muon_is_the_matrices_alone():
    params = toy.random_params(MODEL)
    optimizer = muon(RATE, MODEL.axes(), weight_decay=0.5)
    change = first_change(optimizer, jax.tree.map(np.zeros_like, params), params)
    for path, x in jax.tree_util.tree_leaves_with_path(change):
        assert bool(np.abs(x).max() > 0) == (path[-1].key == "kernel"), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_argument_is_explained_and_has_a_default(name):
    factory = OPTIMIZERS[name]
    plain = arguments(factory)
    assert set(plain) == set(inspect.signature(factory).parameters) - {"learning_rate", "axes"}
    assert set(plain) <= set(meanings(factory))
    assert all(p.default is not p.empty for p in plain.values())


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("adamw", "b1", 1.0),
        ("adamw", "b2", -0.1),
        ("adamw", "eps", 0.0),
        ("adamw", "weight_decay", -1.0),
        ("adamw", "decay", "none"),
        ("muon", "momentum", 1.0),
        ("muon", "rms", 0.0),
        ("muon", "b2", float("nan")),
        ("muon", "weight_decay", -1.0),
        ("sgd", "momentum", 1.0),
        ("sgd", "nesterov", True),
    ],
)
def test_a_number_out_of_range_is_named(name, field, value):
    with pytest.raises(ValueError, match=rf"{name}\.{field} = '?{value}"):
        OPTIMIZERS[name](RATE, MODEL.axes(), **{field: value})
