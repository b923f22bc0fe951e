"""Accelerators by name, without the hardware: the figures of a chip, and devices to compile for.

A topology is written as the cloud writes it: ``v5e:4x4``, ``v5p:2x2x4``, ``h100:8``, ``cpu:8``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from aspo_jax.errors import UserError, closest
from aspo_jax.paths import shorten

GIB = 2**30


class TopologyError(UserError):
    """A topology that is unknown, or that nothing installed here can compile for."""


class Chip(NamedTuple):
    """One accelerator: peak bfloat16 FLOP/s, memory bandwidth in B/s and usable memory in bytes.

    per_host: chips of one machine, which sample together.
    links: B/s that it takes from the other chips of its slice, or of its machine.
    network: the same from other machines, where that is another network.
    dimensions: of its torus; 0 where devices are only counted.
    """

    platform: str
    flops: float
    bandwidth: float
    memory: int
    per_host: int
    links: float
    network: float | None = None
    dimensions: int = 0


def _gib(size: float) -> int:
    return int(size * GIB)


# TPU speeds: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; memory: what libtpu 0.0.52 leaves to a
# program. GPU speeds (dense, SXM): NVIDIA's A100, H100 and H200 data sheets; memory: as the driver
# reports it, before JAX's own reserve; links: TPUs by the same pages, NVLink by the same sheets,
# between machines a port of 400 Gbit/s a GPU (A100: 200). CPU: simulated, nothing is known.
CHIPS = {
    "v4": Chip("tpu", 275e12, 1228e9, _gib(30.75), 4, 300e9, dimensions=3),
    "v5e": Chip("tpu", 197e12, 819e9, _gib(15.75), 4, 200e9, dimensions=2),
    "v5p": Chip("tpu", 459e12, 2765e9, _gib(95.73), 4, 600e9, dimensions=3),
    "v6e": Chip("tpu", 918e12, 1638e9, _gib(31.24), 4, 448e9, dimensions=2),
    "a100": Chip("gpu", 312e12, 2039e9, _gib(79.2), 8, 300e9, 25e9),
    "h100": Chip("gpu", 989e12, 3352e9, _gib(79.1), 8, 450e9, 50e9),
    "h200": Chip("gpu", 989e12, 4800e9, _gib(139.8), 8, 450e9, 50e9),
    "cpu": Chip("cpu", math.nan, math.nan, _gib(16), 2**20, math.nan),
}
# Slices that can be rented: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Those of three dimensions
# also come in sorted multiples of 4, up to the last of each list.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}
# An accelerator type counts chips, or the two cores of each chip: v5e-16 is 4x4, v4-32 is 2x2x4.
_TYPES = {"v5litepod": "v5e"}
_CORES = {"v4": 2, "v5p": 2}

EXAMPLES = "v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4, a100:8, h100:8, h200:1, cpu:8"


class Topology(NamedTuple):
    """Chips of one kind; ``shape`` is the torus, or the count alone."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def links(self) -> float:
        """B/s that a chip takes from others, where the slowest link on the way sets the pace."""
        is_one = self.size <= self.chip.per_host
        return self.chip.links if is_one else self.chip.network or self.chip.links

    def host(self) -> Topology:
        """One machine of it, which samples by itself."""
        if self.size <= self.chip.per_host:
            return self
        # A machine of a larger slice has its 4 TPU chips in a square.
        shape = (2, 2, 1)[: self.chip.dimensions] if self.chip.dimensions else (self.chip.per_host,)
        kind = self.name.partition(":")[0]
        return Topology(f"{kind}:{'x'.join(map(str, shape))}", self.chip, shape)


def parse_topology(name: str) -> Topology:
    """The topology of a name such as ``v5e:4x4`` or ``h100:8``.

    Raises:
        TopologyError: an unknown chip or a shape that it does not come in; lists the known ones.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise TopologyError(
            f"--topology {shorten(name)}: unknown chip {shorten(kind, 40)!r}{_hint(name)}; "
            f"expected one of {', '.join(CHIPS)} with a shape, such as {EXAMPLES}"
        )
    chip = CHIPS[kind]
    sizes = tuple(map(int, re.findall(r"[0-9]{1,6}", shape)))
    expected = "x".join(["n"] * max(chip.dimensions, 1))
    if "x".join(map(str, sizes)) != shape or len(sizes) != max(chip.dimensions, 1) or 0 in sizes:
        counted = chip.dimensions and re.fullmatch("[0-9]{1,6}", shape)
        example = _of_size(kind, int(shape)) if counted else None
        raise TopologyError(
            f"--topology {shorten(name)}: the shape is {shorten(shape)!r}, expected {expected} for"
            f" {kind}, such as {example or _example(kind)}"
        )
    if chip.platform == "tpu" and sizes not in _shapes(kind):
        raise TopologyError(
            f"--topology {name}: there is no such slice of {kind}; expected {_slices(kind)}"
        )
    return Topology(name, chip, sizes)


def _hint(name: str) -> str:
    """The name that was meant: a chip mistyped, or an accelerator type such as v5e-16."""
    typed, _, rest = re.sub(r"^([a-z0-9]+)-([0-9]+)$", r"\1:\2", name.lower()).partition(":")
    known = {kind: name for kind in CHIPS if _is_known(name := _meant(kind, rest))}
    typed = _TYPES.get(typed, typed)
    kind = closest(typed, known) or closest(typed, CHIPS)
    return f" (did you mean {known.get(kind) or _example(kind)}?)" if kind else ""


def _meant(kind: str, rest: str) -> str:
    if re.fullmatch("[0-9]{1,6}", rest):
        return _of_size(kind, int(rest) // _CORES.get(kind, 1)) or f"{kind}:{rest}"
    return f"{kind}:{rest}"


def _is_known(name: str) -> bool:
    try:
        parse_topology(name)
    except TopologyError:
        return False
    return True


def _example(kind: str) -> str:
    return next(example for example in EXAMPLES.split(", ") if example.startswith(kind))


def _of_size(kind: str, size: int) -> str | None:
    """The slice of a number of chips, nearest to a cube; None if there is none."""
    if not CHIPS[kind].dimensions:
        return f"{kind}:{size}"
    found = [shape for shape in _shapes(kind) if math.prod(shape) == size]
    return f"{kind}:{'x'.join(map(str, min(found, key=max)))}" if found else None


def _shapes(kind: str) -> list[tuple[int, ...]]:
    """The slices of a chip that can be rented."""
    if kind not in _LARGEST:
        return list(_FLAT)
    sides = (range(4, side + 1, 4) for side in _LARGEST[kind])
    return [*_DEEP, *(x for x in itertools.product(*sides) if x == tuple(sorted(x)))]


def _slices(kind: str) -> str:
    listed = _DEEP if kind in _LARGEST else _FLAT
    names = "one of " + ", ".join("x".join(map(str, shape)) for shape in listed)
    if kind not in _LARGEST:
        return names
    largest = "x".join(map(str, _LARGEST[kind]))
    return f"{names}, or ascending multiples of 4 from 4x4x4 to {largest}"


def open_devices(topology: Topology) -> Sequence[Any]:
    """Devices of the topology, described by its compiler; simulated CPU devices for ``cpu:n``.

    Raises:
        TopologyError: the compiler is not installed or refuses, or the backend has already started
            with fewer simulated devices.
    """
    of = {"gpu": _gpu_devices, "tpu": _tpu_devices, "cpu": _simulated}
    return of[topology.chip.platform](topology)


def _simulated(topology: Topology) -> Sequence[Any]:
    count = topology.size
    with contextlib.suppress(RuntimeError):  # the backend has started; it may have enough of them
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TopologyError(
            f"{count} simulated CPU devices are needed, found {len(devices)}, and the backend has "
            "started; plan in a process of its own: python -m aspo_jax.plan"
        )
    return devices[:count]


def _described(of: Topology, platform: str, remedy: str, **options: Any) -> Sequence[Any]:
    """The devices, as the compiler of their platform describes them."""
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(of.name, platform, **options)
    except Exception as error:  # the compilers' errors have no class of their own
        text = str(error).partition("\n")[0]
        raise TopologyError(
            f"--topology {of.name}: the {platform} compiler refuses it ({text}); {remedy}"
        ) from error
    return found.devices


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    if not importlib.util.find_spec("libtpu"):
        raise TopologyError(
            f"--topology {topology.name}: libtpu, the TPU's compiler, is not installed; no TPU is "
            f"needed, only: pip install 'jax[tpu]=={jax.__version__}' (or --lower-only, which "
            "reckons by formula)"
        )
    # Without these libtpu looks for the machine that it is not on, and logs that it found none.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip, as programs see it
    if topology.size < topology.chip.per_host:
        sizes = (*topology.shape, 1, 1)[:3]
        options["chips_per_host_bounds"] = list(sizes)
    remedy = (
        "one process at a time can use libtpu, and every machine of a slice has 4 chips in a square"
    )
    return _described(topology, "tpu", remedy, **options)


# --- GPUs -------------------------------------------------------------------------------------

# Streaming multiprocessors, FP32 units of each, compute capability, shared memory per block and
# per multiprocessor, level 2 cache, clock: NVIDIA's architecture papers for GA100 and GH100.
_GPUS = {
    "a100": (108, 64, (8, 0), 166_912, 167_936, 41_943_040, 1.41),
    "h100": (132, 128, (9, 0), 232_448, 233_472, 52_428_800, 1.98),
    "h200": (132, 128, (9, 0), 232_448, 233_472, 52_428_800, 1.98),
}
GPU_NOTE = (
    "compiled without a GPU: no cuDNN and no autotuning, so the attention kernel and workspaces of "
    "the real run are others, and temporaries may differ"
)


def _gpu_devices(topology: Topology) -> Sequence[Any]:
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        raise TopologyError(
            f"--topology {topology.name}: the CUDA compiler is not installed; no GPU is needed, "
            f"only its plugin: pip install jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=="
            f"{jax.__version__}"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    per_host = topology.host().size
    hosts, rest = divmod(topology.size, per_host)
    if rest:
        raise TopologyError(
            f"--topology {topology.name}: {topology.size} GPUs are no whole number of machines "
            f"with {per_host}; give a multiple"
        )
    return _described(
        topology,
        "cuda",
        f"install the plugin of this jax: pip install jax-cuda12-plugin=={jax.__version__}",
        topology=f"1x{hosts}x{per_host}",
        target_config=_target_config(topology),
    )


def _target_config(topology: Topology) -> str:
    """The card as XLA's text proto `GpuTargetConfigProto`."""
    kind = topology.name.partition(":")[0]
    cores, units, (major, minor), per_block, per_core, cache, clock = _GPUS[kind]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": per_block,
        "shared_memory_per_core": per_core,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "memory_bandwidth": int(topology.chip.bandwidth),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": topology.chip.memory,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return f'gpu_device_info {{\n{lines}\n{capability}\n}}\nplatform_name: "CUDA"\n'
