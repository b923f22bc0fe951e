"""The process and its devices: XLA flags, compilation cache, mesh."""

from __future__ import annotations

import importlib.util
import os
import resource
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from aspo_jax.model.sharding import MESH_AXES


class MeshError(ValueError):
    """The mesh does not fit the devices."""


EXACT_BFLOAT16 = "--xla_allow_excess_precision=false"


def start(*, data: int, fsdp: int, tensor: int, compilation_cache: str | None) -> Mesh:
    """Prepare this process and return the mesh; call before anything touches a device.

    Args:
        data, fsdp, tensor: sizes of the mesh axes; one of them may be -1, the devices left over.
        compilation_cache: folder of compiled programs that later runs reuse, or None.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    if _is_cpu_only():
        # Two compilations of one bfloat16 forward pass differ by up to 0.13 nats otherwise, and
        # the first importance ratio of an iteration would not be 1.
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_allow_excess_precision" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {EXACT_BFLOAT16}".strip()
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices as a (data, fsdp, tensor) mesh; see `start`."""
    sizes, devices = [data, fsdp, tensor], jax.device_count()
    named = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    known = int(np.prod([size for size in sizes if size != -1]))
    rest = devices // known if known > 0 else 0
    filled = [rest if size == -1 else size for size in sizes]
    if sizes.count(-1) > 1 or min(filled) < 1 or int(np.prod(filled)) != devices:
        raise MeshError(
            f"mesh {named} does not fit {devices} device(s); set Runtime.data, Runtime.fsdp and "
            "Runtime.tensor so that they multiply to that number, at most one of them -1"
        )
    # Auto axes: the compiler places the collectives; make_mesh's default is Explicit.
    return jax.make_mesh(tuple(filled), MESH_AXES, axis_types=(AxisType.Auto,) * len(filled))


def _is_cpu_only() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = ("jax_plugins", "libtpu")
    return not any(importlib.util.find_spec(name) for name in plugins)


def peak_memory_gib() -> float:
    """The largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
