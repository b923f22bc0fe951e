"""Adapters in the folders of the `peft` package, which transformers and vLLM load.

adapter_config.json            what `Lora` says, and the model that it belongs to
adapter_model.safetensors      ``lora_A`` [r, in] and ``lora_B`` [out, r] of every matrix and layer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from aspo_jax.model.hf import NotFinite, differences, load_leaf
from aspo_jax.model.hf_config import ModelFolderError, read_json
from aspo_jax.model.hf_save import replacing, tensors_of, write_json, write_tensors
from aspo_jax.model.lora import Lora, adapter_axes, adapter_table, init_adapter
from aspo_jax.model.parameters import ModelConfig, Parameter
from aspo_jax.model.sharding import axes_shardings

SETTINGS_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_COPY = "copy the folder again"
# What a folder may ask for that is computed otherwise, and the value that means it does not.
_OFF: dict[str, Any] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


class Base(NamedTuple):
    """The frozen model of an adapter: a folder or a name on the hub, and its commit there."""

    name: str
    commit: str | None = None


def save_adapter(
    folder: str | Path, adapter: Any, config: ModelConfig, lora: Lora, base: Base
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads; it is replaced if it is there.

    All is written beside it and renamed at the end. Several processes call it together: all of
    them gather, process 0 writes.
    """
    table = adapter_table(config, lora)
    with replacing(Path(folder)) as partial:
        tensors = tensors_of(table, config.layers, adapter)
        write_tensors(partial / TENSORS_FILE, tensors, "float32")
        if jax.process_index() == 0:
            write_json(partial / SETTINGS_FILE, _settings(table, lora, base))


def _settings(table: Any, lora: Lora, base: Base) -> dict[str, Any]:
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.commit,
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": lora.is_rank_stabilised,
        "target_modules": sorted(_module(pair["a"]) for pair in table["layers"].values()),
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_OFF,
    }


def _module(entry: Parameter) -> str:
    """What transformers calls the layer: q_proj."""
    return entry.name.split(".")[-3]


def load_adapter(
    folder: str | Path, config: ModelConfig, lora: Lora, mesh: Mesh, key: jax.Array
) -> Any:
    """Read an adapter onto the devices of a mesh, float32.

    A matrix that the folder has no adapter of gets a new one, which changes nothing at first; key:
    its first values.

    Raises:
        ModelFolderError: no such folder, one of another rank or scale, one that asks for what is
            not computed here, or tensors that do not fit the network.
    """
    folder = Path(folder).expanduser()
    check_adapter(folder, lora)
    places = axes_shardings(mesh, adapter_axes(config, lora))
    fresh = jax.jit(lambda key: init_adapter(config, lora, key), out_shardings=places)(key)
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise ModelFolderError(f"{path}: not found; expected the adapter's tensors, {_COPY}")
    try:
        with safe_open(path, framework="numpy") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return _read(path, found, config, lora, fresh, places)
    except SafetensorError as error:
        raise ModelFolderError(f"{path}: {error}; {_COPY}") from error


def _read(
    path: Path, found: dict[str, Any], config: ModelConfig, lora: Lora, fresh: Any, places: Any
) -> Any:
    table, layers = adapter_table(config, lora)["layers"], config.layers
    present = {
        matrix: pair
        for matrix, pair in table.items()
        if any(name in found for entry in pair.values() for name in entry.names(layers))
    }
    if problems := differences(found, present, layers):
        shown = "\n  ".join(problems[:20])
        raise ModelFolderError(
            f"{path} does not fit the network and Lora.targets = {lora.targets!r} ({len(problems)} "
            f"problems):\n  {shown}"
        )

    def load(entry: Parameter, sharding: Sharding) -> jax.Array:
        return load_leaf(found, entry, layers, sharding, jnp.float32)

    try:
        read = {name: jax.tree.map(load, table[name], places["layers"][name]) for name in present}
    except NotFinite as problem:
        raise ModelFolderError(f"{path}: {problem} holds numbers that are not finite") from None
    return {"layers": fresh["layers"] | read}


def check_adapter(folder: str | Path, lora: Lora) -> None:
    """The folder's adapter is computed as ours are, with the same rank and scale.

    Raises:
        ModelFolderError: it is not, or there is none.
    """
    path = Path(folder).expanduser() / SETTINGS_FILE
    if not path.is_file():
        raise ModelFolderError(
            f"{path}: not found; expected the folder of an adapter, as the peft package writes it"
        )
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ModelFolderError(f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'")
    ours = {
        "r": ("Lora.rank", lora.rank),
        "lora_alpha": ("Lora.alpha", lora.alpha),
        "use_rslora": ("Lora.is_rank_stabilised", lora.is_rank_stabilised),
    }
    problems = [
        f"{name} is {raw.get(name, False)!r}, and {setting} = {value!r}; set {setting} to that"
        for name, (setting, value) in ours.items()
        if raw.get(name, False) != value
    ]
    problems += [
        f"{name} is {raw[name]!r}, expected {off!r}: it is not computed here"
        for name, off in _OFF.items()
        if raw.get(name) and raw[name] != off
    ]
    if problems:
        raise ModelFolderError("\n".join(f"{path}: {problem}" for problem in problems))
