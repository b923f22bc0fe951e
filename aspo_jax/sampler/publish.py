"""From the learner's weights to the sampler's: cast and gathered once per policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aspo_jax.model import Model, map_axes, partition_spec, unstack


def make_publish(model: Model, mesh: Mesh, local: Mesh, dtype: Any) -> Callable[[Any], Any]:
    """A function that turns the learner's params, on ``mesh``, into the sampler's, on ``local``.

    ``model`` is the sampler's; ``local`` has this process's own devices only. Matrices are cast to
    ``dtype`` (as the forward pass would; norms stay float32) and gathered over the fsdp axis, so
    that decoding has no collectives but those of tensor parallelism; layers are unstacked if the
    model wants them so. Where type and layout agree already, the arrays are the learner's own.
    """
    axes = model.axes()
    whole = map_axes(lambda names: NamedSharding(mesh, _unsharded(names)), axes)
    at_home = model.shardings(local)
    is_alone = jax.process_count() == 1 and mesh == local
    is_own = is_alone and model.is_stacked and jnp.dtype(dtype) == jnp.float32

    def arrange(params: Any) -> Any:
        return cast_matrices(params if model.is_stacked else unstack(params), axes, dtype)

    gather = jax.jit(arrange, out_shardings=whole)

    def publish(params: Any) -> Any:
        if is_own:
            return params
        return jax.tree.map(_on_own_devices, gather(params), at_home)

    return publish


def cast_matrices(params: Any, axes: Any, dtype: Any) -> Any:
    """The params with their matrices and biases in ``dtype``, scales of norms as they are.

    axes: of the params, see `Model.axes`.
    """
    return map_axes(lambda names, x: x if "norm" in names else x.astype(dtype), axes, params)


def _unsharded(axes: tuple[str, ...]) -> PartitionSpec:
    return partition_spec(tuple(None if axis == "embed" else axis for axis in axes))


def _on_own_devices(x: Array, sharding: Any) -> Array:
    """The array as one of this process's devices alone; together they hold all of it."""
    own = {shard.device: shard.data for shard in x.addressable_shards}
    shards = [own[device] for device in sharding.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)
