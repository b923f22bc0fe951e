"""Frozen weights in int8: integers, and a step for each output of a matrix.

    W is near  integers * step        |W - integers * step| <= step / 2

Only the matrices of layers are: they are nearly all of a model. The embedding is looked up, and as
the output head it would put its error into every logit; norms and biases are small. Those stay
bfloat16. `aspo_jax.model.decoder.project` multiplies with the integers, then with the steps.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aspo_jax.model.hf import (
    NotFinite,
    bounds,
    load_leaf,
    opened,
    read_block,
    stacked,
    without_layers,
)
from aspo_jax.model.parameters import ModelConfig, Parameter, parameters, table_axes
from aspo_jax.model.sharding import axes_shardings, placed

_TYPES = {"kernel": jnp.int8, "step": jnp.float32}  # by the name of an array; others: _REST
_REST = jnp.bfloat16
_LEAST = np.finfo(np.float32).tiny  # step of an output whose weights are all 0


def quantise(matrix: np.ndarray, reads: int) -> dict[str, np.ndarray]:
    """A matrix as integers, -127 to 127, and the step of each output; the largest weight is 127.

    By NumPy, so that it is the same model, to the bit, on every kind of device.

    reads: how many axes the matrix reads. A step is not finite where a weight of its output is not.
    """
    matrix, read = matrix.astype(np.float32), tuple(range(reads))
    step = np.maximum(np.abs(matrix).max(read) / np.float32(127), _LEAST)
    with np.errstate(invalid="ignore"):
        return {"kernel": np.rint(matrix / step).astype(np.int8), "step": step}


def int8_table(config: ModelConfig) -> dict[str, Any]:
    """`aspo_jax.model.parameters.parameters` with a "step" beside each matrix of the layers."""

    def with_step(each: dict[str, Parameter]) -> dict[str, Parameter]:
        if (matrix := each.get("kernel")) is None:
            return each
        return each | {"step": Parameter(matrix.name, matrix.dims[matrix.reads :], matrix.init)}

    table = parameters(config)
    return table | {"layers": {name: with_step(x) for name, x in table["layers"].items()}}


def int8_axes(config: ModelConfig) -> Any:
    """Logical axes of every array; see `aspo_jax.model.parameter_axes`."""
    return table_axes(int8_table(config))


def int8_shapes(config: ModelConfig, mesh: Any) -> Any:
    """Shapes, types and shardings of frozen weights in int8."""

    def shape(path: Any, entry: Parameter) -> jax.ShapeDtypeStruct:
        layers = (config.layers,) if entry.is_layered else ()
        return jax.ShapeDtypeStruct((*layers, *entry.ours), _TYPES.get(path[-1].key, _REST))

    shapes = jax.tree_util.tree_map_with_path(shape, int8_table(config))
    return placed(shapes, axes_shardings(mesh, int8_axes(config)))


def load_int8(folder: str | Path, config: ModelConfig, mesh: Mesh) -> Any:
    """`aspo_jax.model.load_params` in int8, onto a mesh, which never holds a matrix as it was.

    Raises:
        ModelFolderError: as there.
    """
    shapes, table = int8_shapes(config, mesh), int8_table(config)
    with opened(folder, config) as tensors:

        def load(entry: Parameter, shape: Any) -> jax.Array:
            return load_leaf(tensors, entry, config.layers, shape.sharding, shape.dtype)

        def of_layers(each: Any, shapes: Any) -> Any:
            if "kernel" not in each:
                return jax.tree.map(load, each, shapes)
            both = {part: shapes[part] for part in _TYPES}
            rest = {name: load(each[name], x) for name, x in shapes.items() if name not in _TYPES}
            return _load_matrix(tensors, each["kernel"], config.layers, both) | rest

        layers = {name: of_layers(x, shapes["layers"][name]) for name, x in table["layers"].items()}
        rest = {name: load(table[name], x) for name, x in shapes.items() if name != "layers"}
        return rest | {"layers": layers}


def _load_matrix(tensors: dict[str, Any], entry: Parameter, layers: int, shapes: Any) -> Any:
    """All layers of a matrix, and their steps; replicas of a shard are read once."""
    names, reads = entry.names(layers), entry.reads
    everything = tuple((0, size) for size in entry.ours[:reads])
    of_layer = jax.tree.map(lambda x: without_layers(x.sharding), shapes)

    def load(y: int) -> Any:
        @functools.cache
        def of_outputs(writes: tuple[tuple[int, int], ...]) -> dict[str, np.ndarray]:
            """Of these outputs; a step follows from all that the matrix reads."""
            found = quantise(read_block(tensors[names[y]], entry, (*everything, *writes)), reads)
            if not np.isfinite(found["step"]).all():
                raise NotFinite(names[y])
            return found

        def kernel(index: Any) -> np.ndarray:
            return of_outputs(bounds(index[reads:], entry.ours[reads:]))["kernel"][index[:reads]]

        def step(index: Any) -> np.ndarray:
            return of_outputs(bounds(index, entry.ours[reads:]))["step"]

        make = jax.make_array_from_callback
        return {
            "kernel": make(entry.ours, of_layer["kernel"], kernel),
            "step": make(entry.ours[reads:], of_layer["step"], step),
        }

    return stacked(shapes, load)
