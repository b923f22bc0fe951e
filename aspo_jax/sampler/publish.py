"""From the learner's weights to the sampler's: cast and gathered once per policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aspo_jax.model import (
    Lora,
    Model,
    attached_axes,
    is_adapted,
    map_axes,
    merge,
    partition_spec,
    unstack,
)
from aspo_jax.model.sharding import axes_shardings


class Publish(NamedTuple):
    """From the learner's params to the sampler's.

    of: what does it. arrange: the part of it that is arithmetic, a pure function.
    shardings: of the result.
    """

    of: Callable[[Any], Any]
    arrange: Callable[[Any], Any]
    shardings: Any


def make_publish(
    model: Model, mesh: Mesh, local: Mesh, dtype: Any, lora: Lora | None = None
) -> Publish:
    """What turns the learner's params, on ``mesh``, into the sampler's, on ``local``.

    ``model`` is the sampler's; ``local`` has this process's own devices only. Matrices are cast to
    ``dtype`` (as the forward pass would; norms stay as they are) and gathered over the fsdp axis,
    so that decoding has no collectives but those of tensor parallelism; layers are unstacked if the
    model wants them so. Where type and layout agree already, the arrays are the learner's own.

    lora: the params have these adapters, and the sampler runs beside them; None: adapters, where
        there are any, are merged into their matrices.
    """
    axes = model.axes() if lora is None else attached_axes(model, lora)
    whole = map_axes(lambda names: NamedSharding(mesh, _unsharded(names)), axes)
    at_home = axes_shardings(local, axes)
    is_alone = jax.process_count() == 1 and mesh == local

    def is_own(params: Any) -> bool:
        held = jnp.float32 if lora is None else params["embed"].dtype
        return is_alone and model.is_stacked and jnp.dtype(dtype) == held

    def arrange(params: Any) -> Any:
        params = merge(params, dtype) if lora is None else params
        return cast_matrices(params if model.is_stacked else unstack(params), dtype)

    gather = jax.jit(arrange, out_shardings=whole)

    def publish(params: Any) -> Any:
        if is_own(params) and is_adapted(params) == (lora is not None):
            return jax.device_put(params, at_home)  # in place, and what is NumPy's once for all
        return jax.tree.map(_on_own_devices, gather(params), at_home)

    return Publish(publish, arrange, at_home)


_KEPT = {"scale", "norm", "factor", "step"}  # names of arrays that only scale others


def cast_matrices(params: Any, dtype: Any) -> Any:
    """The params with their matrices and biases in ``dtype``; scales and what is int8 stay."""

    def cast(path: Any, x: Array) -> Array:
        is_kept = path[-1].key in _KEPT or x.dtype == jnp.int8
        return x if is_kept else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _unsharded(axes: tuple[str, ...]) -> PartitionSpec:
    return partition_spec(tuple(None if axis == "embed" else axis for axis in axes))


def _on_own_devices(x: Array, sharding: Any) -> Array:
    """The array as one of this process's devices alone; together they hold all of it."""
    own = {shard.device: shard.data for shard in x.addressable_shards}
    shards = [own[device] for device in sharding.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)
