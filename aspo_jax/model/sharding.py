"""Sharding as a table: what each logical axis of an array is called on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

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
}


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
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows of a batch over the data axes; ``leading`` axes before the rows are not split."""
    return NamedSharding(mesh, PartitionSpec(*([None] * leading), RULES["batch"]))
