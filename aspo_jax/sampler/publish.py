"""From the learner's weights to the sampler's: cast and gathered once per policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from aspo_jax.model import RULES, Model, shardings, unstack


def make_publish(model: Model, mesh: Mesh, local: Mesh, dtype: Any) -> Callable[[Any], Any]:
    """The learner's params on ``mesh`` -> those of ``model``, the sampler's, on ``local``.

    ``local`` has this process's own devices. Matrices are cast to ``dtype`` (as the forward pass
    would; norms stay float32) and gathered over the fsdp axis, so that no collective is left in
    decoding but those of tensor parallelism; layers are unstacked if the model wants them so.
    Where type and layout agree already, the arrays are the learner's own.
    """
    specs = model.partition_specs()
    whole = shardings(mesh, jax.tree.map(_unsharded, specs, is_leaf=_is_spec))
    at_home = shardings(local, specs)
    is_own = (
        model.is_stacked
        and jnp.dtype(dtype) == jnp.float32
        and jax.process_count() == 1
        and mesh == local
    )

    def arrange(params: Any) -> Any:
        return cast_matrices(params if model.is_stacked else unstack(params), dtype)

    gather = jax.jit(arrange, out_shardings=whole)

    def publish(params: Any) -> Any:
        if is_own:
            return params
        return jax.tree.map(_on_own_devices, gather(params), at_home)

    return publish


def cast_matrices(params: Any, dtype: Any) -> Any:
    """The params with their matrices and biases in ``dtype``, scales of norms as they are."""

    def cast(path, x):
        return x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _unsharded(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == RULES["embed"] else axis for axis in spec))


def _on_own_devices(x: Array, sharding: Any) -> Array:
    """This process's shards of an array that it holds whole, as an array of its own."""
    own = {shard.device: shard.data for shard in x.addressable_shards}
    parts = [own[device] for device in sharding.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)
