"""Frozen weights in int8: how they are rounded, read and multiplied with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import CONFIG, bits, in_int8, random_params, toy_mesh, toy_model

from aspo_jax.model import ModelFolderError, map_axes, merge, partition_spec, save_model, shardings
from aspo_jax.model import quantised as quantised_module
from aspo_jax.model.decoder import project
from aspo_jax.model.quantised import int8_axes, int8_shapes, load_int8, quantise

WIDE = {"hidden_size": 64, "heads": 8, "kv_heads": 4, "head_dim": 8, "tie_embeddings": False}


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    """Outputs of very different sizes."""
    rng = np.random.RandomState(seed)
    size = 10.0 ** rng.uniform(-3, 3, shape[-1])
    return (size * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("shape", "reads"), [((40, 24), 1), ((32, 4, 8), 1), ((4, 8, 24), 2)])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(shape, reads, stored):
    w = matrix(*shape).astype(stored)
    found = quantise(w, reads)
    integers, step = found["kernel"], found["step"]
    assert integers.dtype == np.int8 and step.dtype == np.float32 and step.shape == shape[reads:]
    error = np.abs(integers.astype(np.float64) * step - w.astype(np.float64))
    assert (error <= (0.5 + 1e-5) * step).all() and error.max() > 0
    read = tuple(range(reads))
    assert (np.abs(integers.astype(int)).max(read) == 127).all()  # the whole range is used
    assert bits(quantise(-w, reads)["kernel"]) == bits(-integers)


def test_outputs_of_zeros_and_of_tiny_weights():
    w = np.zeros((4, 3), np.float32)
    w[1, 1], w[2, 2] = 1e-45, -3.0
    found = quantise(w, 1)
    back = found["kernel"] * found["step"]
    assert back[:, 0].tolist() == [0] * 4 and back[2, 2] == -3 and np.isfinite(found["step"]).all()
    assert np.abs(back[:, 1]).max() <= 1e-38


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_is_multiplied_as_its_integers_say(dtype):
    found = quantise(matrix(32, 4, 8), 1)
    x: Any = np.random.RandomState(1).standard_normal((2, 5, 32)).astype(jnp.dtype(dtype))
    got = np.asarray(project(x, found), np.float64)
    exact = np.tensordot(x.astype(np.float64), found["kernel"].astype(np.float64), 1)
    expected = exact * found["step"]
    # Two roundings of the product; the integers themselves are exact in both types.
    limit = {"float32": 2e-6, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(got, expected, rtol=2 * limit, atol=limit * np.abs(expected).max())
    np.testing.assert_array_equal(
        found["kernel"].astype(jnp.dtype(dtype)).astype(np.int8), found["kernel"]
    )


def write(folder: Path, model, seed: int = 0):
    params = random_params(model, seed)
    save_model(
        folder,
        params,
        model.config,
        lambda partial: (partial / "tokenizer.json").write_text("{}"),
        eos_token_id=2,
    )
    return params


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 2, 2)], ids=str)
def test_a_folder_is_read_in_int8_the_same_on_every_mesh(tmp_path, sizes):
    model, mesh = toy_model(tie_embeddings=False), toy_mesh(*sizes)
    params = write(tmp_path / "model", model)
    found = load_int8(tmp_path / "model", model.config, mesh)
    assert bits(found) == bits(in_int8(params, model.config))
    shapes = int8_shapes(model.config, mesh)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    places = shardings(mesh, map_axes(partition_spec, int8_axes(model.config)))
    assert places["layers"]["q"]["kernel"] == model.shardings(mesh)["layers"]["q"]["kernel"]


def test_a_matrix_is_never_on_the_devices_as_it_was(tmp_path, monkeypatch):
    """Nor is a file read twice: what is there while loading is the result and less than a layer."""
    model = toy_model(layers=6, **WIDE)
    write(tmp_path / "model", model)
    read, held, blocks = quantised_module.read_block, [], []

    def spied(*asked):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        blocks.append(read(*asked))
        return blocks[-1]

    before = sum(x.nbytes for x in jax.live_arrays())
    monkeypatch.setattr(quantised_module, "read_block", spied)
    found = load_int8(tmp_path / "model", model.config, toy_mesh(1, 2, 2))
    size = sum(x.nbytes for x in jax.tree.leaves(found))
    kernels = {n: x["kernel"] for n, x in found["layers"].items() if "kernel" in x}
    largest = max(x[0].nbytes for x in kernels.values())
    assert max(held) - before <= size + largest
    # Of a matrix whose inputs lie apart every process reads all that its outputs read, once.
    assert sum(x.size for x in blocks) == sum(x.size for x in kernels.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    write(tmp_path / "model", toy_model())
    name, path = "model.layers.1.mlp.down_proj.weight", tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(ModelFolderError, match=rf"{name} holds numbers that are not finite"):
        load_int8(tmp_path / "model", CONFIG, toy_mesh())


def test_merging_multiplies_out():
    model = toy_model()
    params = in_int8(random_params(model), model.config)
    merged = merge(params)
    for name, each in params["layers"].items():
        if "kernel" in each:
            rounded = merged["layers"][name]["kernel"]
            steps = each["step"].reshape(
                len(rounded), *(1,) * (rounded.ndim - each["step"].ndim), *each["step"].shape[1:]
            )
            np.testing.assert_array_equal(rounded, each["kernel"] * steps)
    assert jax.tree.structure(merged) == jax.tree.structure(random_params(model))
