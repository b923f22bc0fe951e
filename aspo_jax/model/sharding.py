"""The mesh, and sharding as a table: what each logical axis of an array is called on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from aspo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
HOST = "pinned_host"  # JAX's name of the host's memory that an accelerator reads by itself
# The compiler places the collectives; the default of `jax.make_mesh` is Explicit.
AUTO = (AxisType.Auto,) * len(MESH_AXES)

RULES: Mapping[str, Any] = {  # to a mesh axis, several, or None
    "batch": ("data", "fsdp"),
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "rank": None,
}


def map_axes(function: Callable[..., Any], axes: Any, *rest: Any) -> Any:
    """``function(axes of an array, ...)`` for each array of trees shaped as the parameters.

    axes: tree whose leaves are tuples of logical axes, as `parameter_axes` gives it.
    """
    return jax.tree.map(function, axes, *rest, is_leaf=lambda x: isinstance(x, tuple))


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Translate the logical axes of one array, e.g. ``("embed", "heads", "head_dim")``.

    Raises:
        ValueError: a logical axis is not in `RULES`, or two of them land on one mesh axis.
    """
    entries, used = [], {}
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not in the rules table {sorted(RULES)}")
        entry = None if axis is None else RULES[axis]
        for name in (entry,) if isinstance(entry, str) else entry or ():
            if name in used:
                raise ValueError(
                    f"logical axes {used[name]!r} and {axis!r} of {axes} both land on mesh axis "
                    f"{name!r}; change one of them in the rules table"
                )
            used[name] = axis
        entries.append(entry)
    return PartitionSpec(*entries)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def axes_shardings(mesh: Mesh, axes: Any) -> Any:
    """NamedShardings for a tree of logical axes."""
    return shardings(mesh, map_axes(partition_spec, axes))


def placed(arrays: Any, shardings: Any) -> Any:
    """Shapes and types of arrays, with where they are to lie."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(arrays, shardings),
    )


def is_on_host(x: Any) -> bool:
    """Whether an array, or the shape of one, is placed in the host's memory."""
    return getattr(getattr(x, "sharding", None), "memory_kind", None) == HOST


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows of a batch over the data axes; ``leading`` axes before the rows are not split."""
    return NamedSharding(mesh, PartitionSpec(*([None] * leading), RULES["batch"]))


def row_shards(mesh: Any) -> int:
    """Into how many shares `batch_sharding` divides the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


# --- the mesh ---------------------------------------------------------------------------------


class MeshError(UserError):
    """The mesh does not fit the devices."""


def mesh_sizes(devices: int, *, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Sizes of the axes over so many devices; one of them may be -1, the devices left over.

    Raises:
        MeshError: they do not multiply to the number of devices.
    """
    sizes = (data, fsdp, tensor)
    known = math.prod(size for size in sizes if size != -1)
    rest = devices // known if known > 0 else 0
    data, fsdp, tensor = filled = tuple(rest if size == -1 else size for size in sizes)
    if sizes.count(-1) > 1 or min(filled) < 1 or math.prod(filled) != devices:
        named = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise MeshError(
            f"mesh {named} does not fit {devices} device(s); set Runtime.data, Runtime.fsdp and "
            "Runtime.tensor so that they multiply to that number, at most one of them -1"
        )
    return data, fsdp, tensor


def local_sizes(devices: int, tensor: int) -> tuple[int, int, int]:
    """Sizes of the mesh on which a process samples by itself, of its own devices.

    Raises:
        MeshError: a tensor group does not lie within one process.
    """
    if devices % tensor:
        raise MeshError(
            f"Runtime.tensor = {tensor} does not divide the {devices} device(s) of a process; a "
            "tensor group must lie within one process, set a divisor"
        )
    return devices // tensor, 1, tensor


def device_mesh(devices: Sequence[Any], sizes: tuple[int, ...]) -> Mesh:
    """The devices, in their order, as a mesh."""
    return Mesh(np.array(devices, dtype=object).reshape(sizes), MESH_AXES, axis_types=AUTO)


def abstract_mesh(sizes: tuple[int, ...]) -> Any:
    """A mesh without devices: programs can be lowered for it, not compiled."""
    return AbstractMesh(sizes, MESH_AXES, axis_types=AUTO)
