"""Hugging Face folders: round trips, golden logits, shards, errors that name the place.

The torch models of `transformers` themselves are asked in test_parity.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import CONFIG, bits, random_params, toy_mesh, toy_model

from aspo_jax.model import (
    Llama3,
    ModelConfig,
    ModelFolderError,
    Yarn,
    build_model,
    hf,
    load_params,
    parse_model_config,
    read_model_config,
    save_model,
)

QWEN3: dict[str, Any] = {"qkv_bias": False, "qk_norm": True}
LLAMA: dict[str, Any] = {"qkv_bias": False}
SHAPES = {
    "tied, one key head per query head": ModelConfig(23, 16, 28, 2, 4, 4, 4),
    "untied, grouped, head width not hidden / heads": ModelConfig(
        37, 20, 41, 3, 6, 2, 6, rope_theta=1e6, tie_embeddings=False, max_position=99
    ),
    "tied, one key head, odd widths": ModelConfig(19, 33, 17, 1, 3, 1, 10, rms_norm_eps=1e-5),
    "YaRN": ModelConfig(23, 16, 28, 2, 4, 2, 16, rope_theta=1e6, rope_scaling=Yarn(4.0, 64)),
    "YaRN, every setting": ModelConfig(
        23, 16, 28, 2, 4, 2, 16, rope_scaling=Yarn(8.0, 4096, 16.0, 2.0, 1.3, truncate=False)
    ),
    "Qwen3, untied, heads wider than hidden": ModelConfig(
        37, 20, 41, 3, 6, 2, 8, rope_theta=1e6, tie_embeddings=False, **QWEN3
    ),
    "Qwen3, YaRN": ModelConfig(
        23, 16, 28, 2, 4, 1, 16, rope_theta=1e6, rope_scaling=Yarn(4.0, 64), **QWEN3
    ),
    "Llama, tied": ModelConfig(23, 16, 28, 2, 4, 2, 4, rms_norm_eps=1e-5, **LLAMA),
    "Llama, untied, its scaling": ModelConfig(
        *(23, 16, 28, 2, 4, 2, 16),
        rope_theta=5e5,
        tie_embeddings=False,
        rope_scaling=Llama3(8.0, 1.0, 4.0, 512),
        **LLAMA,
    ),
}
TOKEN_BT = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def save(folder: Path, config: ModelConfig = CONFIG, seed: int = 0, **how: Any):
    params = random_params(build_model(config), seed)
    save_model(folder, params, config, no_tokenizer, eos_token_id=2, **how)
    return params


def logits(config: ModelConfig, params, first: int = 0) -> np.ndarray:
    model = build_model(config)
    position_BT = first + np.tile(np.arange(TOKEN_BT.shape[1]), (len(TOKEN_BT), 1))

    @jax.jit
    def run(params):
        hidden, _ = model.apply(params, TOKEN_BT, position_BT, np.ones_like(TOKEN_BT))
        return hidden @ model.unembedding(params).T

    return np.asarray(run(params))


@pytest.mark.parametrize("shard", [10**9, 3000], ids=["one file", "shards"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_round_trip_is_bitwise(tmp_path, config, shard):
    folder = tmp_path / "exports" / "model"
    params = save(folder, config, max_shard_bytes=shard)
    assert (folder / "model.safetensors").is_file() == (shard > 10**6)
    assert read_model_config(folder) == config
    loaded = load_params(folder, config)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert bits(loaded) == bits(params)


# Logits of the last position of the first row, at positions from 1,000 on, computed by
# transformers 5.24 and torch 2.13 from the folders that `save` writes. Change them only together
# with `random_params` or `SHAPES`.
GOLDEN = {
    "tied, one key head per query head": [3.20168, -1.94282, -1.97621, 0.0653265, -0.643165],
    "untied, grouped, head width not hidden / heads": [0.153376, -1.71863, -0.386038, 0.243232],
    "tied, one key head, odd widths": [3.49303, 0.662972, -0.144265, -0.369897, 1.57608],
    "YaRN": [2.80275, -2.10207, 0.786775, 1.31799, 0.121404],
    "YaRN, every setting": [2.58566, -2.00779, 0.453381, 1.35521, 0.160558],
    "Qwen3, untied, heads wider than hidden": [1.33215, -0.720714, -0.499541, -1.21449, -0.206564],
    "Qwen3, YaRN": [0.819204, -1.24853, 0.908488, 0.558264, -0.498861],
    "Llama, tied": [1.0336, 1.88236, -0.350786, -0.218815, 0.0938908],
    "Llama, untied, its scaling": [0.82132, 0.427066, -1.36091, -0.828714, 0.113246],
}


@pytest.mark.parametrize("name", SHAPES)
def test_golden_logits(name):
    config = SHAPES[name]
    got = logits(config, random_params(build_model(config)), 1000)[0, -1, : len(GOLDEN[name])]
    np.testing.assert_allclose(got, GOLDEN[name], rtol=2e-4, atol=2e-4)


# --- shards, shardings and types ----------------------------------------------------------------


def test_shards_have_at_most_the_size_asked_for_and_an_index(tmp_path):
    save(tmp_path / "model", max_shard_bytes=3000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in tmp_path.glob("model/*.safetensors")}
    assert {n: f for f, tensors in shards.items() for n in tensors} == index["weight_map"]
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in shards.values()]
    assert max(sizes) <= 3000 and sum(sizes) == index["metadata"]["total_size"]
    assert all(f"-of-{len(shards):05}.safetensors" in name for name in shards)


@pytest.mark.parametrize("family", [{}, QWEN3, LLAMA], ids=["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 2)], ids=str)
def test_sharded_arrays_in_and_out_on_any_mesh(tmp_path, sizes, family):
    model = toy_model(tie_embeddings=False, **family)
    mesh = toy_mesh(*sizes)
    params = save(tmp_path / "model", model.config)
    wanted = model.shardings(mesh)
    loaded = load_params(tmp_path / "model", model.config, shardings=wanted)
    assert bits(loaded) == bits(params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == wanted
    save_model(tmp_path / "again", loaded, model.config, no_tokenizer, eos_token_id=2)
    first, again = (tmp_path / x / "model.safetensors" for x in ("model", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_a_tensor_of_a_layer_is_read_once_and_never_a_whole_stack(tmp_path, monkeypatch):
    model = toy_model()
    params = save(tmp_path / "model")
    read, blocks = hf.read_block, []
    monkeypatch.setattr(hf, "read_block", lambda *a: blocks.append(read(*a)) or blocks[-1])
    for sizes in ((4, 1, 1), (2, 1, 2), (1, 2, 2)):
        blocks.clear()
        wanted = model.shardings(toy_mesh(*sizes))
        load_params(tmp_path / "model", CONFIG, shardings=wanted)
        largest = max(x.size for x in jax.tree.leaves(params["layers"])) // CONFIG.layers
        assert max(x.size for x in blocks) <= max(largest, params["embed"].size)
        assert sum(x.size for x in blocks) == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_files_are_read_exactly(tmp_path, stored):
    params = save(tmp_path / "model")
    change_weights(tmp_path / "model", lambda t: t.update({k: cast(t[k], stored) for k in t}))
    rounded = jax.tree.map(lambda x: cast(x, stored).astype(np.float32), params)
    assert bits(load_params(tmp_path / "model", CONFIG)) == bits(rounded)


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    return array.astype(dtype)


def test_bfloat16_exports_round_to_nearest_and_are_bitwise_from_then_on(tmp_path):
    params = save(tmp_path / "model", dtype="bfloat16", max_shard_bytes=2000)
    half = load_params(tmp_path / "model", CONFIG, dtype=jnp.bfloat16)
    assert bits(half) == bits(jax.tree.map(lambda x: cast(x, ml_dtypes.bfloat16), params))
    save_model(tmp_path / "again", half, CONFIG, no_tokenizer, eos_token_id=2, dtype="bfloat16")
    assert bits(load_params(tmp_path / "again", CONFIG, dtype=jnp.bfloat16)) == bits(half)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype is 'float16', expected float32 or bfloat16"):
        save(tmp_path / "third", dtype="float16")


# --- folders that cannot be used --------------------------------------------------------------


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(path: Path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model\.norm\.weight \(16,\)"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(3)}),
            r"surplus model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.ones((8, 17))}),
            r"model\.layers\.1\.self_attn\.k_proj\.weight has shape \(8, 17\), expected \(8, 16\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}),
            r"model\.norm\.weight has type I8, expected F32 or BF16 or F16",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(4)}),
            r"surplus model\.layers\.0\.self_attn\.q_norm\.weight",
        ),
    ],
    ids=["missing", "surplus", "misshapen", "type", "of the other family"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, problem):
    save(tmp_path / "model")
    change_weights(tmp_path / "model", change)
    with pytest.raises(ModelFolderError, match=problem) as error:
        load_params(tmp_path / "model", CONFIG)
    assert str(tmp_path / "model" / "model.safetensors") in str(error.value)
    assert "1 problems" in str(error.value)


def test_what_old_folders_repeat_is_ignored(tmp_path):
    params = save(tmp_path / "model")
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": params["embed"], buffer: np.ones(2, np.float32)}
    change_weights(tmp_path / "model", lambda t: t.update(extra))
    assert bits(load_params(tmp_path / "model", CONFIG)) == bits(params)


def put_norm_into(raw: dict, file: Any) -> None:
    raw["weight_map"]["model.norm.weight"] = file


def test_shards_that_do_not_fit_their_index_are_named(tmp_path):
    folder = tmp_path / "model"
    save(folder, max_shard_bytes=3000)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    moved = "model-00001-of-"

    def move(raw):
        shard = next(x for x in raw["weight_map"].values() if x.startswith(moved))
        raw["weight_map"]["model.norm.weight"] = shard

    change_json(index, move)
    with pytest.raises(ModelFolderError, match=r"model\.norm\.weight is not in model-00001-of"):
        load_params(folder, CONFIG)
    index.write_text(whole)
    second = next(folder.glob("model-00002-of-*"))
    second.rename(folder / "elsewhere")
    with pytest.raises(ModelFolderError, match=r"missing file model-00002-of-.*") as error:
        load_params(folder, CONFIG)
    assert str(index) in str(error.value)
    (folder / "elsewhere").rename(second)
    for file in (3, "../model.safetensors", None):
        index.write_text(whole)
        change_json(index, functools.partial(put_norm_into, file=file))
        with pytest.raises(ModelFolderError, match=r"norm.weight is in .+, expected the name"):
            load_params(folder, CONFIG)
    index.write_text("[" * 100_000)
    with pytest.raises(ModelFolderError, match=r"index\.json: not JSON"):
        load_params(folder, CONFIG)
    index.write_text("{}")
    with pytest.raises(ModelFolderError, match="weight_map is None, expected tensor names"):
        load_params(folder, CONFIG)
    index.write_text("{")
    with pytest.raises(ModelFolderError, match=r"index\.json: not JSON"):
        load_params(folder, CONFIG)


def test_a_tensor_that_is_there_twice_is_named(tmp_path):
    folder = tmp_path / "model"
    save(folder, max_shard_bytes=3000)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value + 1}, second)
    message = rf"{name} is in {second.name} too, expected in {first.name} alone"
    with pytest.raises(ModelFolderError, match=message):
        load_params(folder, CONFIG)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, stored):
    save(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name] = tensors[name].astype(stored)
        tensors[name][3, 2] = value

    change_weights(tmp_path / "model", spoil)
    with pytest.raises(ModelFolderError, match=f"{name} holds numbers that are not finite"):
        load_params(tmp_path / "model", CONFIG)


def test_a_file_cut_short_is_named(tmp_path):
    save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=r"model\.safetensors: .*copy the file again"):
        load_params(tmp_path / "model", CONFIG)


MINIMAL = {
    "model_type": "qwen2",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def llama3(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"model_type": "llama", "rope_scaling": rope | more}


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_scaling": {"type": "yarn", "factor": 4.0, **more}}


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"model_type": "gemma"},
            "model_type is 'gemma', expected 'qwen2' or 'qwen3' or 'llama'; "
            r"use a dense Qwen2, Qwen2\.5, Qwen3 or Llama model",
        ),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe', .* mixtures of experts are not"),
        ({"model_type": None}, "model_type is None, expected 'qwen2' or 'qwen3'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True, expected False; use a"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True, expected False"),
        ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp is 2, .*; set it to 1: the"),
        (llama3(rope_type="longrope"), "rope_scaling.rope_type is 'longrope', expected 'default'"),
        (llama3(high_freq_factor=1), "rope_scaling.high_freq_factor is 1, .* low_freq_factor = 1"),
        (llama3(low_freq_factor=None), "rope_scaling.low_freq_factor is None, expected a number"),
        (
            llama3(beta_fast=32),
            "rope_scaling.beta_fast is 32, expected nothing beside",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        (
            WINDOW | {"max_window_layers": 1},
            "use_sliding_window is True, expected False: layers 1 to 1 would see 8 tokens",
        ),
        (WINDOW | {"max_window_layers": 0}, ".* layers 0 to 1 would see 8 tokens back only"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types is \['full_attention', 'sliding_attention'\], expected 'full_attention'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear', expected 'default'"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_parameters.rope_type is 'dynamic', expected 'default' or 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing, expected a number"),
        (yarn(mscale=0.7), "rope_scaling.mscale is 0.7, expected nothing beside"),
        (yarn(truncate=1), "rope_scaling.truncate is 1, expected true or false"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*, expected none"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True, expected False"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of 4"),
        ({"head_dim": 5}, "head_dim is 5, expected an even width"),
        ({"hidden_size": None}, "hidden_size is None, expected a whole number above 0"),
        ({"hidden_size": "16"}, "hidden_size is '16', expected a whole number above 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
    ],
    ids=str,
)
def test_what_the_config_asks_for_and_we_lack_is_named(change, problem):
    with pytest.raises(ModelFolderError, match=f"^somewhere: {problem}"):
        parse_model_config(MINIMAL | change, "somewhere")


def test_a_missing_field_is_named():
    raw = {name: value for name, value in MINIMAL.items() if name != "vocab_size"}
    with pytest.raises(ModelFolderError, match="vocab_size is missing, expected a whole number"):
        parse_model_config(raw, "somewhere")


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        WINDOW | {"max_window_layers": 2},
        WINDOW | {"layer_types": ["full_attention"] * 2, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"attention_bias": False, "bos_token_id": 1, "use_mrope": False},
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_ignored(change):
    assert parse_model_config(MINIMAL | change, "x") == parse_model_config(MINIMAL, "x")


def test_what_is_left_out_has_the_published_default():
    config = parse_model_config(MINIMAL, "x")
    assert config == ModelConfig(24, 16, 24, 2, 4, 2, 4, tie_embeddings=False)
    config = parse_model_config(MINIMAL | {"model_type": "qwen3"}, "x")
    assert config == ModelConfig(24, 16, 24, 2, 4, 2, 128, tie_embeddings=False, **QWEN3)
    config = parse_model_config(MINIMAL | {"model_type": "llama"}, "x")
    untied = {"tie_embeddings": False, "max_position": 2048}
    assert config == ModelConfig(24, 16, 24, 2, 4, 2, 4, **untied, **LLAMA)


def test_old_and_new_places_of_the_rotary_settings():
    old = MINIMAL | {"rope_theta": 5e5, "max_position_embeddings": 640} | yarn(rope_type="yarn")
    rope = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}
    new = MINIMAL | {"rope_parameters": rope, "max_position_embeddings": 640}
    plain = parse_model_config(MINIMAL, "x")
    expected = dataclasses.replace(
        plain, rope_theta=5e5, max_position=640, rope_scaling=Yarn(4.0, original_max_position=640)
    )
    assert parse_model_config(old, "x") == parse_model_config(new, "x") == expected
    both = MINIMAL | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}}
    assert parse_model_config(both, "x").rope_theta == 7e5


def test_the_scaling_of_llama_3_is_read_and_written_as_transformers_calls_it(tmp_path):
    config = parse_model_config(MINIMAL | llama3(), "x")
    assert config.rope_scaling == Llama3(8.0, 1.0, 4.0, 64)
    save(tmp_path / "model", config)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["rope_scaling"] == llama3()["rope_scaling"]
    assert raw["architectures"] == ["LlamaForCausalLM"] and raw["model_type"] == "llama"


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ModelFolderError, match=r"config\.json: not found; Model\.path must be"):
        read_model_config(tmp_path)
    with pytest.raises(ModelFolderError, match=r"model\.safetensors: not found, nor model\.safe"):
        load_params(tmp_path, CONFIG)


# --- what else is in an export ------------------------------------------------------------------


def killed(folder: Path) -> None:
    assert folder.name.endswith(".partial")  # the last thing written is not in place yet either
    raise KeyboardInterrupt


def test_a_killed_export_leaves_no_half_folder_and_spoils_no_whole_one(tmp_path):
    folder = tmp_path / "model"
    new = random_params(toy_model(), 1)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, new, CONFIG, killed, eos_token_id=2)
    assert not folder.exists()
    old = save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, new, CONFIG, killed, eos_token_id=2)
    assert bits(load_params(folder, CONFIG)) == bits(old)
    save_model(folder, new, CONFIG, no_tokenizer, eos_token_id=2)
    assert bits(load_params(folder, CONFIG)) == bits(new)


def test_a_new_folder_says_what_it_holds(tmp_path):
    folder = tmp_path / "model"
    save(folder)
    assert (folder / "tokenizer.json").is_file()
    generation = json.loads((folder / "generation_config.json").read_text())
    raw = json.loads((folder / "config.json").read_text())
    assert generation["eos_token_id"] == raw["eos_token_id"] == 2
    assert raw["architectures"] == ["Qwen2ForCausalLM"] and raw["torch_dtype"] == "float32"
    save(folder, SHAPES["Qwen3, YaRN"])
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3ForCausalLM"]
    with pytest.raises(ModelFolderError, match="qkv_bias True and qk_norm True has no published"):
        save(folder, dataclasses.replace(CONFIG, qk_norm=True))


def test_what_the_source_folder_says_beyond_us_is_kept(tmp_path):
    params = save(tmp_path / "source")
    sampling = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [7, 2]}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(sampling))
    extra = {"bos_token_id": 1, "eos_token_id": 7, "initializer_range": 0.02, "dtype": "bfloat16"}
    change_json(tmp_path / "source" / "config.json", lambda raw: raw.update(extra))
    change_json(tmp_path / "source" / "config.json", lambda raw: raw.pop("torch_dtype"))
    how = {"eos_token_id": 2, "source": tmp_path / "source"}
    save_model(tmp_path / "out", params, CONFIG, no_tokenizer, **how)
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    expected = raw | {"eos_token_id": [2, 7], "dtype": "float32"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == sampling
    other = dataclasses.replace(CONFIG, rope_theta=7.0)
    with pytest.raises(
        ModelFolderError, match=r"another network .*: rope_theta 10000.0, expected 7"
    ):
        save_model(tmp_path / "out", params, other, no_tokenizer, **how)
