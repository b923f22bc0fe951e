"""Options of the compilers for the update, by platform: the one place that has any."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# By itself a CPU begins with all arrays at once, and the optimizer's temporaries, 12 bytes a
# parameter, are all there together; so it is to finish one before it begins with the next.
_ONE_BY_ONE = ("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
# By itself a TPU multiplies with pieces of a matrix as they arrive, and reads and writes the whole
# result for each; so it is to gather the next matrix while it multiplies with the one before.
_WHOLE_MATRICES = ("xla_tpu_enable_windowed_einsum_for_all_gather", False)
# By itself a GPU's compiler sums all gradients of a layer at its end, with nothing left to do
# meanwhile; so it is to sum each as it is made. The value: bytes that may be joined.
_EACH_GRADIENT = ("xla_gpu_reduce_scatter_combine_threshold_bytes", "1")


class Options(NamedTuple):
    """What a compiler is told, and what it was to be told but does not know."""

    known: dict[str, str | bool]
    unknown: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """For the log; empty: there is nothing to say."""
        told = [f"{name}={value}" for name, value in self.known.items()]
        lost = [f"{name} left out, for this XLA does not know it" for name in self.unknown]
        return ", ".join(told + lost)


def update_options(mesh: Any) -> Options:
    """Of the update on the devices of a mesh; none without devices, for nothing is compiled."""
    if not isinstance(mesh, Mesh):
        return Options({})
    wanted = _wanted(mesh)
    known = {name: value for name, value in wanted.items() if _is_known(mesh, name, value)}
    return Options(known, tuple(name for name in wanted if name not in known))


def _wanted(mesh: Mesh) -> dict[str, str | bool]:
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        return dict([_ONE_BY_ONE])
    # Over a tensor axis it is activations that are exchanged, which was not looked at.
    if mesh.size == 1 or mesh.shape["tensor"] > 1:
        return {}
    return dict({"tpu": [_WHOLE_MATRICES], "gpu": [_EACH_GRADIENT]}[platform])


@functools.cache
def _is_known(mesh: Mesh, name: str, value: str | bool) -> bool:
    nothing = jax.jit(
        lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, PartitionSpec())
    ).lower()
    try:
        nothing.compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if name not in str(error):
            raise
        return False
    return True
