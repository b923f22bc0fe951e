"""Weights of Hugging Face folders, read tensor by tensor."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from aspo_jax.model.hf_config import CONFIG_FILE, ModelFolderError, read_json
from aspo_jax.model.parameters import ModelConfig, Parameter, parameters

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")

# Buffers that old versions of transformers saved; they follow from config.json.
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_params(
    folder: str | Path, config: ModelConfig, *, shardings: Any = None, dtype: Any = jnp.float32
) -> Any:
    """Read a folder's safetensors, one file or shards with an index, into arrays on the devices.

    Host memory stays near one tensor of one layer: a process reads of each tensor only what its
    own devices hold, writes it into the stack of layers on the devices, and goes on to the next.
    All names, shapes and types are checked before the first tensor is read. Several processes
    call it together.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the shards it names.
        config: what the tensors are expected to be.
        shardings: tree of shardings like the params; None: all on the first local device.
        dtype: of the arrays; the files may hold float32, bfloat16 or float16.

    Returns:
        The nested dict of `Model.init`.

    Raises:
        ModelFolderError: files or tensors are missing, surplus, misshapen or there twice (the
            message lists them), or numbers of a tensor are not finite.
    """
    tree = parameters(config)
    if shardings is None:
        alone = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: alone, tree)
    with opened(folder, config) as tensors:

        def load(entry: Parameter, sharding: Sharding) -> Array:
            return load_leaf(tensors, entry, config.layers, sharding, dtype)

        return jax.tree.map(load, tree, shardings)


@contextlib.contextmanager
def opened(folder: str | Path, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Name -> lazy slice of each tensor of a folder; see `load_params` for what is raised."""
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(Path(folder).expanduser(), config, stack)
        try:
            yield tensors
        except NotFinite as problem:
            raise ModelFolderError(
                f"{folder}: {problem} holds numbers that are not finite, so that every answer "
                "would be noise; copy the weights again, or use those of an earlier step"
            ) from None


class NotFinite(Exception):
    """Name of a tensor that holds NaN or infinity."""


def _open_tensors(folder: Path, config: ModelConfig, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name -> lazy slice of each tensor that we need, after checking them all."""
    place, index = _index(folder)
    problems, found = [], {}
    for file in weight_files(folder):
        path = folder / file
        if not path.is_file():
            problems.append(f"missing file {file}")
            continue
        try:
            opened = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ModelFolderError(f"{path}: {error}; copy the file again") from error
        names = set(opened.keys())
        claimed = {name for name, shard in index.items() if shard == file}
        problems += [f"{name} is not in {file}" for name in sorted(claimed - names)]
        problems += [
            f"{name} is in {file} too, expected in {index[name]} alone"
            for name in sorted(names - claimed)
            if name in index
        ]
        found |= {name: opened.get_slice(name) for name in sorted(names)}
    if not problems:
        # Tied checkpoints may repeat the embedding under the head's name.
        tied = {"lm_head.weight"} if config.tie_embeddings else set()
        problems = differences(
            found,
            parameters(config),
            config.layers,
            lambda name: name in tied or _BUFFER.fullmatch(name),
        )
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ModelFolderError(
            f"{place} does not fit its {CONFIG_FILE} or its files ({len(problems)} problems):\n"
            f"  {shown}"
        )
    return found


def weight_files(folder: Path) -> list[str]:
    """The files that hold a folder's weights, there or not.

    Raises:
        ModelFolderError: neither one file nor a readable index is there.
    """
    return sorted(set(_index(folder)[1].values()) or {WEIGHTS_FILE})


def _index(folder: Path) -> tuple[Path, dict[str, str]]:
    """The file that says where the tensors are, and name -> shard, empty for a single file."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return single, {}
    if not index.is_file():
        raise ModelFolderError(
            f"{single}: not found, nor {INDEX_FILE}; expected weights in safetensors (save those "
            "of other formats again with transformers' save_pretrained)"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelFolderError(
            f"{index}: weight_map is {shards!r}, expected tensor names and their files; copy it "
            "again"
        )
    for name, file in shards.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelFolderError(
                f"{index}: weight_map says that {name} is in {file!r}, expected the name of a file "
                "beside it; copy it again"
            )
    return index, shards


def differences(
    found: dict[str, Any],
    table: Any,
    layers: int,
    is_optional: Callable[[str], Any] = lambda name: False,
) -> list[str]:
    """What is missing, surplus, misshapen or of another type.

    table: tree of the `Parameter`s that are expected. is_optional: what may be there besides.
    """
    expected = {
        name: entry.shape for entry in jax.tree.leaves(table) for name in entry.names(layers)
    }
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    for name, tensor in found.items():
        shape = tuple(tensor.get_shape())
        if name not in expected:
            if not is_optional(name):
                problems.append(f"surplus {name}")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        elif tensor.get_dtype() not in DTYPES:
            problems.append(f"{name} has type {tensor.get_dtype()}, expected {' or '.join(DTYPES)}")
    return problems


def load_leaf(
    tensors: dict[str, Any], entry: Parameter, layers: int, sharding: Sharding, dtype: Any
) -> Array:
    """One array of params, all layers of it."""
    if not entry.is_layered:
        return _load_tensor(entry.name, tensors, entry, sharding, dtype)
    names, of_layer = entry.names(layers), without_layers(sharding)

    def load(y: int) -> Array:
        return _load_tensor(names[y], tensors, entry, of_layer, dtype)

    shape = (layers, *entry.ours)
    return stacked(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), load)


def stacked(shapes: Any, load: Callable[[int], Any]) -> Any:
    """A tree of arrays with a leading layer axis, written layer by layer.

    shapes: with types and shardings. load: number of a layer -> its tree.
    """
    stacks = jax.tree.map(lambda x: _zeros(x.sharding)(x.shape, x.dtype), shapes)
    for y in range(len(jax.tree.leaves(stacks)[0])):
        write = functools.partial(_written, y)
        stacks = jax.tree.map(write, shapes, stacks, load(y))
        jax.block_until_ready(stacks)  # else the layers read ahead pile up on the host
    return stacks


def _written(y: int, shape: jax.ShapeDtypeStruct, stack: Array, layer: Array) -> Array:
    return _write_layer(shape.sharding)(stack, layer, np.int32(y))


def _load_tensor(
    name: str, tensors: dict[str, Any], entry: Parameter, sharding: Sharding, dtype: Any
) -> Array:
    """One tensor in our shape; replicas of a shard are read once."""
    read: dict[Any, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        block_of = bounds(index, entry.ours)
        if block_of not in read:
            block = read_block(tensors[name], entry, block_of).astype(dtype)
            # The extremes tell, without an array of booleans: NaN is either, infinity one of them.
            with np.errstate(invalid="ignore"):
                extremes = [block.min(), block.max()]
            if not np.isfinite(extremes).all():
                raise NotFinite(name)
            read[block_of] = block
        return read[block_of]

    return jax.make_array_from_callback(entry.ours, sharding, shard)


def bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last, exclusive, of each axis that a device's slices of an array take."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def read_block(tensor: Any, entry: Parameter, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The block [first, last) of each of our axes, read from their tensor."""
    flat = entry.flat
    within, where = tuple(slice(first, last) for first, last in bounds), list(bounds)
    if len(bounds) > len(flat):  # ours has heads and head width where theirs has their product
        axis = next(i for i, (n, m) in enumerate(zip(entry.ours, flat, strict=False)) if n != m)
        (first, last), width = bounds[axis], entry.ours[axis + 1]
        where[axis : axis + 2] = [(first * width, last * width)]
        within = (slice(None),) * (axis + 1) + (within[axis + 1],)
        shape = [b - a for a, b in bounds]
        shape[axis + 1] = width
    else:
        within, shape = (), [b - a for a, b in bounds]
    slices = tuple(slice(first, last) for first, last in where)
    block = tensor[slices[::-1]].T if entry.is_transposed else tensor[slices]
    return np.ascontiguousarray(block.reshape(shape)[within])


def without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


@functools.lru_cache(maxsize=64)
def _zeros(sharding: Sharding) -> Callable[..., Array]:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _write_layer(sharding: Sharding) -> Callable[..., Array]:
    """(stack, layer, y) -> the stack with the layer in place; donates the stack."""

    def write(stack, layer, y):
        return jax.lax.dynamic_update_index_in_dim(stack, layer, y, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
