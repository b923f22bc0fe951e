"""Hugging Face folders in and out: one table of names, shapes checked both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from aspo_jax.model.qwen import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class ModelFolderError(ValueError):
    """A model folder that cannot be used: which file, what was found, what was expected."""


class Entry(NamedTuple):
    """One tensor of a Hugging Face checkpoint.

    name: its name there, with ``{y}`` for the layer.
    shape: its shape there.
    ours: its shape in our params (without the layer axis): ``[in, out]`` where theirs is
        ``[out, in]``, with the head axis split off.
    """

    name: str
    shape: tuple[int, ...]
    ours: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        return len(self.shape) == 2 and self.name.endswith("_proj.weight")


def names_table(config: ModelConfig) -> dict[tuple[str, ...], Entry]:
    """Path in our params -> tensor in a Hugging Face Qwen2 checkpoint."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    D, F, H, K, C = c.hidden_size, c.intermediate_size, c.heads, c.kv_heads, c.head_dim
    layer = "model.layers.{y}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    table = {
        ("embed",): Entry("model.embed_tokens.weight", (c.vocab_size, D), (c.vocab_size, D)),
        ("norm",): Entry("model.norm.weight", (D,), (D,)),
        ("layers", "attention_norm", "scale"): Entry(layer + "input_layernorm.weight", (D,), (D,)),
        ("layers", "mlp_norm", "scale"): Entry(
            layer + "post_attention_layernorm.weight", (D,), (D,)
        ),
        ("layers", "q", "kernel"): Entry(attention + "q_proj.weight", (q, D), (D, H, C)),
        ("layers", "q", "bias"): Entry(attention + "q_proj.bias", (q,), (H, C)),
        ("layers", "k", "kernel"): Entry(attention + "k_proj.weight", (kv, D), (D, K, C)),
        ("layers", "k", "bias"): Entry(attention + "k_proj.bias", (kv,), (K, C)),
        ("layers", "v", "kernel"): Entry(attention + "v_proj.weight", (kv, D), (D, K, C)),
        ("layers", "v", "bias"): Entry(attention + "v_proj.bias", (kv,), (K, C)),
        ("layers", "o", "kernel"): Entry(attention + "o_proj.weight", (D, q), (H, C, D)),
        ("layers", "gate", "kernel"): Entry(mlp + "gate_proj.weight", (F, D), (D, F)),
        ("layers", "up", "kernel"): Entry(mlp + "up_proj.weight", (F, D), (D, F)),
        ("layers", "down", "kernel"): Entry(mlp + "down_proj.weight", (D, F), (F, D)),
    }
    if not c.tie_embeddings:
        table[("head",)] = Entry("lm_head.weight", (c.vocab_size, D), (c.vocab_size, D))
    return table


def read_model_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json``; what it asks for and we lack is an error that names it."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ModelFolderError(
            f"{path}: not found; Model.path must be a Hugging Face model folder with config.json, "
            f"{WEIGHTS_FILE} and tokenizer.json"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFolderError(f"{path}: not JSON ({error}); copy the file again") from error

    def need(field: str, expected: Any, *, default: Any) -> None:
        found = raw.get(field, default)
        if found != expected:
            raise ModelFolderError(
                f"{path}: {field} is {found!r}, expected {expected!r}; this model is not supported"
            )

    need("model_type", "qwen2", default=None)
    need("hidden_act", "silu", default="silu")
    need("use_sliding_window", False, default=False)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelFolderError(f"{path}: rope scaling {rope!r} is not supported, expected none")
    try:
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            kv_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            # transformers 5 moved rope_theta into rope_parameters; older folders have it on top.
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            max_position=raw.get("max_position_embeddings", 32_768),
        )
    except KeyError as missing:
        raise ModelFolderError(f"{path}: field {missing} is missing") from None


def _layer_names(entry: Entry, layers: int) -> list[str]:
    return [entry.name.format(y=y) for y in range(layers if "{y}" in entry.name else 1)]


def load_params(folder: str | Path, config: ModelConfig) -> Any:
    """Read float32 params from the folder's safetensors, as NumPy arrays.

    Raises:
        ModelFolderError: tensors are missing, surplus or misshapen; the message lists them.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ModelFolderError(
            f"{path}: not found; expected the weights in this one file (shards with an index "
            "are not supported yet: save again with save_pretrained(max_shard_size='100GB'))"
        )
    table = names_table(config)
    with safe_open(path, framework="numpy") as file:
        _check_names(path, file, table, config)
        params: dict = {}
        for our_path, entry in table.items():
            layers = [
                _to_ours(file.get_tensor(name), entry)
                for name in _layer_names(entry, config.layers)
            ]
            _put(params, our_path, np.stack(layers) if "{y}" in entry.name else layers[0])
    return params


def _check_names(path: Path, file: Any, table: dict, config: ModelConfig) -> None:
    expected = {
        name: entry.shape for entry in table.values() for name in _layer_names(entry, config.layers)
    }
    # Tied checkpoints may repeat the embedding under the head's name.
    optional = {"lm_head.weight"} if config.tie_embeddings else set()
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"surplus {name}" for name in found if name not in expected.keys() | optional]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ModelFolderError(
            f"{path} does not fit its {CONFIG_FILE} ({len(problems)} problems):\n  {shown}"
        )


def _put(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _to_ours(array: np.ndarray, entry: Entry) -> np.ndarray:
    array = array.astype(np.float32)
    return np.ascontiguousarray(array.T if entry.is_transposed else array).reshape(entry.ours)


def _to_theirs(array: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.is_transposed:
        array = array.reshape(entry.shape[::-1]).T
    return np.ascontiguousarray(array.reshape(entry.shape))


def save_model(
    folder: str | Path,
    params: Any,
    config: ModelConfig,
    save_tokenizer: Callable[[Path], Any],
    *,
    eos_token_id: int,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Everything is written beside the target and renamed at the end, so a killed export leaves no
    half folder. ``save_tokenizer(folder)`` adds the tokenizer's files.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {}
    for our_path, entry in names_table(config).items():
        leaf = params
        for part in our_path:
            leaf = leaf[part]
        array = np.asarray(jax.device_get(leaf))
        for y, name in enumerate(_layer_names(entry, config.layers)):
            tensors[name] = _to_theirs(array[y] if "{y}" in entry.name else array, entry)
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    raw = _hf_config(config, eos_token_id, str(next(iter(tensors.values())).dtype))
    (partial / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
    generation = {"eos_token_id": eos_token_id, "do_sample": True, "temperature": 1.0}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _hf_config(config: ModelConfig, eos_token_id: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "use_sliding_window": False,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }
