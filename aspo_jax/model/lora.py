"""Low-rank adapters (arXiv 2106.09685): small matrices that are trained beside frozen ones.

    y = x W + scale (x a) b          a [what W reads, r]    b [r, what W writes], 0 at first

Which matrices get one, how it is shaped, sharded and called follows from the network's own table of
parameters. An adapter is a tree of its own; `attach` lays it beside the frozen weights, where
`aspo_jax.model.decoder.project` finds it; `merge` alone ever forms ``W + scale a b``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers
from jax.sharding import Mesh

from aspo_jax.model.decoder import Model
from aspo_jax.model.parameters import (
    ModelConfig,
    Parameter,
    draw_layers,
    parameter_axes,
    parameters,
    table_axes,
    unstack_axes,
)
from aspo_jax.model.quantised import int8_axes
from aspo_jax.model.sharding import axes_shardings

TARGETS: Mapping[str, frozenset[str]] = {  # by an axis that a matrix has
    "attention": frozenset({"heads", "kv_heads"}),
    "mlp": frozenset({"mlp"}),
    "all": frozenset({"heads", "kv_heads", "mlp"}),
}
# Standard deviation 1 / sqrt(3 fan in), uniform: the first values of the `peft` package.
_FIRST = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Lora(NamedTuple):
    """Which adapters a network gets.

    rank: r above. alpha: see `scale`.
    targets: of `TARGETS`: the matrices of attention, of the feed-forward network, or both.
    is_rank_stabilised: divide alpha by the root of the rank (arXiv 2312.03732).
    is_int8: the frozen weights beside them are those of `aspo_jax.model.quantised`.
    """

    rank: int
    alpha: float
    targets: str = "all"
    is_rank_stabilised: bool = False
    is_int8: bool = False

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


def adapter_table(config: ModelConfig, lora: Lora) -> dict[str, Any]:
    """A tree shaped as an adapter, without the layer axis, whose leaves are `Parameter`.

    They are named as in a folder of the `peft` package.
    """
    found = {name: each["kernel"] for name, each in _matrices(config).items()}
    wanted, r = TARGETS[lora.targets], ("rank", lora.rank)

    def pair(matrix: Parameter) -> dict[str, Parameter]:
        name = f"base_model.model.{matrix.name.removesuffix('.weight')}.lora_"
        reads, writes = matrix.dims[: matrix.reads], matrix.dims[matrix.reads :]
        return {
            "a": Parameter(f"{name}A.weight", (*reads, r), _FIRST, matrix.reads),
            "b": Parameter(f"{name}B.weight", (r, *writes), initializers.zeros, 1),
        }

    return {"layers": {name: pair(x) for name, x in found.items() if wanted & set(x.axes)}}


def _matrices(config: ModelConfig) -> dict[str, Any]:
    layers = parameters(config)["layers"]
    return {name: each for name, each in layers.items() if "kernel" in each}


def init_adapter(config: ModelConfig, lora: Lora, key: Array) -> Any:
    """A new adapter, float32: ``a`` random, ``b`` zero, so that the policy is the frozen one."""

    def draw(path: Any, parameter: Parameter) -> Array:
        name = f"{path[1].key}.{path[2].key}"
        return draw_layers(parameter, name, config.layers, key)

    return jax.tree_util.tree_map_with_path(draw, adapter_table(config, lora))


def adapter_axes(config: ModelConfig, lora: Lora) -> Any:
    """Logical axes of every array of an adapter; see `aspo_jax.model.parameter_axes`."""
    return table_axes(adapter_table(config, lora))


def attached_axes(model: Model, lora: Lora) -> Any:
    """Logical axes of a network's params with adapters attached, stacked or not as its own are."""
    frozen = frozen_axes(model.config, lora)
    layers = dict(frozen["layers"])
    for name, pair in adapter_axes(model.config, lora)["layers"].items():
        layers[name] = layers[name] | pair | {"factor": ("layers",)}
    axes = frozen | {"layers": layers}
    return axes if model.is_stacked else unstack_axes(axes, model.config.layers)


def frozen_axes(config: ModelConfig, lora: Lora) -> Any:
    """Logical axes of the stacked weights that adapters lie beside."""
    return int8_axes(config) if lora.is_int8 else parameter_axes(config)


_PARTS = ("a", "b", "factor")  # what lies beside a matrix


def attach(adapter: Any, frozen: Any, scale: float) -> Any:
    """Params of stacked layers with an adapter beside their matrices; nothing is copied."""
    layers = dict(frozen["layers"])
    for name, pair in adapter["layers"].items():
        # No `b * scale`, which is as good: where some gradients of a scan are summed in place and
        # others are not, JAX 0.10.2 takes the one for the other.
        layers[name] = layers[name] | pair | {"factor": _factor_Y(pair["a"].shape[0], scale)}
    return frozen | {"layers": layers}


@functools.cache
def _factor_Y(layers: int, scale: float) -> np.ndarray:
    """The same array every time, by which engines know params that they have."""
    return np.full(layers, scale, np.float32)


def adapter_of(params: Any) -> Any:
    """The adapter that is attached."""
    layers = params["layers"].items()
    return {"layers": {name: {k: x[k] for k in ("a", "b")} for name, x in layers if "a" in x}}


def detach(params: Any) -> Any:
    """The frozen weights alone."""
    layers = {
        name: {part: x for part, x in each.items() if part not in _PARTS}
        for name, each in params["layers"].items()
    }
    return params | {"layers": layers}


def merge(params: Any, dtype: Any = jnp.float32) -> Any:
    """Params of plain matrices: adapters are added to theirs, integers multiplied with their steps.

    dtype: of the matrices that change. The sum is float32, of one layer at a time.
    """
    if not (is_adapted(params) or is_int8(params)):
        return params
    layers = {name: _plain(each, dtype) for name, each in params["layers"].items()}
    return params | {"layers": layers}


def is_adapted(params: Any) -> bool:
    """Whether an adapter is attached."""
    layers = params["layers"]
    return not isinstance(layers, list) and any("a" in each for each in layers.values())


def is_int8(params: Any) -> bool:
    """Whether the matrices are those of `aspo_jax.model.quantised`."""
    layers = params["layers"]
    return not isinstance(layers, list) and "step" in layers["q"]


def _plain(each: Any, dtype: Any) -> Any:
    parts = {part: x for part, x in each.items() if part in ("kernel", "step", *_PARTS)}
    if parts.keys() <= {"kernel"}:
        return each
    rest = {part: x for part, x in each.items() if part not in parts}
    return rest | {"kernel": _formed(parts, dtype=dtype)}


@functools.partial(jax.jit, static_argnames="dtype")
def _formed(parts: dict[str, Array], *, dtype: Any) -> Array:
    """``W + factor a b`` of every layer, as far as it has these."""

    def of_layer(layer: dict[str, Array]) -> Array:
        w = layer["kernel"].astype(jnp.float32)
        if "step" in layer:
            w = w * layer["step"]
        if "a" in layer:
            product = jnp.tensordot(layer["a"], layer["b"], axes=1, precision="highest")
            w = w + layer["factor"] * product
        return w.astype(dtype)

    return jax.lax.map(of_layer, parts)


class Trained(NamedTuple):
    """What an update changes of a network: all its weights, or an adapter beside frozen ones.

    init: key -> first values.
    axes: logical axes of every array.
    whole: (trained, frozen or None) -> params that `Model.apply` takes.
    split: such params -> (trained, frozen or None).
    """

    init: Callable[[Array], Any]
    axes: Any
    whole: Callable[[Any, Any], Any]
    split: Callable[[Any], tuple[Any, Any]]

    def shardings(self, mesh: Mesh) -> Any:
        """Tree of NamedShardings shaped as the trained weights."""
        return axes_shardings(mesh, self.axes)


def trained_part(model: Model, lora: Lora | None) -> Trained:
    """What is trained of a network of stacked layers; None: everything."""
    if lora is None:
        return Trained(
            model.init, model.axes(), lambda params, frozen: params, lambda params: (params, None)
        )
    return Trained(
        functools.partial(init_adapter, model.config, lora),
        adapter_axes(model.config, lora),
        functools.partial(attach, scale=lora.scale),
        lambda params: (adapter_of(params), detach(params)),
    )
