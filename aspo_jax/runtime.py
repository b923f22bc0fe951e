"""Processes and their devices: joining the others, XLA flags, compilation cache, mesh.

A run may span several processes, one per host. Each samples and grades its own share of the
prompts; the update is one program over the devices of all. What one process must not do alone
(stop, fail, write) goes through `everyone` and `on_main`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
import traceback
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from aspo_jax.allocator import return_large_blocks
from aspo_jax.errors import UserError
from aspo_jax.model.sharding import (
    AUTO,
    MESH_AXES,
    MeshError,
    device_mesh,
    local_sizes,
    mesh_sizes,
)

Result = TypeVar("Result")


class LaunchError(UserError):
    """The processes of a run could not find each other, or do not run the same thing."""


class DeviceError(UserError):
    """jax cannot start the devices."""


class PeerError(UserError):
    """Another process failed; this one ends with it."""


_COMPILE = "/jax/core/compile/backend_compile_duration"  # its start is a scalar event
EXACT_BFLOAT16 = "--xla_allow_excess_precision=false"
GPU_MEMORY = "0.92"
LAUNCH_VARIABLES = ("ASPO_COORDINATOR", "ASPO_NUM_PROCESSES", "ASPO_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_SHUTDOWN_S = 60


def start(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    compilation_cache: str | None,
    context: int = 1,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Mesh:
    """Prepare this process and return the mesh; call before anything touches a device.

    Args:
        data, fsdp, tensor: sizes of the mesh axes; one of them may be -1, the devices left over.
        compilation_cache: folder of compiled programs that later runs reuse, or None.
        context: reserved for splitting one sequence over devices; only 1 exists.
        coordinator, num_processes, process_id: where process 0 listens ('host:port'), how many
            processes there are and which one this is. All None: see `launch_arguments`.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
        LaunchError: the processes cannot find each other.
        DeviceError: jax cannot start the devices.
    """
    if context != 1:
        raise MeshError(f"mesh axis context = {context}: the axis is reserved, expected 1")
    return_large_blocks()
    join(coordinator, num_processes, process_id)
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor)


@contextlib.contextmanager
def compilations(
    began: Callable[[str], None], ended: Callable[[str, float], None]
) -> Iterator[None]:
    """Call back when a program's compilation (or its loading from the cache) begins and ends.

    began, ended: called with the program's name; ``ended`` with the seconds that it took, too.
    """

    def on_scalar(event: str, value: float, **details: Any) -> None:
        if event == _COMPILE:
            began(_program(details))

    def on_duration(event: str, duration_secs: float, **details: Any) -> None:
        if event == _COMPILE:
            ended(_program(details), duration_secs)

    jax.monitoring.register_scalar_listener(on_scalar)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(on_scalar)
        jax.monitoring.unregister_event_duration_listener(on_duration)


def _program(details: Mapping[str, Any]) -> str:
    """jit_decode or jit(decode) -> decode"""
    return str(details.get("fun_name", "a program")).removeprefix("jit").strip("_()")


# --- finding the other processes ----------------------------------------------------------------


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Meet the others, if any, and start the devices; a second call does nothing. See `start`."""
    if jax.distributed.is_initialized():
        return
    if _is_cpu_only():
        # Two compilations of one bfloat16 forward pass differ by up to 0.13 nats otherwise, and
        # the first importance ratio of an iteration would not be 1.
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_allow_excess_precision" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {EXACT_BFLOAT16}".strip()
    # Of a GPU's memory jax takes 75 % otherwise; what is left is for CUDA and cuDNN themselves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)
    arguments = launch_arguments(coordinator, num_processes, process_id, os.environ)
    if arguments is not None:
        _join(arguments)
    _start_devices()
    if not is_alone():
        sys.excepthook = _end_at_once


def _start_devices() -> None:
    """Start and use them before an operation does, which would be blamed for what goes wrong."""
    try:
        for device in jax.local_devices():
            jax.device_put(0, device).block_until_ready()
    except (AssertionError, RuntimeError) as error:
        from jax.extend.backend import clear_backends  # takes a while to import

        clear_backends()  # else a second try would go on with those that did start, the CPU
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = f" of JAX_PLATFORMS={platforms}" if platforms else ""
        found = str(error) or "there is no GPU that it can see"  # jax merely asserts that
        raise DeviceError(
            f"jax cannot start the devices{asked}: {found}; expected devices with their plugin and "
            "driver, and free memory; nvidia-smi shows who holds a GPU's, "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 takes less of it, JAX_PLATFORMS=cpu runs on the CPU"
        ) from error


def launch_arguments(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None for a process that is alone.

    The first that says something: the arguments, the variables ASPO_COORDINATOR,
    ASPO_NUM_PROCESSES and ASPO_PROCESS_ID (``launch/`` sets them, JobSet's too), a TPU machine's
    metadata, a SLURM step, an indexed Kubernetes Job. The last three are read by JAX itself.

    Raises:
        LaunchError: some of the three are missing or malformed; a pod that cannot find the others.
    """
    explicit = (coordinator, num_processes, process_id)
    if any(value is not None for value in explicit):
        return _explicit(*explicit)
    given = [environment.get(name) for name in LAUNCH_VARIABLES]
    if any(given):
        return _from_variables(given)
    if _has_tpu(environment):
        return {}
    if all(name in environment for name in _SLURM):
        return _slurm(environment)
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return _kubernetes()
    return None


def _from_variables(given: list[str | None]) -> dict[str, Any] | None:
    coordinator, count, index = given
    if coordinator and count and index and count.isdecimal() and index.isdecimal():
        return _explicit(coordinator, int(count), int(index))
    found = ", ".join(f"{k}={v}" for k, v in zip(LAUNCH_VARIABLES, given, strict=True) if v)
    raise LaunchError(
        f"found {found}; expected all of {', '.join(LAUNCH_VARIABLES)}: 'host:port', a number "
        "of processes and this process's number from 0; set all of them or none"
    )


def _explicit(
    coordinator: str | None, count: int | None, index: int | None
) -> dict[str, Any] | None:
    if coordinator is None or count is None or index is None or not 0 <= index < count:
        raise LaunchError(
            f"found coordinator {coordinator}, {count} processes, process {index}; expected all "
            "three, processes numbered from 0 (Runtime.coordinator, Runtime.num_processes and "
            "Runtime.process_id, or the variables ASPO_...)"
        )
    if count == 1:
        return None
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        # Otherwise JAX would still ask SLURM which devices are this process's.
        "cluster_detection_method": "deactivate",
    }


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    tasks = environment["SLURM_NTASKS"]
    if tasks == "1":
        return None
    arguments: dict[str, Any] = {"cluster_detection_method": "slurm"}
    if environment.get("SLURM_STEP_NUM_NODES") == tasks:
        # JAX gives a task the one device of its local number, meant for a task per GPU. With a
        # task per node all devices of the node are its own.
        gpus = int(environment.get("SLURM_GPUS_ON_NODE", 0))
        arguments["local_device_ids"] = list(range(gpus)) or None
    return arguments


def _kubernetes() -> dict[str, Any]:
    if importlib.util.find_spec("kubernetes") is None:
        raise LaunchError(
            f"a pod of an indexed Kubernetes Job, but {', '.join(LAUNCH_VARIABLES)} are not set; "
            "set them as launch/jobset.yaml does (one pod: 'localhost:1', 1 and 0), or install "
            "the kubernetes package and let the pod's account read pods and jobs"
        )
    return {"cluster_detection_method": "k8s"}


def _has_tpu(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return any((*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")))


def _join(arguments: dict[str, Any]) -> None:
    """Connect to the other processes; the backend must not have started."""
    # The collectives of a CPU run hang for ever on few cores otherwise (jax 0.10).
    os.environ.setdefault("PJRT_NPROC", "16")
    # JAX's preemption service would swallow SIGTERM; stops are agreed on by `any_of` instead.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=_SHUTDOWN_S)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"the processes of this run did not meet ({arguments or 'as the TPU metadata says'}): "
            f"{error}"
        ) from error


def _end_at_once(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """What an uncaught error does to one process of several."""
    traceback.print_exception(kind, error, trace)
    leave(1)


def leave(status: int) -> int:
    """The exit status to return; one of several processes does not return but ends here.

    For errors only: an orderly exit first waits for the others, which may be waiting for this
    process in a collective. Process 0 goes last, for the others die with it.
    """
    if not jax.distributed.is_initialized():
        return status
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        is_last = is_main()
    except (AssertionError, RuntimeError):  # the devices did not start, which know it
        is_last = True
    if is_last:
        time.sleep(1.0)
    os._exit(status)


# --- acting together ------------------------------------------------------------------------------


def is_alone() -> bool:
    """Whether the run is this process only; does not start the devices where that is plain."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_main() -> bool:
    """Whether this is process 0, the one that writes and speaks."""
    return is_alone() or jax.process_index() == 0


def everyone(x: Any) -> np.ndarray:
    """The values of all processes, bit for bit, stacked on a leading axis; all must call.

    Args:
        x: an array or scalar, of the same shape and dtype on every process, at most 32 bits wide.
    """
    x = np.asarray(x)
    if x.dtype.itemsize > 4:
        raise TypeError(f"found {x.dtype}, which JAX would round; expected at most 32 bits")
    if is_alone():
        return x[None]
    return np.asarray(multihost_utils.process_allgather(x))


def any_of(is_true: bool) -> bool:
    """Whether it is true on some process; all must call."""
    return bool(everyone(np.bool_(is_true)).any())


def on_main(action: Callable[[], Result]) -> Result | None:
    """What process 0's action returns, None elsewhere; others wait for it. All must call.

    Raises:
        Exception: on process 0 what the action raised.
        PeerError: on the others if it raised, so that no one waits for a process that has ended.
    """
    result = error = None
    if is_main():
        try:
            result = action()
        except Exception as caught:
            error = caught
    if any_of(error is not None):
        raise error or PeerError("process 0 failed, see what it says")
    return result


def check_same(what: str, text: str) -> None:
    """All processes hold the same text.

    Raises:
        LaunchError: they do not; raised on every process.
    """
    digests = everyone(np.uint32(zlib.crc32(text.encode())))
    if different := [i for i, digest in enumerate(digests) if digest != digests[0]]:
        raise LaunchError(
            f"{what} of process {different[0]} of {len(digests)} is not process 0's; start every "
            "process with the same files and flags"
        )


# --- the mesh -------------------------------------------------------------------------------------


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The devices of all processes as a (data, fsdp, tensor) mesh; see `start`.

    A tensor group lies within one process, so that each can sample on its own; the devices of a
    process are neighbours, and so are its rows of a batch.
    """
    sizes = mesh_sizes(jax.device_count(), data=data, fsdp=fsdp, tensor=tensor)
    if jax.process_count() == 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=AUTO)
    local_sizes(jax.local_device_count(), sizes[-1])
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return device_mesh(ordered, sizes)


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of the mesh as (data, fsdp = 1, tensor), for sampling."""
    me = jax.process_index()
    mine = [device for device in mesh.devices.flat if device.process_index == me]
    return device_mesh(mine, local_sizes(len(mine), mesh.shape["tensor"]))


def _is_cpu_only() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = ("jax_plugins", "libtpu")
    return not any(importlib.util.find_spec(name) for name in plugins)
