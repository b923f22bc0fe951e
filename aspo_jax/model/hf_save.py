"""Model folders that `transformers` loads, written tensor by tensor from the devices."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from aspo_jax.model.hf import INDEX_FILE, WEIGHTS_FILE
from aspo_jax.model.hf_config import CONFIG_FILE, hf_config
from aspo_jax.model.hf_generation import GENERATION_FILE, generation_config
from aspo_jax.model.parameters import ModelConfig, Parameter, parameters

CODES = {"float32": "F32", "bfloat16": "BF16"}  # numpy's names and safetensors'


class _Tensor(NamedTuple):
    """A tensor to be written: its name, what it is, the array that holds it, and at what layer."""

    name: str
    entry: Parameter
    leaf: Any
    y: int

    def size(self, dtype: np.dtype) -> int:
        return int(np.prod(self.entry.shape)) * dtype.itemsize


def save_model(
    folder: str | Path,
    params: Any,
    config: ModelConfig,
    save_tokenizer: Callable[[Path], Any],
    *,
    eos_token_id: int | Sequence[int],
    source: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Tensors go from the devices to the file one by one, one of one layer at a time. Everything is
    written beside the target and renamed at the end, so a killed export leaves no half folder.
    Several processes call it together: all of them gather, process 0 writes.

    Args:
        folder: replaced if it is there.
        params: nested dict of arrays, sharded or not.
        save_tokenizer: called with a folder, adds the tokenizer's files.
        eos_token_id: what ends a response; of several the first is the tokenizer's own, and the
            one that config.json is sure to hold. All are in generation_config.json.
        source: folder that the model came from; the settings of its config.json and
            generation_config.json are kept.
        dtype: of the tensors, "float32" or "bfloat16".
        max_shard_bytes: more than this is split into files of at most this size and an index.
    """
    if dtype not in CODES:
        raise ValueError(f"dtype is {dtype!r}, expected {' or '.join(CODES)}")
    folder, kind = Path(folder), np.dtype(jnp.dtype(dtype))
    eos_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    raw = hf_config(config, eos_token_id=eos_ids[0], dtype=dtype, source=source)
    shards = _split(tensors_of(parameters(config), config.layers, params), kind, max_shard_bytes)
    with replacing(folder) as partial:
        for file, tensors in shards.items():
            write_tensors(partial / file, tensors, dtype)
        if jax.process_index() == 0:
            if len(shards) > 1:
                write_json(partial / INDEX_FILE, _weight_map(shards, kind))
            write_json(partial / CONFIG_FILE, raw)
            write_json(partial / GENERATION_FILE, generation_config(source, eos_ids))
            save_tokenizer(partial)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside a folder, which it replaces at the end unless that fails.

    Several processes enter it together; process 0 alone makes, fills and renames it.
    """
    is_writer = jax.process_index() == 0
    partial = folder.with_name(folder.name + ".partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    yield partial
    if is_writer:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("folder saved")


def tensors_of(table: Any, layers: int, params: Any) -> list[_Tensor]:
    """All tensors, the layers one after the other, what belongs to no layer beside the first.

    table: what the params are, a tree like them of `Parameter`.
    """
    pairs = jax.tree.map(lambda entry, leaf: (entry, leaf), table, params)
    found = [
        _Tensor(name, entry, leaf, y)
        for entry, leaf in jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple))
        for y, name in enumerate(entry.names(layers))
    ]
    return sorted(found, key=lambda tensor: tensor.y)


def write_tensors(path: Path, tensors: Sequence[_Tensor], dtype: str) -> None:
    """A safetensors file; several processes gather together, process 0 writes."""
    arrays = (_gather(tensor, dtype) for tensor in tensors)
    if jax.process_index() == 0:
        _write(path, tensors, arrays, np.dtype(jnp.dtype(dtype)))
    else:
        collections.deque(arrays, maxlen=0)


def _split(tensors: Sequence[_Tensor], dtype: np.dtype, max_bytes: int) -> dict[str, list[_Tensor]]:
    """File name -> its tensors, in order; a tensor above ``max_bytes`` has a file of its own."""
    parts: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.size(dtype) > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.size(dtype)
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": p for i, p in enumerate(parts, 1)}


def _gather(tensor: _Tensor, dtype: str) -> Array:
    """One tensor in their shape; whole on each device if other processes hold parts of it."""
    entry, leaf, replicated = tensor.entry, tensor.leaf, None
    if isinstance(leaf, Array) and not leaf.is_fully_addressable:
        replicated = NamedSharding(cast(NamedSharding, leaf.sharding).mesh, PartitionSpec())
    convert = _to_theirs(entry.shape, entry.is_transposed, entry.is_layered, dtype, replicated)
    return convert(leaf, np.int32(tensor.y)).block_until_ready()


@functools.lru_cache(maxsize=256)
def _to_theirs(
    shape: tuple[int, ...],
    is_transposed: bool,
    is_layered: bool,
    dtype: str,
    replicated: Sharding | None,
) -> Callable[[Any, Any], Array]:
    """(leaf, y) -> tensor in their shape."""

    def convert(leaf, y):
        if is_layered:
            leaf = jax.lax.dynamic_index_in_dim(leaf, y, keepdims=False)
        leaf = leaf.astype(dtype)
        return leaf.reshape(shape[::-1]).T if is_transposed else leaf.reshape(shape)

    return jax.jit(convert, out_shardings=replicated)


def _write(
    path: Path, tensors: Sequence[_Tensor], arrays: Iterable[Array], dtype: np.dtype
) -> None:
    """A safetensors file: the header's length and JSON, then the tensors' bytes in order.

    Its own lines because safetensors' writer wants all tensors of a file in memory, twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    code, offset = CODES[dtype.name], 0
    for tensor in tensors:
        end = offset + tensor.size(dtype)
        place = {"dtype": code, "shape": tensor.entry.shape, "data_offsets": [offset, end]}
        header[tensor.name] = place
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            whole = np.ascontiguousarray(array)  # assembles the shards of this process's devices
            file.write(whole.reshape(-1).view(np.uint8).data)


def _weight_map(shards: dict[str, list[_Tensor]], dtype: np.dtype) -> dict[str, Any]:
    size = sum(tensor.size(dtype) for tensors in shards.values() for tensor in tensors)
    where = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": size}, "weight_map": where}


def write_json(path: Path, raw: dict[str, Any]) -> None:
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
