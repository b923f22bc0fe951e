"""`config.json` of a Hugging Face folder, in and out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aspo_jax.errors import UserError
from aspo_jax.model.parameters import Llama3, ModelConfig, Yarn

CONFIG_FILE = "config.json"


class ModelFolderError(UserError):
    """A model folder that cannot be used: which file, what was found, what was expected."""


class Family(NamedTuple):
    """What a published ``model_type`` fixes.

    titles: what people call it.
    head_dim: the head width where config.json names none; None: hidden_size / heads.
    max_position: the longest context where config.json names none.
    """

    architecture: str
    titles: tuple[str, ...]
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None
    max_position: int


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", ("Qwen2", "Qwen2.5"), True, False, None, 32_768),
    "qwen3": Family("Qwen3ForCausalLM", ("Qwen3",), False, True, 128, 32_768),
    "llama": Family("LlamaForCausalLM", ("Llama",), False, False, None, 2048),
}
_TITLES = [title for family in FAMILIES.values() for title in family.titles]
SUPPORTED = f"{', '.join(_TITLES[:-1])} or {_TITLES[-1]}"

# --- config.json in ---------------------------------------------------------------------------

_COPY = "copy the file again from where the model came from"
_NOTHING = object()  # no default: the field must be there
_ANOTHER = f"use a dense {SUPPORTED} model"
_PLAIN = ("type", "rope_type", "rope_theta")
_STRETCHED = (*_PLAIN, "factor", "original_max_position_embeddings")
_ROPE_FIELDS = {
    "default": _PLAIN,
    "yarn": (*_STRETCHED, "beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": (*_STRETCHED, "low_freq_factor", "high_freq_factor"),
}


def _is_number(*kinds: type) -> Callable[[Any], bool]:
    return lambda x: type(x) in kinds and x > 0  # True is no number


class _Fields:
    """The fields of one JSON object, each read with its type checked."""

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = ""):
        self.raw, self.where, self.prefix = raw, where, prefix

    def error(self, field: str, expected: str, remedy: str) -> ModelFolderError:
        found = repr(self.raw[field]) if field in self.raw else "missing"
        return ModelFolderError(
            f"{self.where}: {self.prefix}{field} is {found}, expected {expected}; {remedy}"
        )

    def _get(self, field: str, default: Any, is_good: Callable[[Any], bool], expected: str) -> Any:
        value = self.raw.get(field)
        if value is None and default is not _NOTHING:
            return default
        if not is_good(value):
            raise self.error(field, expected, _COPY)
        return value

    def whole(self, field: str, default: Any = _NOTHING) -> int:
        return self._get(field, default, _is_number(int), "a whole number above 0")

    def real(self, field: str, default: Any = _NOTHING) -> Any:
        value = self._get(field, default, _is_number(int, float), "a number above 0")
        return value if value is None else float(value)

    def flag(self, field: str, default: bool) -> bool:
        return self._get(field, default, lambda x: type(x) is bool, "true or false")

    def part(self, field: str) -> _Fields:
        """The fields of an object inside; none if it is not there."""
        inside = self._get(field, {}, lambda x: isinstance(x, dict), "an object")
        return _Fields(inside, self.where, f"{field}.")

    def must_be(self, field: str, expected: Any, remedy: str = _ANOTHER) -> None:
        """``expected``, or not there at all."""
        if self.raw.get(field) not in (None, expected):
            raise self.error(field, "none" if expected is None else repr(expected), remedy)


def read_model_config(folder: str | Path) -> ModelConfig:
    """Read a folder's ``config.json``; see `parse_model_config`."""
    path = Path(folder).expanduser() / CONFIG_FILE
    if not path.is_file():
        raise ModelFolderError(
            f"{path}: not found; Model.path must be a Hugging Face model folder with config.json, "
            "safetensors weights and tokenizer.json, or a name on the Hugging Face hub"
        )
    return parse_model_config(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path}: found a {type(raw).__name__}, expected a JSON object")
    return raw


def parse_model_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The fields of a ``config.json`` whose model type is one of `FAMILIES`, as ours.

    Absent fields have `transformers`' defaults where those are the published models' too; both
    places of the rotary settings are read (``rope_theta`` and ``rope_scaling`` of transformers 4,
    ``rope_parameters`` of transformers 5).

    where: the file, for messages.

    Raises:
        ModelFolderError: what the config asks for and we lack (another model type, experts, a
            sliding window that a layer uses, other rotary scalings than YaRN's and Llama 3's,
            biases in Qwen3 or Llama, quantised weights), or a field that is missing or of the
            wrong type.
    """
    fields = _Fields(raw, where)
    family = _family(fields)
    fields.must_be("hidden_act", "silu")
    if not family.qkv_bias:  # Qwen2 has biases whatever this field says
        fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("pretraining_tp", 1, "set it to 1: the weights are the same")
    fields.must_be("use_mrope", False)
    fields.must_be("partial_rotary_factor", 1.0)
    fields.must_be("quantization_config", None, "use the folder of the weights in bfloat16")
    layers = fields.whole("num_hidden_layers")
    _refuse_sliding_window(fields, layers)
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of {heads} query heads", _ANOTHER)
    head_dim = fields.whole("head_dim", family.head_dim or width // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"an even width, found {head_dim}", _ANOTHER)
    max_position = fields.whole("max_position_embeddings", family.max_position)
    theta, scaling = _rotary(fields, max_position)
    return ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=fields.real("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=max_position,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_scaling=scaling,
    )


def _family(fields: _Fields) -> Family:
    model_type = fields.raw.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    has_experts = "moe" in str(model_type)
    raise fields.error(
        "model_type",
        " or ".join(map(repr, FAMILIES)),
        f"mixtures of experts are not supported, {_ANOTHER}" if has_experts else _ANOTHER,
    )


def _refuse_sliding_window(fields: _Fields, layers: int) -> None:
    """Raise if a layer attends within a window; unused settings of one are ignored.

    As in `transformers`: ``layer_types`` decides; without it the layers from
    ``max_window_layers`` on have the window, if ``use_sliding_window``.
    """
    if types := fields.raw.get("layer_types"):
        if set(types) != {"full_attention"}:
            raise fields.error("layer_types", "'full_attention' in every layer", _ANOTHER)
    elif fields.flag("use_sliding_window", False):
        is_first = fields.raw.get("max_window_layers") == 0
        first = 0 if is_first else fields.whole("max_window_layers", 28)
        window = fields.raw.get("sliding_window", 4096)
        if window is not None and first < layers:
            raise fields.error(
                "use_sliding_window",
                f"False: layers {first} to {layers - 1} would see {window} tokens back only",
                _ANOTHER,
            )


def _rotary(fields: _Fields, max_position: int) -> tuple[float, Yarn | Llama3 | None]:
    """rope_theta, and how the angles are stretched if the config asks for it."""
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    rope = fields.part(name)
    theta = rope.real("rope_theta", fields.real("rope_theta", 10_000.0))
    key = "rope_type" if "rope_type" in rope.raw else "type"
    kind = rope.raw.get(key, "default")
    if kind not in _ROPE_FIELDS:
        raise rope.error(key, " or ".join(map(repr, _ROPE_FIELDS)), _ANOTHER)
    for field, value in rope.raw.items():
        if field not in _ROPE_FIELDS[kind] and value is not None:
            remedy = "remove it if the model was trained without it"
            raise rope.error(field, f"nothing beside {', '.join(_ROPE_FIELDS[kind])}", remedy)
    if kind == "default":
        return theta, None
    within = rope.whole("original_max_position_embeddings", max_position)
    within = fields.whole("original_max_position_embeddings", within)
    return theta, (_yarn if kind == "yarn" else _llama3)(rope, within)


def _yarn(rope: _Fields, within: int) -> Yarn:
    return Yarn(
        factor=rope.real("factor"),
        original_max_position=within,
        beta_fast=rope.real("beta_fast", 32.0),
        beta_slow=rope.real("beta_slow", 1.0),
        attention_factor=rope.real("attention_factor", None),
        truncate=rope.flag("truncate", True),
    )


def _llama3(rope: _Fields, within: int) -> Llama3:
    low, high = rope.real("low_freq_factor"), rope.real("high_freq_factor")
    if low >= high:
        raise rope.error("high_freq_factor", f"above low_freq_factor = {low}", _COPY)
    return Llama3(rope.real("factor"), low, high, within)


# --- config.json out --------------------------------------------------------------------------


def hf_config(
    config: ModelConfig, *, eos_token_id: int, dtype: str, source: str | Path | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a model, readable by transformers 4 and 5.

    source: folder whose config.json describes the same network: its text is kept, but for the
        dtype and an end-of-sequence token that it lacks.

    Raises:
        ModelFolderError: the source describes another network.
    """
    if source is None:
        return {**_new_config(config), "eos_token_id": eos_token_id, "torch_dtype": dtype}
    path = Path(source).expanduser() / CONFIG_FILE
    raw = read_json(path)
    theirs = parse_model_config(raw, str(path))
    if theirs != config:
        ours = dataclasses.asdict(config)
        differing = [
            f"{name} {found!r}, expected {ours[name]!r}"
            for name, found in dataclasses.asdict(theirs).items()
            if found != ours[name]
        ]
        raise ModelFolderError(
            f"{path} describes another network than the one to be saved: {'; '.join(differing)}"
        )
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    return with_eos(raw, [eos_token_id])


def with_eos(raw: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """The fields with these tokens among the end-of-sequence tokens."""
    found = raw.get("eos_token_id")
    known = found if isinstance(found, list) else [] if found is None else [found]
    every = [*(i for i in ids if i not in known), *known]
    if every == known:
        return raw
    return raw | {"eos_token_id": every if len(every) > 1 else every[0]}


def _new_config(config: ModelConfig) -> dict[str, Any]:
    kind = (config.qkv_bias, config.qk_norm)
    model_type = next((n for n, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm) == kind), None)
    if model_type is None:
        raise ModelFolderError(
            f"a network with qkv_bias {config.qkv_bias} and qk_norm {config.qk_norm} has no "
            f"published format, expected those of {' or '.join(FAMILIES)}"
        )
    raw = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
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
    }
    return raw | ({"rope_scaling": _scaling(config.rope_scaling)} if config.rope_scaling else {})


def _scaling(ours: Yarn | Llama3) -> dict[str, Any]:
    """``rope_scaling`` as `transformers` reads it."""
    theirs = {
        "original_max_position": "original_max_position_embeddings",
        "low_turns": "low_freq_factor",
        "high_turns": "high_freq_factor",
    }
    kind = "yarn" if isinstance(ours, Yarn) else "llama3"
    known = {theirs.get(k, k): x for k, x in dataclasses.asdict(ours).items() if x is not None}
    return {"rope_type": kind, **known}
